"""Views against torchvision's v2 on uint8 tensors, with the same parameter rows. Differences in gray levels.

The bounds are those that `data.dali` states, with a little room; some images at a time, at 96 pixels.
"""

import io
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.v2.functional as F
from numpy.typing import NDArray
from PIL import Image
from scipy.stats import ks_2samp
from torchvision.transforms import InterpolationMode

from data.dali import COLORS, MEAN, STD, Encoded, ViewPipeline
from data.dali.pixels import InterleavedPixels
from data.recipes import dino_views, localmim_views, moco_views, simclr_views
from data.views import JITTERS, Column, ViewSpec, center_view, draw

SIZE = 96
Pictures = list[NDArray[np.uint8]]
Rows = NDArray[np.float32]
Pixels = torch.Tensor
MODES = {"bilinear": InterpolationMode.BILINEAR, "bicubic": InterpolationMode.BICUBIC}
EVERYTHING = ViewSpec(SIZE, blur=0.5, solarize=0.5)


def decode(encoded: NDArray[np.uint8]) -> Pixels:
    return F.pil_to_tensor(Image.open(io.BytesIO(encoded.tobytes())).convert("RGB"))


def png(pixels: Pixels) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    F.to_pil_image(pixels).save(buffer, "PNG")
    return np.frombuffer(buffer.getvalue(), np.uint8)


def cut_square(encoded: Pictures, size: int) -> Pictures:
    """Return images at exactly the size of a view, without loss, so that the resize has nothing to do."""
    return [png(F.center_crop(F.resize(decode(each), [size]), [size, size])) for each in encoded]


@pytest.fixture(scope="module")
def squares(pictures: Pictures) -> Pictures:
    return cut_square(pictures, SIZE)


def whole(encoded: Pictures, **columns: float) -> Rows:
    """Return rows that take the whole image and change nothing but the given columns."""
    rows = np.zeros((len(encoded), len(Column)), np.float32)
    rows[:, [Column.HEIGHT, Column.WIDTH]] = [decode(each).shape[1:] for each in encoded]
    rows[:, [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 1
    rows[:, Column.FIRST :] = JITTERS
    for name, value in columns.items():
        rows[:, Column[name.upper()]] = value
    return rows


def drawn(encoded: Pictures, spec: ViewSpec, epoch: int = 0) -> Rows:
    sizes = np.array([decode(each).shape[1:] for each in encoded])
    ids = np.arange(len(encoded))
    return draw(spec, seed=3, epoch=0 * ids + epoch, sample=ids, view=0, heights=sizes[:, 0], widths=sizes[:, 1])


def render(encoded: Pictures, spec: ViewSpec, rows: Rows, color: str) -> NDArray[np.float64]:
    """Return the views in gray levels [n, S, S, 3]."""
    tags, cpu = np.arange(len(encoded))[:, None], torch.device("cpu")
    source = iter([Encoded(encoded, (rows,), tags)]).__next__
    pipeline = ViewPipeline([spec], source, batch_size=len(encoded), device=cpu, threads=2, color=color)
    (view,), _ = next(pipeline)
    pipeline.close()
    return view.permute(0, 2, 3, 1).numpy().astype(float) * STD + MEAN


def stacked(views: list[Pixels]) -> NDArray[np.float64]:
    return torch.stack(views).permute(0, 2, 3, 1).numpy().astype(float)


def blurred(pixels: Pixels, sigma: float) -> Pixels:
    return F.gaussian_blur(pixels, [23, 23], [sigma, sigma])


OPERATORS: dict[int, Callable[[Pixels, float], Pixels]] = {
    Column.BRIGHTNESS: F.adjust_brightness,
    Column.CONTRAST: F.adjust_contrast,
    Column.SATURATION: F.adjust_saturation,
    Column.HUE: lambda pixels, degrees: F.adjust_hue(pixels, degrees / 360),
}


def torchvision_view(pixels: Pixels, spec: ViewSpec, row: Rows) -> Pixels:
    box = [int(number) for number in row[: Column.FLIP]]
    mode = MODES[spec.interpolation]
    view = F.resized_crop(pixels, *box, [spec.size, spec.size], interpolation=mode, antialias=True)
    for column in row[Column.FIRST :].astype(int) if row[Column.JITTER] else []:
        view = OPERATORS[column](view, float(row[column]))
    view = F.rgb_to_grayscale(view, 3) if row[Column.GRAYSCALE] else view
    view = blurred(view, float(row[Column.SIGMA])) if row[Column.SIGMA] else view
    view = F.solarize(view, 128) if row[Column.SOLARIZE] else view
    return F.hflip(view) if row[Column.FLIP] else view


# Name, columns, reference, largest mean difference of exact and of fused colors. A single one is a level at most.
OPS: list[tuple[str, dict[str, float], Callable[[Pixels], Pixels], float, float]] = [
    ("decode", {}, lambda p: p, 1e-3, 1e-3),
    ("flip", {"flip": 1}, F.hflip, 1e-3, 1e-3),
    ("solarize", {"solarize": 1}, lambda p: F.solarize(p, 128), 1e-3, 1e-3),
    ("darker", {"jitter": 1, "brightness": 0.6}, lambda p: F.adjust_brightness(p, 0.6), 0.02, 0.02),
    ("brighter", {"jitter": 1, "brightness": 1.37}, lambda p: F.adjust_brightness(p, 1.37), 0.02, 0.02),
    ("flatter", {"jitter": 1, "contrast": 0.6}, lambda p: F.adjust_contrast(p, 0.6), 0.1, 0.4),
    ("steeper", {"jitter": 1, "contrast": 1.4}, lambda p: F.adjust_contrast(p, 1.4), 0.1, 0.4),
    ("paler", {"jitter": 1, "saturation": 0.8}, lambda p: F.adjust_saturation(p, 0.8), 0.2, 0.7),
    ("stronger", {"jitter": 1, "saturation": 1.2}, lambda p: F.adjust_saturation(p, 1.2), 0.2, 0.7),
    ("grayscale", {"grayscale": 1}, lambda p: F.rgb_to_grayscale(p, 3), 0.01, 0.7),
    ("blur", {"sigma": 1.3}, lambda p: blurred(p, 1.3), 0.2, 0.2),
    ("little blur", {"sigma": 0.5}, lambda p: blurred(p, 0.5), 0.25, 0.25),
    ("no blur", {"sigma": 0.1}, lambda p: p, 1e-3, 1e-3),
]


@pytest.mark.parametrize("color", COLORS)
@pytest.mark.parametrize(("columns", "reference", "exact", "fused"), [op[1:] for op in OPS], ids=[op[0] for op in OPS])
def test_each_op_is_that_of_torchvision(
    squares: Pictures, color: str, columns: dict[str, float], reference: Any, exact: float, fused: float
) -> None:
    ours = render(squares, EVERYTHING, whole(squares, **columns), color)
    apart = np.abs(ours - stacked([reference(decode(each)) for each in squares]))
    assert apart.mean() < (exact if color == "exact" else fused)
    assert apart.max() < 1.01


@pytest.mark.parametrize(
    ("turns", "strength", "size"),
    [
        (-0.1, 0.1, SIZE),
        (0.03, 0.1, SIZE),
        (0.1, 0.1, SIZE),
        (0.2, 0.2, SIZE),
        (-0.45, 0.5, SIZE),
        # Large planes are computed eight levels at a time where their number allows it.
        (0.1, 0.1, 128),
        (-0.2, 0.2, 128),
        (0.1, 0.1, 129),
    ],
)
def test_exact_hue_is_that_of_torchvision(pictures: Pictures, turns: float, strength: float, size: int) -> None:
    spec = replace(EVERYTHING, size=size, jitter=(0.4, 0.4, 0.2, strength))
    squares = cut_square(pictures, size)
    ours = render(squares, spec, whole(squares, jitter=1, hue=360 * turns), "exact")
    apart = np.abs(ours - stacked([F.adjust_hue(decode(each), turns) for each in squares]))
    passes = np.ceil(6 * strength)
    assert apart.mean() < 0.12 * passes
    assert apart.max() < passes + 0.01


def rotated_in_yiq(pixels: Pixels, degrees: float) -> NDArray[np.float64]:
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    levels = stacked([pixels])[0] @ (np.linalg.inv(to_yiq) @ turn @ to_yiq).T
    return np.clip(np.rint(levels), 0, 255)


def test_fused_hue_turns_chroma_the_way_torchvision_does(squares: Pictures) -> None:
    """The models differ (YIQ, HSV), but the changes they make point the same way."""
    before = stacked([decode(each) for each in squares])
    for turns in (-0.1, 0.1):
        ours = render(squares, EVERYTHING, whole(squares, jitter=1, hue=360 * turns), "fused")
        in_yiq = np.stack([rotated_in_yiq(decode(each), 360 * turns) for each in squares])
        assert np.abs(ours - in_yiq).mean() < 0.01
        theirs = stacked([F.adjust_hue(decode(each), turns) for each in squares])
        assert np.corrcoef((ours - before).ravel(), (theirs - before).ravel())[0, 1] > 0.4


@pytest.mark.parametrize("color", COLORS)
def test_grayscale_leaves_no_trace_of_color(squares: Pictures, color: str) -> None:
    rows = whole(squares, jitter=1, hue=20, saturation=1.3, brightness=1.3, grayscale=1)
    gray = np.rint(render(squares, EVERYTHING, rows, color))
    assert (gray == gray[..., :1]).all()


RECIPES = {
    "moco, first": moco_views(SIZE)[0],
    "moco, second": moco_views(SIZE)[1],
    "simclr": simclr_views(SIZE)[0],
    "dino, first": dino_views(SIZE)[0],
    "dino, second": dino_views(SIZE)[1],
    "dino, small": dino_views(SIZE, small_size=48)[2],
    "localmim": localmim_views(SIZE)[0],
}


@pytest.mark.parametrize("spec", RECIPES.values(), ids=RECIPES.keys())
def test_whole_exact_views_are_those_of_torchvision(pictures: Pictures, spec: ViewSpec) -> None:
    rows = drawn(pictures, spec)
    theirs = stacked([torchvision_view(decode(p), spec, row) for p, row in zip(pictures, rows, strict=True)])
    per_image = np.abs(render(pictures, spec, rows, "exact") - theirs).mean(axis=(1, 2, 3))
    assert per_image.mean() < 0.4
    assert per_image.max() < 1.0


@pytest.mark.parametrize("spec", RECIPES.values(), ids=RECIPES.keys())
def test_whole_fused_views_are_near_those_of_torchvision_but_for_the_hue(pictures: Pictures, spec: ViewSpec) -> None:
    spec = replace(spec, jitter=(*spec.jitter[:3], 0.0))
    rows = drawn(pictures, spec)
    theirs = stacked([torchvision_view(decode(p), spec, row) for p, row in zip(pictures, rows, strict=True)])
    per_image = np.abs(render(pictures, spec, rows, "fused") - theirs).mean(axis=(1, 2, 3))
    assert np.median(per_image) < 0.7
    assert per_image.mean() < 1.0


def statistics(view: NDArray[np.float64]) -> list[float]:
    levels = np.rint(view)
    luma = levels @ np.array([0.299, 0.587, 0.114])
    chroma = np.abs(levels - luma[..., None]).mean()
    shares = [(levels >= 250).mean(), (levels <= 5).mean()]
    return [luma.mean(), luma.std(), chroma, *shares, np.abs(np.diff(luma)).mean(), np.ptp(levels, axis=-1).mean()]


def test_fused_views_have_the_statistics_of_exact_ones(photographs: Pictures) -> None:
    spec = ViewSpec(48, blur=0.5)
    both = []
    for color in ("fused", "exact"):
        views = np.concatenate([render(photographs, spec, drawn(photographs, spec, k), color) for k in range(4)])
        both.append(np.array([statistics(view) for view in views]))
    # Two independent samples of 512 differ by more than 0.1 once in a hundred; here the draws are the same.
    assert max(ks_2samp(ours, theirs).statistic for ours, theirs in zip(both[0].T, both[1].T, strict=True)) < 0.06


@pytest.mark.parametrize("color", COLORS)
def test_both_arrangements_of_pixels_make_the_same_views(
    drawn_pictures: Pictures, color: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What the GPU does, done on the CPU."""
    spec = replace(moco_views(SIZE)[1], blur=0.5, solarize=0.0)
    pictures = drawn_pictures * 5
    rows = drawn(pictures, spec)
    planar = render(pictures, spec, rows, color)
    monkeypatch.setattr("data.dali.view.PlanarPixels", lambda size: InterleavedPixels())
    apart = np.abs(render(pictures, spec, rows, color) - planar)
    assert apart.mean() < 0.2
    assert np.percentile(apart, 99.9) < 3


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
@pytest.mark.parametrize("color", COLORS)
def test_crop_and_resize_are_those_of_torchvision(pictures: Pictures, interpolation: str, color: str) -> None:
    spec = ViewSpec(SIZE, interpolation=interpolation, jitter_probability=0.0, grayscale=0.0)
    rows = drawn(pictures, spec)
    theirs = stacked([torchvision_view(decode(p), spec, row) for p, row in zip(pictures, rows, strict=True)])
    apart = np.abs(render(pictures, spec, rows, color) - theirs)
    assert apart.mean() < 0.3
    assert np.percentile(apart[:, 2:-2, 2:-2], 99) < 1.6


def test_center_view_is_resize_and_center_crop(pictures: Pictures) -> None:
    spec = center_view(SIZE)
    ours = render(pictures, spec, drawn(pictures, spec), "fused")
    for picture, view in zip(pictures, ours, strict=True):
        resized = F.resize(decode(picture), [round(SIZE / 0.875)], InterpolationMode.BICUBIC)
        theirs = stacked([F.center_crop(resized, [SIZE, SIZE])])[0]
        # Up to a pixel of shift, since torchvision cuts after the resize: alike, not equal.
        assert np.corrcoef(view.ravel(), theirs.ravel())[0, 1] > 0.9
