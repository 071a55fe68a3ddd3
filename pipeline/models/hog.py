"""Histograms of oriented gradients as targets, at several cell sizes from one pass over the pixels."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

COLORS = 3
# The length below which a flat cell's histogram is not stretched to 1.
EPS = 1e-12


def hog_targets(images: Tensor, cells: Sequence[int], bins: int = 9) -> list[Tensor]:
    """Return the histograms of images [B, 3, S, S] for each cell size in pixels, as [B, (S / cell)^2, 3 * bins].

    Gradients by Sobel's operator on each color, without a window; each pixel gives its magnitude to the bin of its
    unsigned orientation; cells are averaged, and each histogram of a cell and color has unit length (Section 3.3 of
    Wang et al., 2023). In fp32 at least, since rounding moves pixels between bins: 0.7 % of them in fp16, 1.7 % in
    bf16. Each cell size must divide the next; those of a multiple are averages of the smaller ones.
    """
    histograms: Tensor | None = None
    before, targets = 1, []
    for cell in cells:
        assert cell % before == 0, f"cell sizes must divide each other, got {list(cells)}"
        if histograms is None:
            # On a CPU image by image: its planes then stay in the cache.
            parts = torch.split(images, 1 if images.device.type == "cpu" else len(images))
            histograms = torch.cat([_histograms(part, cell, bins) for part in parts])
        else:
            pooled = F.avg_pool2d(histograms.flatten(1, 2), cell // before)
            histograms = torch.unflatten(pooled, 1, (COLORS, bins))
        before = cell
        # F.normalize does the same, at ten times the time where the dimension is not the last.
        lengths = histograms.square().sum(2, keepdim=True).sqrt()
        targets.append((histograms / lengths.clamp_min(EPS)).flatten(1, 2).flatten(2).transpose(1, 2))
    return targets


def _histograms(images: Tensor, cell: int, bins: int) -> Tensor:
    """Return the mean histograms [B, 3, bins, S / cell, S / cell], not normalized."""
    across, down = _sobel(images.to(torch.promote_types(images.dtype, torch.float32)))
    magnitude = torch.hypot(across, down)
    orientation = (torch.atan2(across, down) / math.pi * bins).floor().remainder(bins).to(torch.int8)
    # Bin by bin: a one-hot tensor of all of them would take nine times the images' memory, and sums by index have no
    # fixed order on a GPU.
    pooled = [F.avg_pool2d(magnitude * (orientation == each).to(magnitude.dtype), cell) for each in range(bins)]
    return torch.stack(pooled, 2)


def _sobel(images: Tensor) -> tuple[Tensor, Tensor]:
    """Return the differences [B, 3, S, S] across and down, left less right and upper less lower; edges are mirrored."""
    padded = F.pad(images, (1, 1, 1, 1), mode="reflect")
    smooth = padded[:, :, :-2] + 2 * padded[:, :, 1:-1] + padded[:, :, 2:]
    across = smooth[..., :-2] - smooth[..., 2:]
    smooth = padded[..., :-2] + 2 * padded[..., 1:-1] + padded[..., 2:]
    down = smooth[:, :, :-2] - smooth[:, :, 2:]
    return across, down
