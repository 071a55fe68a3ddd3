"""Patches of any size from one master kernel, and where they lie."""

from __future__ import annotations

from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor


@lru_cache(maxsize=64)
def resize_matrix(base: int, size: int) -> Tensor:
    """Return the [size^2, base^2] fp64 matrix that takes a base kernel to another patch size.

    The pseudoinverse resize of Beyer et al., 2023 (FlexiViT): with B the bilinear, not antialiased resize of a
    patch, w_q = pinv(B^T) w_p. For size >= base the embedding of a resized patch is exactly the original's.
    """
    basis = torch.eye(base * base, dtype=torch.float64).reshape(base * base, 1, base, base)
    resized = F.interpolate(basis, size=(size, size), mode="bilinear", align_corners=False, antialias=False)
    matrix: Tensor = torch.linalg.pinv(resized.reshape(base * base, size * size))
    return matrix


def resize_kernel(kernel: Tensor, size: int) -> Tensor:
    """Resize a master kernel [D, C, p, p] to [D, C, size, size]; differentiable, identity at its own size."""
    base = kernel.shape[-1]
    if size == base:
        return kernel
    # In fp32 at least: rounding the matrix itself to bf16 would add as much error as rounding its result.
    exact = kernel.to(torch.promote_types(kernel.dtype, torch.float32))
    matrix = _resize_matrix_on(base, size, exact.device, exact.dtype)
    return (exact.flatten(2) @ matrix.T).reshape(*kernel.shape[:2], size, size).to(kernel.dtype)


@lru_cache(maxsize=64)
def _resize_matrix_on(base: int, size: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    return resize_matrix(base, size).to(device, dtype)


def take_patches(images: Tensor, size: int, chosen: Tensor | None) -> Tensor:
    """Cut images [B, C, H, W] into flattened patches [B, n, C * size^2].

    With `chosen` [B, n], numbers of patches in row-major order, only those are ever copied.
    """
    batch, channels, height, width = images.shape
    rows, columns = height // size, width // size
    grid = images.reshape(batch, channels, rows, size, columns, size).permute(0, 2, 4, 1, 3, 5)
    if chosen is None:
        return grid.reshape(batch, rows * columns, -1)
    sample = torch.arange(batch, device=images.device)[:, None]
    return grid[sample, chosen // columns, chosen % columns].flatten(2)


@lru_cache(maxsize=64)
def sincos_positions(grid: int, base_grid: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return fixed positions [grid^2, dim] for a square grid of patches.

    The 2-D sine-cosine table of MoCo-v3, evaluated where the patch centers lie on the base grid, so that a
    position means the same place at every patch size.
    """
    coordinate = (torch.arange(grid, dtype=torch.float64) + 0.5) * base_grid / grid - 0.5
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    angle = coordinate[:, None] * frequency
    row = angle.repeat_interleave(grid, 0)
    column = angle.repeat(grid, 1)
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1).to(device, dtype)


def random_subset(index: Tensor, num_tokens: int, keep: int, seed: int, stream: int | Tensor) -> Tensor:
    """Choose `keep` of `num_tokens` uniformly for each sample, as [B, keep] token numbers in rising order.

    A pure function of (seed, stream, global sample index): the same on any device, with any number of
    processes, and after a resume. `stream` tells the views of a sample apart.
    """
    token = torch.arange(num_tokens, device=index.device)
    column = stream[:, None] if isinstance(stream, Tensor) else stream
    word = (index[:, None] * -7046029254386353131 + seed) ^ _mix(token * 2862933555777941757 + column + 1)
    return _mix(_mix(word)).argsort(dim=1)[:, :keep].sort(dim=1).values


def _mix(word: Tensor) -> Tensor:
    # The finalizer of splitmix64. int64 products wrap around; the shifts must be logical.
    for shift, factor in ((30, -4658895280553007687), (27, -7723592293110705685)):
        word = (word ^ ((word >> shift) & ((1 << (64 - shift)) - 1))) * factor
    return word ^ ((word >> 31) & ((1 << 33) - 1))
