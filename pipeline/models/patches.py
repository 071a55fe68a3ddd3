"""Patches of any size from one master kernel."""

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
    # Kept for the whole process: not on a device that happens to be the default, such as the meta device of a plan.
    basis = torch.eye(base * base, dtype=torch.float64, device="cpu").reshape(base * base, 1, base, base)
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
