"""Flexible patches: resized kernels, positions, chosen tokens."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from scipy.stats import chi2

from pipeline.models.patches import (
    random_subset,
    resize_kernel,
    resize_matrix,
    sincos_positions,
    take_patches,
)


def upscaled(patch: torch.Tensor, size: int) -> torch.Tensor:
    return F.interpolate(patch, size=(size, size), mode="bilinear", align_corners=False, antialias=False)


@pytest.mark.parametrize("size", [20, 24, 30, 40, 48])
def test_embedding_of_an_upscaled_patch_is_the_originals(size: int) -> None:
    torch.manual_seed(size)
    kernel = torch.randn(7, 3, 16, 16, dtype=torch.float64)
    patch = torch.randn(5, 3, 16, 16, dtype=torch.float64)
    want = torch.einsum("bcij,dcij->bd", patch, kernel)

    def embed(k: torch.Tensor) -> torch.Tensor:
        return torch.einsum("bcij,dcij->bd", upscaled(patch, size), k)

    assert (embed(resize_kernel(kernel, size)) - want).abs().max() < 1e-10
    # The tempting wrong variant, interpolating the kernel itself, is far off.
    assert (embed(upscaled(kernel, size)) - want).abs().max() > 1


def test_downscaling_is_the_least_squares_solution() -> None:
    # pinv of a full-row-rank matrix: resizing the kernel down and the patch down are adjoint inverses.
    matrix = resize_matrix(16, 8).numpy()
    basis = np.eye(256).reshape(256, 1, 16, 16)
    down = upscaled(torch.from_numpy(basis), 8).reshape(256, 64).numpy()
    np.testing.assert_allclose(matrix, np.linalg.pinv(down), atol=1e-10)


def test_the_master_size_is_the_kernel_itself() -> None:
    kernel = torch.randn(2, 3, 16, 16)
    assert resize_kernel(kernel, 16) is kernel


def test_resizing_keeps_a_gradient_to_the_master() -> None:
    kernel = torch.randn(2, 3, 8, 8, requires_grad=True)
    resize_kernel(kernel, 12).sum().backward()
    assert kernel.grad is not None
    assert kernel.grad.abs().sum() > 0


def test_patches_times_kernel_is_a_convolution() -> None:
    images, kernel = torch.randn(2, 3, 24, 24), torch.randn(5, 3, 8, 8)
    want = F.conv2d(images, kernel, stride=8).flatten(2).transpose(1, 2)
    torch.testing.assert_close(take_patches(images, 8, None) @ kernel.flatten(1).T, want, atol=1e-4, rtol=1e-4)


def test_chosen_patches_are_a_selection_of_all() -> None:
    images = torch.randn(3, 3, 32, 32)
    chosen = torch.tensor([[0, 5, 15], [1, 2, 3], [7, 8, 9]])
    everything = take_patches(images, 8, None)
    for i in range(3):
        assert torch.equal(take_patches(images, 8, chosen)[i], everything[i, chosen[i]])


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


def test_subset_is_without_replacement_in_order_and_pure() -> None:
    index = torch.arange(1000, 1064)
    chosen = random_subset(index, 36, 9, seed=3, stream=0)
    assert chosen.shape == (64, 9)
    assert bool((chosen[:, 1:] > chosen[:, :-1]).all())
    assert int(chosen.min()) >= 0
    assert int(chosen.max()) < 36
    assert torch.equal(random_subset(index.flip(0), 36, 9, 3, 0).flip(0), chosen)
    for other in (random_subset(index, 36, 9, 4, 0), random_subset(index, 36, 9, 3, 1)):
        assert (other != chosen).float().mean() > 0.5


def test_every_token_is_kept_equally_often() -> None:
    samples, tokens, keep = 20_000, 25, 6
    chosen = random_subset(torch.arange(samples), tokens, keep, seed=0, stream=1)
    counts = torch.bincount(chosen.flatten(), minlength=tokens).double()
    expected = samples * keep / tokens
    # Counts of a fixed-size subset vary less than multinomial ones: the statistic is bounded by chi2.
    statistic = float(((counts - expected) ** 2 / expected).sum()) / (1 - keep / tokens) * (tokens - 1) / tokens
    assert chi2.ppf(0.0005, tokens - 1) < statistic < chi2.ppf(0.9995, tokens - 1)
    first, second = (torch.zeros(samples, dtype=torch.bool) for _ in range(2))
    first[(chosen == 3).any(1)] = True
    second[(chosen == 4).any(1)] = True
    both = float((first & second).float().mean())
    assert both == pytest.approx(keep * (keep - 1) / tokens / (tokens - 1), abs=0.006)
