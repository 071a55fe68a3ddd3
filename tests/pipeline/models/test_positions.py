"""Positions: MoCo-v3's table and PyTorch's own interpolation as references."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from pipeline.models.positions import resize_positions, sincos_positions


def test_positions_at_the_base_grid_are_moco_v3s_table() -> None:
    grid, dim = 14, 32
    table = sincos_positions(grid, grid, dim, torch.device("cpu"), torch.float64)
    for patch, channel_block, coordinate in ((17, 0, 1), (17, 2, 3), (100, 0, 7), (100, 2, 2)):
        for k in range(dim // 4):
            angle = coordinate / 10000 ** (k / (dim // 4))
            sine, cosine = table[patch, channel_block * 8 + k], table[patch, (channel_block + 1) * 8 + k]
            assert float(sine) == pytest.approx(np.sin(angle))
            assert float(cosine) == pytest.approx(np.cos(angle))


def test_a_position_means_the_same_place_at_every_patch_size() -> None:
    # The center of a 3 x 3 grid is the center of a 15 x 15 grid.
    coarse = sincos_positions(3, 15, 32, torch.device("cpu"), torch.float64)
    fine = sincos_positions(15, 15, 32, torch.device("cpu"), torch.float64)
    torch.testing.assert_close(coarse[4], fine[7 * 15 + 7])
    torch.testing.assert_close(coarse[0], fine[2 * 15 + 2])


def test_a_small_view_is_stretched_over_the_base_grid() -> None:
    # 6 x 6 patches of a 96-pixel crop over 14 x 14: the first center lies at (0 + 0.5) * 14 / 6 - 0.5 = 2 / 3.
    table = sincos_positions(6, 14, 32, torch.device("cpu"), torch.float64)
    assert float(table[0, 0]) == pytest.approx(np.sin(2 / 3))
    assert float(table[5, 16]) == pytest.approx(np.sin(14 - 2 / 3 - 1))


@pytest.mark.parametrize("grid", [3, 4, 7, 9])
def test_learned_positions_are_interpolated_bicubically(grid: int) -> None:
    torch.manual_seed(grid)
    positions = torch.randn(36, 5, dtype=torch.float64)
    image = positions.T.reshape(1, 5, 6, 6)
    want = F.interpolate(image, size=(grid, grid), mode="bicubic", align_corners=False)[0].flatten(1).T
    torch.testing.assert_close(resize_positions(positions, grid), want, atol=1e-12, rtol=0)


def test_learned_positions_are_themselves_at_their_own_grid() -> None:
    positions = torch.randn(36, 4)
    assert resize_positions(positions, 6) is positions


def test_learned_positions_mean_base_grid_coordinates_as_fixed_ones_do() -> None:
    # Bicubic interpolation reproduces a straight line away from the border: the coordinate of each patch itself.
    rows = torch.arange(12, dtype=torch.float64).repeat_interleave(12)[:, None]
    resized = resize_positions(rows, 4).reshape(4, 4)
    for i in (1, 2):
        assert float(resized[i, 1]) == pytest.approx((i + 0.5) * 12 / 4 - 0.5, abs=1e-12)


def test_half_precision_positions_are_resized_in_fp32() -> None:
    positions = torch.randn(36, 4).bfloat16()
    resized = resize_positions(positions, 4)
    assert resized.dtype == torch.float32
    torch.testing.assert_close(resized, resize_positions(positions.double(), 4).float(), atol=1e-6, rtol=0)


def test_resizing_sends_a_gradient_to_every_position() -> None:
    positions = torch.randn(36, 2, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda p: resize_positions(p, 4), positions)
