"""Targets of LocalMIM as its published code makes them: anew for every scale and color. For benchmarks only."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor


def hog_by_scale(images: Tensor, cells: Sequence[int], bins: int = 9) -> list[Tensor]:
    """Return what `hog_targets` does, by one pass over the pixels for each of the scales and colors."""
    return [torch.cat([_histograms(images[:, c : c + 1], cell, bins) for c in range(3)], 2) for cell in cells]


def _histograms(plane: Tensor, cell: int, bins: int) -> Tensor:
    """Return the normalized histograms [B, cells, bins] of one color [B, 1, S, S]."""
    across = torch.tensor([[1.0, 0, -1], [2, 0, -2], [1, 0, -1]], device=plane.device)
    kernel = torch.stack([across, across.T])[:, None]
    gradients = F.conv2d(F.pad(plane.float(), (1, 1, 1, 1), mode="reflect"), kernel)
    magnitude = gradients.norm(dim=1, keepdim=True)
    place = (torch.atan2(gradients[:, :1], gradients[:, 1:]) / math.pi * bins).floor().long() % bins
    # One number a pixel, spread over as many as there are bins.
    spread = torch.zeros(len(plane), bins, *plane.shape[2:], device=plane.device).scatter_(1, place, magnitude)
    return F.normalize(F.avg_pool2d(spread, cell), dim=1).flatten(2).transpose(1, 2)
