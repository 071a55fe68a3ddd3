"""Targets of LocalMIM: against loops over pixels, against scikit-image, and what they must not notice."""

import math

import numpy as np
import pytest
import torch
from skimage.feature import hog as skimage_hog
from torch import Tensor

from pipeline.benchmarks.peers.hog_by_scale import hog_by_scale
from pipeline.models.hog import hog_targets


def literal(image: np.ndarray, cell: int, bins: int) -> np.ndarray:
    """Return the targets [cells, 3 * bins] of one image [3, S, S] by loops over its pixels."""
    size = image.shape[-1]
    kernel = np.array([[1, 0, -1], [2, 0, -2], [1, 0, -1]], dtype=np.float64)
    grid = size // cell
    histogram = np.zeros((grid, grid, 3, bins))
    for color in range(3):
        padded = np.pad(image[color].astype(np.float64), 1, mode="reflect")
        for y in range(size):
            for x in range(size):
                window = padded[y : y + 3, x : x + 3]
                one, two = (window * kernel).sum(), (window * kernel.T).sum()
                place = math.floor(math.atan2(one, two) / math.pi * bins) % bins
                histogram[y // cell, x // cell, color, place] += math.hypot(one, two) / cell**2
    length = np.sqrt((histogram**2).sum(-1, keepdims=True))
    return (histogram / np.maximum(length, 1e-12)).reshape(grid * grid, 3 * bins)


def images(count: int = 2, size: int = 32, seed: int = 0) -> Tensor:
    # Whole numbers, so that no order of sums rounds: at the mirrored edges one difference is zero, and the least
    # rounding would turn its sign, and with it the bin.
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(256, (count, 3, size, size), generator=generator).double()


@pytest.mark.parametrize("bins", [9, 18])
def test_every_scale_is_what_loops_over_pixels_find(bins: int) -> None:
    batch = images()
    for cell, found in zip((4, 8, 16), hog_targets(batch, (4, 8, 16), bins), strict=True):
        expected = np.stack([literal(image.numpy(), cell, bins) for image in batch])
        assert found.shape == (2, (32 // cell) ** 2, 3 * bins)
        np.testing.assert_allclose(found.numpy(), expected, atol=1e-12)


def test_scikit_image_agrees_where_the_definitions_coincide() -> None:
    # f(x) + g(y): smoothing along one axis leaves differences along the other alone, so Sobel's operator is 4 times the
    # central difference. Cells at the edge are left out, where scikit-image has no gradient.
    generator = np.random.default_rng(0)
    plane = generator.random(40)[None, :] + generator.random(40)[:, None]
    # It adds up in fp32. Its angle is that of (down, across), ours of (across, down): that of the transposed image.
    how = {"orientations": 9, "pixels_per_cell": (8, 8), "cells_per_block": (1, 1), "block_norm": "L2"}
    cells = skimage_hog(plane.T, feature_vector=False, **how)
    expected = cells[:, :, 0, 0].transpose(1, 0, 2)
    expected = expected / np.linalg.norm(expected, axis=-1, keepdims=True)
    (found,) = hog_targets(torch.from_numpy(plane).expand(1, 3, 40, 40), (8,))
    ours = found[0, :, :9].reshape(5, 5, 9).numpy()
    np.testing.assert_allclose(ours[1:-1, 1:-1], expected[1:-1, 1:-1], atol=1e-6)


def test_brightness_and_contrast_of_a_color_do_not_matter() -> None:
    batch = images(seed=1)
    gain, offset = torch.tensor([0.25, 3.0, 7.0])[:, None, None], torch.tensor([-1.0, 0.0, 5.0])[:, None, None]
    for one, other in zip(hog_targets(batch, (4, 8)), hog_targets(batch * gain + offset, (4, 8)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-9, rtol=0)


def test_a_cell_and_color_has_unit_length_and_a_flat_one_none() -> None:
    batch = images(1)
    batch[:, 1] = 0.5
    (found,) = hog_targets(batch, (8,))
    lengths = found.unflatten(-1, (3, 9)).norm(dim=-1)
    torch.testing.assert_close(lengths, torch.tensor([1.0, 0.0, 1.0], dtype=torch.float64).expand(1, 16, 3))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_not_computed_in(dtype: torch.dtype) -> None:
    batch = images().to(dtype)
    (found,) = hog_targets(batch, (8,))
    assert found.dtype is torch.float32
    torch.testing.assert_close(found, hog_targets(batch.float(), (8,))[0], atol=0, rtol=0)


def test_one_pass_gives_what_a_pass_for_each_scale_and_color_does() -> None:
    batch = images(size=64).float()
    cells = (4, 8, 16, 32)
    for one, other in zip(hog_targets(batch, cells), hog_by_scale(batch, cells), strict=True):
        torch.testing.assert_close(one, other, atol=1e-5, rtol=0)
