"""The algebra of color and blur against pixels changed op by op in float, without clipping."""

import itertools

import numpy as np
import pytest
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter1d

from data.color import (
    CHANNELS,
    EXACT_STEPS,
    LUMA,
    TONE,
    Parameters,
    blur_kernels,
    exact_parameters,
    fused_parameters,
    positions,
)
from data.views import JITTERS, Column, ViewSpec, draw

ORDERS = list(itertools.permutations(JITTERS))
TO_YIQ = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])


def rows(count: int = 400, **fields: float) -> NDArray[np.float32]:
    """Return drawn rows, all of them jittered."""
    sides, ids = np.full(count, 100), np.arange(count)
    spec = ViewSpec(32, jitter_probability=1.0, **fields)  # type: ignore[arg-type]
    return draw(spec, seed=0, epoch=0 * ids, sample=ids, view=0, heights=sides, widths=sides)


def jittered(pixels: NDArray[np.float64], row: NDArray[np.float32]) -> NDArray[np.float64]:
    """Change pixels [n, 3] op by op in the drawn order."""
    for column in row[Column.FIRST :].astype(int):
        factor = float(row[column])
        luma = pixels @ np.array(LUMA)
        if column == Column.BRIGHTNESS:
            pixels = factor * pixels
        elif column == Column.CONTRAST:
            pixels = factor * pixels + (1 - factor) * luma.mean()
        elif column == Column.SATURATION:
            pixels = factor * pixels + (1 - factor) * luma[:, None]
        else:
            c, s = np.cos(np.radians(factor)), np.sin(np.radians(factor))
            turn = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
            pixels = pixels @ (np.linalg.inv(TO_YIQ) @ turn @ TO_YIQ).T
    return pixels


def tones(parameters: Parameters) -> NDArray[np.float64]:
    """Return the four tones of each row, [n, 4, len(TONE)]."""
    return np.stack([[parameters[f"{name} {k}"] for name in TONE] for k in range(4)]).transpose(2, 0, 1)


def mixing(parameters: Parameters) -> NDArray[np.float64]:
    """Return the weights of each row, [n, 3, 3], or [n, 3, 4] with the levels that are added."""
    return np.stack([parameters[name] for name in CHANNELS], axis=1)


def steps(parameters: Parameters) -> list[list[Column]]:
    """Return the steps that each row takes."""
    taken = np.stack([parameters[f"step {number}"] for number in range(len(EXACT_STEPS))], axis=1)
    return [[step for step, on in zip(EXACT_STEPS, row, strict=True) if on] for row in taken]


def test_fused_parameters_are_the_whole_jitter_in_any_order() -> None:
    drawn = rows(grayscale=0.3)
    assert len(np.unique(drawn[:, Column.FIRST :], axis=0)) == 24
    pixels = np.random.default_rng(0).uniform(0, 255, (50, 3))
    found = fused_parameters(drawn)
    for row, luma, matrix, changes in zip(drawn, found["luma"], mixing(found), tones(found), strict=True):
        mean, ours = (pixels @ luma).mean(), pixels
        for number, (brightness, contrast, center, _) in enumerate(changes):
            if number == 2:
                ours = ours @ matrix.T
            ours = brightness * (center * mean + contrast * (ours - center * mean))
        theirs = jittered(pixels, row)
        if row[Column.GRAYSCALE]:
            theirs = np.repeat((theirs @ np.array(LUMA))[:, None], 3, axis=1)
        assert np.abs(ours - theirs).max() < 0.01


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(c.name[0] for c in order))
def test_brightness_and_contrast_keep_their_place_around_the_hue(order: tuple[Column, ...]) -> None:
    row = rows(1)
    row[:, Column.FIRST :] = order
    (found,) = tones(fused_parameters(row))
    acting = [number for number in range(4) if found[number, 3] < 0]
    kinds = [Column.BRIGHTNESS if found[number, 0] != 1 else Column.CONTRAST for number in acting]
    kept = [column for column in order if column != Column.SATURATION]
    assert kinds == [column for column in kept if column != Column.HUE]
    assert sum(number < 2 for number in acting) == kept.index(Column.HUE)


def test_every_operator_takes_its_truncation_off_once() -> None:
    shifts = tones(fused_parameters(rows()))[:, :, TONE.index("shift")]
    assert np.allclose(shifts.sum(axis=1), -0.49 * 3)  # brightness, contrast, saturation
    still = rows(jitter=(0.0, 0.0, 0.0, 0.0), grayscale=0.0)
    assert (tones(fused_parameters(still))[:, :, TONE.index("shift")] == 0).all()


def test_positions_invert_the_order() -> None:
    drawn = rows()
    for row, places in zip(drawn, positions(drawn), strict=True):
        assert [row[Column.FIRST + place] for place in places] == list(JITTERS)


def test_exact_saturation_blends_with_the_luma() -> None:
    drawn = rows(20)
    matrices = mixing(exact_parameters(drawn, 1))
    gray, factor = np.array([0.2989, 0.587, 0.114]), drawn[:, Column.SATURATION, None, None]
    assert np.allclose(matrices[..., :3], factor * np.eye(3) + (1 - factor) * gray, atol=1e-6)
    # The luma that is mixed in loses half a level by truncation in the mean, the result not quite half a level.
    assert np.allclose(matrices[..., 3:], -0.49 - 0.5 * (1 - factor), atol=1e-6)


@pytest.mark.parametrize("order", ORDERS, ids=lambda order: "".join(c.name[0] for c in order))
def test_every_order_is_found_among_the_exact_steps(order: tuple[Column, ...]) -> None:
    drawn = rows(2)
    drawn[:, Column.FIRST :] = order
    drawn[1, Column.JITTER] = 0
    assert steps(exact_parameters(drawn, 1)) == [list(order), []]


def test_each_row_takes_the_steps_of_its_own_order() -> None:
    drawn = rows()
    assert steps(exact_parameters(drawn, 1)) == drawn[:, Column.FIRST :].tolist()


@pytest.mark.parametrize("passes", [1, 2])
def test_passes_of_the_exact_hue_add_up(passes: int) -> None:
    drawn = rows(20)
    found = exact_parameters(drawn, passes)
    turned = np.where(found["backwards"], -60.0, 60.0) * passes * found["sixths"]
    assert np.allclose(turned, drawn[:, Column.HUE], atol=1e-4)


def test_kernels_are_gaussians_of_their_sigma() -> None:
    drawn = rows(blur=0.7)
    for sigma, kernel in zip(drawn[:, Column.SIGMA].astype(float), blur_kernels(drawn), strict=True):
        radius = len(kernel) // 2
        assert radius >= 3 * sigma
        peak = np.eye(1, len(kernel), radius)[0]
        assert np.allclose(kernel, gaussian_filter1d(peak, sigma, radius=radius, mode="constant") if sigma else 1)
    assert len(blur_kernels(rows(3))[0]) == 1
