"""DALI's views against torchvision and PIL, op by op, with the same parameter rows. Differences in gray levels."""

import io
import itertools
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torchvision.transforms.functional as F
from numpy.typing import NDArray
from PIL import Image, ImageOps

from data.dali import COLORS, MEAN, STD, Decoding, Encoded, ViewPipeline, build_graph
from data.views import Column, ViewSpec, center_view, draw

PHOTOS = Path(__file__).parents[2] / "../shared/data/photos128.tar"
CPU = torch.device("cpu")
SIZE = 96
Picture = NDArray[np.uint8]
Rows = NDArray[np.float32]


def encode(picture: Image.Image) -> NDArray[np.uint8]:
    buffer = io.BytesIO()
    picture.save(buffer, "JPEG", quality=95)
    return np.frombuffer(buffer.getvalue(), np.uint8)


def drawn_picture(rng: np.random.Generator, height: int, width: int) -> Image.Image:
    """Draw colored clouds with detail at every scale and with black and white in them."""
    levels = np.zeros((height, width, 3))
    for cells in (3, 8, 20, 60):
        noise = Image.fromarray(rng.integers(0, 256, (cells, cells, 3), np.uint8))
        levels += (np.asarray(noise.resize((width, height), Image.Resampling.BICUBIC), float) - 128) / cells**0.3
    return Image.fromarray(np.clip(128 + levels, 0, 255).astype(np.uint8))


@pytest.fixture(scope="module", params=["drawn", "photos"])
def pictures(request: pytest.FixtureRequest) -> list[NDArray[np.uint8]]:
    """Return encoded color and grayscale images of different sizes."""
    if request.param == "drawn":
        rng = np.random.default_rng(0)
        sizes = [(120, 160), (200, 133), (97, 300), (64, 64), (250, 250), (131, 177)]
        return [encode(drawn_picture(rng, *size)) for size in sizes] + [
            encode(drawn_picture(rng, 90, 150).convert("L"))
        ]
    if not PHOTOS.exists():
        pytest.skip("the photographs are not here")
    with tarfile.open(PHOTOS) as tar:
        files = [tar.extractfile(member) for member in tar if member.isfile()]
        return [np.frombuffer(file.read(), np.uint8) for file in files[:24] if file]


@pytest.fixture(scope="module")
def squares(pictures: list[NDArray[np.uint8]]) -> list[NDArray[np.uint8]]:
    """Return the centers at exactly the size of a view, so that the resize has nothing to do."""
    return [encode(ImageOps.fit(decode(picture), (SIZE, SIZE))) for picture in pictures]


def decode(encoded: NDArray[np.uint8]) -> Image.Image:
    return Image.open(io.BytesIO(encoded.tobytes())).convert("RGB")


def whole(encoded: list[NDArray[np.uint8]], **columns: float) -> Rows:
    """Return rows that take the whole image and change nothing but the given columns."""
    rows = np.zeros((len(encoded), len(Column)), np.float32)
    rows[:, [Column.HEIGHT, Column.WIDTH]] = [decode(each).size[::-1] for each in encoded]
    rows[:, [Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION]] = 1
    for name, value in columns.items():
        rows[:, Column[name.upper()]] = value
    return rows


def render(encoded: list[NDArray[np.uint8]], spec: ViewSpec, rows: Rows) -> NDArray[np.float64]:
    """Return the views in gray levels [n, S, S, 3]."""
    tags = np.arange(len(encoded))[:, None]
    source = iter([Encoded(encoded, (rows,), tags)])
    pipeline = ViewPipeline([spec], source.__next__, batch_size=len(encoded), device=CPU, threads=2)
    (view,), _ = next(pipeline)
    return view.permute(0, 2, 3, 1).numpy().astype(float) * STD + MEAN


def everything(size: int = SIZE, **fields: Any) -> ViewSpec:
    return ViewSpec(size, **{"blur": 0.5, "solarize": 0.5} | fields)


def difference(ours: NDArray[np.float64], theirs: list[Image.Image]) -> NDArray[np.float64]:
    return np.abs(ours - np.stack([np.asarray(each, float) for each in theirs]))


def torch_blur(picture: Image.Image, sigma: float) -> Image.Image:
    pixels = torch.from_numpy(np.array(picture)).permute(2, 0, 1)
    return Image.fromarray(F.gaussian_blur(pixels, [23, 23], [sigma]).permute(1, 2, 0).numpy())


def rotate_yiq(picture: Image.Image, degrees: float) -> Image.Image:
    to_yiq = np.array([[0.299, 0.587, 0.114], [0.596, -0.274, -0.322], [0.211, -0.523, 0.312]])
    c, s = np.cos(np.radians(degrees)), np.sin(np.radians(degrees))
    turn = np.array([[1, 0, 0], [0, c, s], [0, -s, c]])
    pixels = np.asarray(picture, float) @ (np.linalg.inv(to_yiq) @ turn @ to_yiq).T
    return Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8))


# name, columns, reference, largest mean and largest single difference in gray levels
OPS = [
    ("decode", {}, lambda p: p, 1e-3, 1e-2),
    ("flip", {"flip": 1}, F.hflip, 1e-3, 1e-2),
    ("neutral jitter", {"jitter": 1}, lambda p: p, 1e-3, 1e-2),
    ("darker", {"jitter": 1, "brightness": 0.6}, lambda p: F.adjust_brightness(p, 0.6), 0.5, 1.01),
    ("brighter", {"jitter": 1, "brightness": 1.4}, lambda p: F.adjust_brightness(p, 1.4), 0.5, 1.01),
    ("flatter", {"jitter": 1, "contrast": 0.6}, lambda p: F.adjust_contrast(p, 0.6), 0.5, 1.01),
    ("steeper", {"jitter": 1, "contrast": 1.4}, lambda p: F.adjust_contrast(p, 1.4), 0.5, 1.01),
    ("paler", {"jitter": 1, "saturation": 0.8}, lambda p: F.adjust_saturation(p, 0.8), 0.5, 1.01),
    ("stronger", {"jitter": 1, "saturation": 1.2}, lambda p: F.adjust_saturation(p, 1.2), 0.5, 1.01),
    ("hue", {"jitter": 1, "hue": 36}, lambda p: rotate_yiq(p, 36), 0.01, 1.01),
    ("grayscale", {"grayscale": 1}, lambda p: F.rgb_to_grayscale(p, 3), 1e-3, 1.01),
    ("solarize", {"solarize": 1}, lambda p: ImageOps.solarize(p, 128), 1e-3, 1e-2),
    ("blur", {"sigma": 1.3}, lambda p: torch_blur(p, 1.3), 0.1, 1.01),
    ("faint blur", {"sigma": 0.1}, lambda p: p, 1e-3, 1e-2),
]


@pytest.mark.parametrize(("columns", "reference", "mean", "most"), [op[1:] for op in OPS], ids=[op[0] for op in OPS])
def test_each_op_is_that_of_torchvision(
    squares: list[NDArray[np.uint8]], columns: dict[str, float], reference: Any, mean: float, most: float
) -> None:
    ours = render(squares, everything(), whole(squares, **columns))
    apart = difference(ours, [reference(decode(each)) for each in squares])
    assert apart.mean() < mean
    assert apart.max() < most


def test_grayscale_leaves_no_trace_of_color(squares: list[NDArray[np.uint8]]) -> None:
    gray = np.rint(render(squares, everything(), whole(squares, jitter=1, hue=20, grayscale=1)))
    assert (gray == gray[..., :1]).all()


def test_hue_turns_the_way_torchvision_turns_it(squares: list[NDArray[np.uint8]]) -> None:
    """The models differ (YIQ, HSV), but the changes they make point the same way."""
    before = np.stack([np.asarray(decode(each), float) for each in squares])
    for turns in (-0.1, 0.1):
        ours = render(squares, everything(), whole(squares, jitter=1, hue=360 * turns)) - before
        theirs = np.stack([np.asarray(F.adjust_hue(decode(each), turns), float) for each in squares]) - before
        assert np.corrcoef(ours.ravel(), theirs.ravel())[0, 1] > 0.4


@pytest.mark.parametrize("interpolation", ["bilinear", "bicubic"])
def test_crop_and_resize_are_those_of_torchvision(pictures: list[NDArray[np.uint8]], interpolation: str) -> None:
    spec = ViewSpec(SIZE, interpolation=interpolation)
    rows, modes = (
        place(pictures, ViewSpec(SIZE)),
        {"bilinear": F.InterpolationMode.BILINEAR, "bicubic": F.InterpolationMode.BICUBIC},
    )
    rows[:, Column.FLIP :] = whole(pictures)[:, Column.FLIP :]
    boxes = rows[:, : Column.FLIP].astype(int).tolist()
    theirs = [
        F.resized_crop(decode(p), *box, [SIZE, SIZE], modes[interpolation])
        for p, box in zip(pictures, boxes, strict=True)
    ]
    apart = difference(render(pictures, spec, rows), theirs)
    assert apart.mean() < 0.25
    assert np.percentile(apart, 99) < 1.6


def place(pictures: list[NDArray[np.uint8]], spec: ViewSpec) -> Rows:
    sizes = np.array([decode(each).size for each in pictures])
    ids = np.arange(len(pictures))
    return draw(spec, seed=3, epoch=0 * ids, sample=ids, view=0, heights=sizes[:, 1], widths=sizes[:, 0])


def reference_view(encoded: NDArray[np.uint8], row: NDArray[np.float32]) -> Image.Image:
    value = {column: float(row[column]) for column in Column}
    box = [int(value[Column(k)]) for k in range(4)]
    view = F.resized_crop(decode(encoded), *box, [SIZE, SIZE], F.InterpolationMode.BILINEAR)
    view = F.adjust_brightness(view, value[Column.BRIGHTNESS])
    view = F.adjust_contrast(view, value[Column.CONTRAST])
    view = F.adjust_saturation(view, value[Column.SATURATION])
    view = F.rgb_to_grayscale(view, 3) if value[Column.GRAYSCALE] else view
    view = torch_blur(view, value[Column.SIGMA]) if value[Column.SIGMA] else view
    view = ImageOps.solarize(view, 128) if value[Column.SOLARIZE] else view
    return F.hflip(view) if value[Column.FLIP] else view


@pytest.mark.parametrize("fields", [{"blur": 1.0}, {"blur": 0.1, "solarize": 0.2}], ids=["first", "second"])
def test_whole_views_without_hue_are_near_those_of_torchvision(
    pictures: list[NDArray[np.uint8]], fields: dict[str, float]
) -> None:
    spec = ViewSpec(SIZE, jitter=(0.4, 0.4, 0.2, 0.0), **fields)
    rows = place(pictures, spec)
    theirs = [reference_view(each, row) for each, row in zip(pictures, rows, strict=True)]
    per_image = difference(render(pictures, spec, rows), theirs).mean(axis=(1, 2, 3))
    assert per_image.mean() < 1.3
    assert per_image.max() < 2.2


def test_center_view_is_resize_and_center_crop(pictures: list[NDArray[np.uint8]]) -> None:
    spec = center_view(SIZE)
    ours = render(pictures, spec, place(pictures, spec))
    for picture, view in zip(pictures, ours, strict=True):
        resized = F.resize(decode(picture), round(SIZE / 0.875), F.InterpolationMode.BICUBIC)
        theirs = np.asarray(F.center_crop(resized, [SIZE, SIZE]), float)
        # Up to a pixel of shift, since torchvision cuts after the resize: alike, not equal.
        assert np.corrcoef(view.ravel(), theirs.ravel())[0, 1] > 0.9


def batches(encoded: list[NDArray[np.uint8]], sizes: list[int], threads: int) -> Iterator[Encoded]:
    specs = [ViewSpec(SIZE, blur=0.5, solarize=0.3), ViewSpec(32)]
    rows = [place(encoded, spec) for spec in specs]
    starts = np.cumsum([0, *sizes])
    for first, last in itertools.pairwise(starts):
        cut = slice(first, last)
        yield Encoded(encoded[cut], tuple(each[cut] for each in rows), np.arange(first, last)[:, None])


@pytest.mark.parametrize(("sizes", "threads"), [([3, 3, 1], 1), ([7], 3)])
def test_batches_views_and_threads_do_not_change_pixels(
    pictures: list[NDArray[np.uint8]], sizes: list[int], threads: int
) -> None:
    def run(sizes: list[int], threads: int) -> list[torch.Tensor]:
        specs = [ViewSpec(SIZE, blur=0.5, solarize=0.3), ViewSpec(32)]
        source = batches(pictures[:7], sizes, threads).__next__
        pipeline = ViewPipeline(specs, source, batch_size=max(sizes), device=CPU, threads=threads)
        parts = list(pipeline)
        assert torch.cat([tags for _, tags in parts]).flatten().tolist() == list(range(7))
        return [torch.cat([views[k] for views, _ in parts]) for k in range(2)]

    for ours, theirs in zip(run(sizes, threads), run([2, 5], 2), strict=True):
        assert torch.equal(ours, theirs)


def test_batches_stay_valid_after_the_next(pictures: list[NDArray[np.uint8]]) -> None:
    rows = place(pictures, ViewSpec(SIZE))
    source = iter([Encoded(pictures, (rows,), np.full((len(pictures), 1), k)) for k in range(6)]).__next__
    pipeline = ViewPipeline([ViewSpec(SIZE)], source, batch_size=len(pictures), device=CPU, threads=1)
    kept = [(views[0], views[0].clone(), tags) for views, tags in pipeline]
    assert [int(tags[0]) for _, _, tags in kept] == list(range(6))
    assert len({view.data_ptr() for view, _, _ in kept}) == 6
    assert all(torch.equal(view, copy) for view, copy, _ in kept)


def test_an_error_of_the_source_reaches_the_caller() -> None:
    def source() -> Encoded:
        raise ValueError("no more disk")

    pipeline = ViewPipeline([ViewSpec(SIZE)], source, batch_size=2, device=CPU, threads=1)
    with pytest.raises(ValueError, match="no more disk"):
        next(pipeline)


def test_the_same_graph_can_be_defined_for_a_gpu() -> None:
    """Definition checks which inputs of an operator may live on the GPU; running it needs one."""
    specs = [everything(), center_view(SIZE)]
    for color in COLORS:
        build_graph(specs, lambda: pytest.fail("not called"), 4, torch.device("cuda", 0), 2, 2, color, Decoding())
