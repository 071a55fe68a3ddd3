"""Where patches lie: positions on any grid, the same place at every patch size."""

from __future__ import annotations

import math
from enum import Enum
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

from pipeline.distributed import at_least_fp32


class Positions(Enum):
    """What tells tokens where they come from."""

    # The fixed table of MoCo-v3; the class token has position zero.
    sincos = "sincos"
    # A parameter, as timm has it and as DINO, DeiT and CLIP train it.
    learned = "learned"


@lru_cache(maxsize=64)
def sincos_positions(grid: int, base_grid: int, dim: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    """Return fixed positions [grid^2, dim] for a square grid of patches.

    The 2-D sine-cosine table of MoCo-v3, evaluated where the patch centers lie on the base grid, so that a
    position means the same place of the view at every patch size and resolution.
    """
    coordinate = (torch.arange(grid, dtype=torch.float64, device="cpu") + 0.5) * base_grid / grid - 0.5
    frequency = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64, device="cpu") / (dim // 4))
    angle = coordinate[:, None] * frequency
    row = angle.repeat_interleave(grid, 0)
    column = angle.repeat(grid, 1)
    return torch.cat([row.sin(), row.cos(), column.sin(), column.cos()], 1).to(device, dtype)


def resize_positions(positions: Tensor, grid: int) -> Tensor:
    """Resize learned positions [base^2, D] to [grid^2, D] in fp32 at least; the identity at their own grid.

    Bicubic interpolation without antialias at the same base-grid coordinates as `sincos_positions`.
    """
    positions = at_least_fp32(positions)
    base = math.isqrt(len(positions))
    if grid == base:
        return positions
    # As a matrix, since the backward of F.interpolate adds up in no fixed order on a GPU.
    return _bicubic_matrix(base, grid, positions.device, positions.dtype) @ positions


@lru_cache(maxsize=64)
def _bicubic_matrix(base: int, grid: int, device: torch.device, dtype: torch.dtype) -> Tensor:
    basis = torch.eye(base * base, dtype=torch.float64, device="cpu").reshape(base * base, 1, base, base)
    resized = F.interpolate(basis, size=(grid, grid), mode="bicubic", align_corners=False, antialias=False)
    return resized.reshape(base * base, grid * grid).T.contiguous().to(device, dtype)
