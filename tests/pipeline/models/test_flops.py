"""Counted FLOPs of a ViT-B at 240 pixels against token counts, over the paper's grid of 30 cells. Nothing is computed.

A cell's cost is taken to be its share of the uncompressed tokens, class token included. Two parts of a forward are not
proportional to tokens:

- attention's products of queries, keys and values grow with the square of the length: 4.6 % of the uncompressed
  forward, next to nothing of a short one, so that a short one costs up to 4.2 % less than its share;
- projecting patches costs what the covered pixels cost: larger patches project all of them for fewer tokens, so that
  at 48 pixels, where it is 5.6 % of the forward, cells cost up to 0.9 % more than their share.

With both, the count is explained to the last FLOP, and no cell is more than 6 % from its share. Resizing the master
kernel is left out: it is done once a step (2.7 GFLOP at 48 pixels), not once an image.
"""

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.models.vit import ViT, ViTConfig

SIZE, PATCH, WIDTH, DEPTH = 240, 16, 768, 12


@pytest.fixture(scope="module")
def vit() -> ViT:
    with torch.device("meta"):
        return ViT(ViTConfig("vit_base_patch16_224", SIZE, PATCH), seed=0)


def flops_of_an_image(vit: ViT, cell: Compression) -> int:
    def count(batch: int) -> int:
        with torch.device("meta"), torch.no_grad(), FlopCounterMode(display=False) as counter:
            vit(torch.empty(batch, 3, SIZE, SIZE), cell, torch.arange(batch))
        return counter.get_total_flops()

    return count(2) - count(1)


def explained(cell: Compression) -> int:
    length = cell.sequence_length(SIZE, PATCH)
    linear = DEPTH * length * 2 * 12 * WIDTH**2
    attention = DEPTH * 2 * 2 * length**2 * WIDTH
    projection = 2 * (length - 1) * 3 * cell.patch_size(PATCH) ** 2 * WIDTH
    return linear + attention + projection


@pytest.mark.parametrize("patch_size", [16, 20, 24, 30, 40, 48])
@pytest.mark.parametrize("dropout", [0.0, 0.25, 0.5, 0.75, 0.9])
def test_a_cell_costs_its_share_of_the_tokens(vit: ViT, patch_size: int, dropout: float) -> None:
    cell, whole = compression(patch_size, dropout), Compression()
    counted = flops_of_an_image(vit, cell)
    assert counted == explained(cell)
    share = cell.sequence_length(SIZE, PATCH) / whole.sequence_length(SIZE, PATCH)
    assert counted / flops_of_an_image(vit, whole) == pytest.approx(share, rel=0.06)
