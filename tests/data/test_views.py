"""Parameters follow torchvision's laws and depend on nothing but (seed, epoch, sample, view)."""

import itertools
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from scipy.stats import chisquare
from torchvision.transforms import ColorJitter, RandomResizedCrop

from data.views import JITTERS, Column, ViewSpec, center_view, draw

N = 8000


def rows(spec: ViewSpec, height: int = 375, width: int = 500, n: int = N, **place: Any) -> NDArray[np.float32]:
    place = {"seed": 1, "view": 0, "epoch": np.zeros(n, np.int64), "sample": np.arange(n)} | place
    sizes = [np.full(n, side, np.int64) for side in (height, width)]
    return draw(spec, heights=sizes[0], widths=sizes[1], **place)


def distance(ours: NDArray[Any], theirs: NDArray[Any]) -> float:
    """Return the Kolmogorov-Smirnov distance of two samples."""
    grid = np.sort(np.concatenate([ours, theirs]))
    cdfs = [np.searchsorted(np.sort(each), grid, side="right") / len(each) for each in (ours, theirs)]
    return float(np.abs(cdfs[0] - cdfs[1]).max())


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 333), (64, 64), (40, 400), (400, 40), (1, 9)])
@pytest.mark.parametrize(
    ("scale", "ratio"), [((0.08, 1.0), (3 / 4, 4 / 3)), ((0.05, 0.4), (3 / 4, 4 / 3)), ((0.2, 0.6), (0.5, 0.9))]
)
def test_boxes_follow_the_law_of_torchvision(
    height: int, width: int, scale: tuple[float, float], ratio: tuple[float, float]
) -> None:
    torch.manual_seed(0)
    image = torch.empty(3, height, width)
    count = 4000
    theirs = np.array([RandomResizedCrop.get_params(image, list(scale), list(ratio)) for _ in range(count)], float)
    ours = rows(ViewSpec(32, scale=scale, ratio=ratio), height, width, n=count)[:, : Column.FLIP].astype(float)
    for statistic in (lambda b: b[:, 2] * b[:, 3], lambda b: b[:, 3] / b[:, 2], lambda b: b[:, 0], lambda b: b[:, 1]):
        # Two samples of 4000 from one law differ by more than 0.043 once in a thousand.
        assert distance(statistic(ours), statistic(theirs)) < 0.045


@given(
    height=st.integers(1, 3000),
    width=st.integers(1, 3000),
    crop=st.sampled_from(["random", "center"]),
    scale=st.sampled_from([(0.001, 0.01), (0.08, 1.0), (1.0, 1.0)]),
)
@settings(max_examples=80, deadline=None)
def test_boxes_lie_within_the_image(height: int, width: int, crop: str, scale: tuple[float, float]) -> None:
    top, left, box_height, box_width = rows(ViewSpec(8, crop=crop, scale=scale), height, width, n=64)[:, :4].T
    assert (top >= 0).all()
    assert (left >= 0).all()
    assert (box_height >= 1).all()
    assert (box_width >= 1).all()
    assert (top + box_height <= height).all()
    assert (left + box_width <= width).all()


def test_color_follows_the_law_of_torchvision() -> None:
    spec = ViewSpec(32, jitter=(0.4, 0.3, 0.2, 0.1), jitter_probability=1.0)
    torch.manual_seed(0)
    jitter = ColorJitter(0.4, 0.3, 0.2, 0.1)
    theirs = np.array(
        [
            ColorJitter.get_params(jitter.brightness, jitter.contrast, jitter.saturation, jitter.hue)[1:]
            for _ in range(N)
        ]
    )
    ours = rows(spec)[:, Column.BRIGHTNESS : Column.GRAYSCALE] / np.array([1, 1, 1, 360])
    for k in range(4):
        assert distance(ours[:, k], theirs[:, k]) < 0.032  # one in a thousand at 8000


def test_probabilities_and_ranges() -> None:
    spec = ViewSpec(32, flip=0.3, jitter_probability=0.7, grayscale=0.25, blur=0.6, solarize=0.15)
    drawn = rows(spec)
    shares = {Column.FLIP: 0.3, Column.JITTER: 0.7, Column.GRAYSCALE: 0.25, Column.SIGMA: 0.6, Column.SOLARIZE: 0.15}
    for column, share in shares.items():
        assert np.mean(drawn[:, column] > 0) == pytest.approx(share, abs=0.02)  # over 3.5 standard errors
    sigma = drawn[drawn[:, Column.SIGMA] > 0, Column.SIGMA]
    assert distance(sigma, np.linspace(0.1, 2.0, 5000)) < 0.035
    still = drawn[drawn[:, Column.JITTER] == 0, Column.BRIGHTNESS : Column.GRAYSCALE]
    assert (still == [1, 1, 1, 0]).all()


def test_every_order_of_the_jitter_is_as_likely() -> None:
    """As in torchvision's ColorJitter, which permutes its four operators."""
    drawn = rows(ViewSpec(32, jitter_probability=1.0))[:, Column.FIRST :]
    orders, counts = np.unique(drawn, axis=0, return_counts=True)
    assert sorted(map(tuple, orders)) == sorted(itertools.permutations(JITTERS))
    assert chisquare(counts).pvalue > 1e-3


def test_the_order_depends_on_nothing_else() -> None:
    drawn = rows(ViewSpec(32, jitter_probability=1.0, blur=0.5, solarize=0.5, grayscale=0.5))
    others = [Column.HEIGHT, *range(Column.BRIGHTNESS, Column.FIRST)]
    correlation = np.corrcoef(drawn[:, [*others, *range(Column.FIRST, len(Column))]].T)
    assert np.abs(correlation[: len(others), len(others) :]).max() < 0.05


def test_columns_are_uncorrelated() -> None:
    spec = ViewSpec(32, jitter_probability=1.0, blur=0.5, solarize=0.5, grayscale=0.5)
    drawn = rows(spec)
    # The parts of a box depend on each other, and so do those of an order.
    random = [Column.HEIGHT, Column.FLIP, *range(Column.BRIGHTNESS, Column.FIRST)]
    correlation = np.corrcoef(drawn[:, random].T) - np.eye(len(random))
    assert np.abs(correlation).max() < 0.05


def test_every_part_of_the_place_matters_and_nothing_else() -> None:
    spec = ViewSpec(32, blur=0.5)
    base = rows(spec, n=50)
    assert (rows(spec, n=50) == base).all()
    for other in ({"seed": 2}, {"view": 1}, {"epoch": np.ones(50, np.int64)}, {"sample": np.arange(1, 51)}):
        assert np.mean(rows(spec, n=50, **other) == base) < 0.4  # flags agree by chance, numbers do not
    some = np.array([31, 7, 7, 12])
    picked = rows(spec, n=4, sample=some, epoch=np.zeros(4, np.int64))
    assert (picked == base[some]).all()


def test_views_with_the_same_numbers_differ_only_where_their_specs_do() -> None:
    plain, solarized = rows(ViewSpec(32)), rows(ViewSpec(32, solarize=0.5))
    same = [column for column in Column if column != Column.SOLARIZE]
    assert (plain[:, same] == solarized[:, same]).all()
    assert (plain[:, Column.SOLARIZE] != solarized[:, Column.SOLARIZE]).any()


@pytest.mark.parametrize(("height", "width"), [(375, 500), (500, 375), (48, 48)])
def test_center_view_is_deterministic(height: int, width: int) -> None:
    drawn = rows(center_view(224), height, width, n=20)
    side = round(0.875 * min(height, width))
    box = [(height - side) // 2, (width - side) // 2, side, side]
    neutral = [0, 0, 1, 1, 1, 0, 0, 0, 0, *JITTERS]
    assert (drawn == box + neutral).all()
