"""What a view of an image is, and the random numbers that make one.

A method declares its views as data (`ViewSpec`). `draw` turns each into one row of parameters per sample by a
hash of (seed, epoch, sample id, view): pixels do not depend on ranks, batch size, threads or restarts.
"""

import math
from dataclasses import dataclass
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from data.order import hashed, uniforms
from data.randaugment import draw_layers

_CROP_TRIES = 10
# Separates the hashes of RandAugment from those of all else.
_LAYERS = 0x6C6179657273


@dataclass(frozen=True)
class ViewSpec:
    """One augmented view: crop, RandAugment, color jitter, grayscale, blur, solarize, flip, in this order.

    size: side of the square view in pixels. crop: "random" (share of the area from ``scale``, aspect ratio
    from ``ratio``) or "center" (a square of ``center_fraction`` of the shorter side). jitter: strengths of
    brightness, contrast, saturation and hue (turns), applied with ``jitter_probability``, in an order that is
    drawn too. flip, grayscale, blur, solarize: probabilities. blur_sigma in pixels. interpolation: "bilinear" or
    "bicubic", antialiased. randaugment: magnitude, up to 10; 0 is none.
    """

    size: int
    crop: str = "random"
    scale: tuple[float, float] = (0.08, 1.0)
    ratio: tuple[float, float] = (3 / 4, 4 / 3)
    flip: float = 0.5
    jitter: tuple[float, float, float, float] = (0.4, 0.4, 0.2, 0.1)
    jitter_probability: float = 0.8
    grayscale: float = 0.2
    blur: float = 0.0
    blur_sigma: tuple[float, float] = (0.1, 2.0)
    solarize: float = 0.0
    interpolation: str = "bilinear"
    center_fraction: float = 0.875
    randaugment: float = 0.0

    def __post_init__(self) -> None:
        assert self.size > 0, self.size
        assert self.crop in ("random", "center"), self.crop
        assert self.interpolation in ("bilinear", "bicubic"), self.interpolation


def center_view(size: int) -> ViewSpec:
    """Return the deterministic view of evaluation: bicubic center crop, no flip, no change of color."""
    return ViewSpec(size, crop="center", flip=0.0, jitter_probability=0.0, grayscale=0.0, interpolation="bicubic")


class Column(IntEnum):
    """What each number of a parameter row means; behind them stand those of RandAugment's layers, if there are any."""

    TOP = 0  # crop box, in whole pixels of the decoded image
    LEFT = 1
    HEIGHT = 2
    WIDTH = 3
    FLIP = 4  # 0 or 1
    JITTER = 5  # 0 or 1; the next four are neutral where it is 0
    BRIGHTNESS = 6  # factor
    CONTRAST = 7  # factor about the mean luma
    SATURATION = 8  # factor
    HUE = 9  # degrees
    GRAYSCALE = 10  # 0 or 1
    SIGMA = 11  # of the blur, in pixels; 0 = no blur
    SOLARIZE = 12  # 0 or 1
    FIRST = 13  # the order of the jitter: the column of the operator that comes first, and so on
    SECOND = 14
    THIRD = 15
    FOURTH = 16


JITTERS = (Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION, Column.HUE)
"""The operators of color jitter, by the column of their parameter."""


def draw(
    spec: ViewSpec,
    *,
    seed: int,
    epoch: NDArray[np.int64],
    sample: NDArray[np.int64],
    view: int,
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> NDArray[np.float32]:
    """Draw the parameters of one view of n samples.

    epoch, sample, heights, widths: [n], the last two in pixels of the decoded image; view: the view's number.
    Returns float32 [n, len(Column)], with RandAugment len(Layer) more for each of its layers.
    """
    numbers = uniforms(hashed(seed, epoch, sample, view), 4 * _CROP_TRIES + len(Column))
    crop_numbers, rest = np.split(numbers, [4 * _CROP_TRIES], axis=1)
    rows = np.zeros((len(sample), len(Column)))
    if spec.crop == "random":
        tries = crop_numbers.reshape(-1, _CROP_TRIES, 4)
        rows[:, : Column.FLIP] = _random_boxes(spec, tries, heights, widths)
    else:
        rows[:, : Column.FLIP] = _center_boxes(spec, heights, widths)
    _fill_color(spec, rows, rest)
    rows[:, Column.FLIP] = rest[:, Column.FLIP] < spec.flip
    if spec.randaugment > 0:
        rows = np.hstack([rows, draw_layers(hashed(_LAYERS, seed, epoch, sample, view), spec.randaugment)])
    return rows.astype(np.float32)


def _fill_color(spec: ViewSpec, rows: NDArray[np.float64], numbers: NDArray[np.float64]) -> None:
    """Fill the columns of color and blur; the number for a column is the one at its own position."""
    jitter = numbers[:, Column.JITTER] < spec.jitter_probability
    rows[:, Column.JITTER] = jitter
    for column, strength in zip((Column.BRIGHTNESS, Column.CONTRAST, Column.SATURATION), spec.jitter, strict=False):
        factor = _between(numbers[:, column], max(0.0, 1.0 - strength), 1.0 + strength)
        rows[:, column] = np.where(jitter, factor, 1.0)
    hue = 360.0 * _between(numbers[:, Column.HUE], -spec.jitter[3], spec.jitter[3])
    rows[:, Column.HUE] = np.where(jitter, hue, 0.0)
    # Sorting independent numbers gives every order the same chance.
    order = Column.BRIGHTNESS + np.argsort(numbers[:, Column.FIRST :], axis=1)
    rows[:, Column.FIRST :] = np.where(jitter[:, None], order, JITTERS)
    rows[:, Column.GRAYSCALE] = numbers[:, Column.GRAYSCALE] < spec.grayscale
    # The numbers at the box columns are free here, since the crop has its own: one decides on the blur.
    blur = numbers[:, Column.TOP] < spec.blur
    rows[:, Column.SIGMA] = np.where(blur, _between(numbers[:, Column.SIGMA], *spec.blur_sigma), 0.0)
    rows[:, Column.SOLARIZE] = numbers[:, Column.SOLARIZE] < spec.solarize


def _random_boxes(
    spec: ViewSpec, numbers: NDArray[np.float64], heights: NDArray[np.int64], widths: NDArray[np.int64]
) -> NDArray[np.float64]:
    """Draw boxes (top, left, height, width) [n, 4] by the law of torchvision's RandomResizedCrop.

    numbers: uniforms [n, tries, 4]. The first try that fits wins; if none does, the largest centered box
    whose aspect ratio is within ``spec.ratio``.
    """
    full_height, full_width = heights[:, None].astype(float), widths[:, None].astype(float)
    area = full_height * full_width * _between(numbers[..., 0], *spec.scale)
    ratio = np.exp(_between(numbers[..., 1], math.log(spec.ratio[0]), math.log(spec.ratio[1])))
    height, width = np.rint(np.sqrt(area / ratio)), np.rint(np.sqrt(area * ratio))
    top = np.floor(numbers[..., 2] * (full_height - height + 1))
    left = np.floor(numbers[..., 3] * (full_width - width + 1))
    fits = (height > 0) & (height <= full_height) & (width > 0) & (width <= full_width)
    first = np.argmax(fits, axis=1)
    boxes = np.stack([top, left, height, width], axis=-1)[np.arange(len(first)), first]
    return np.where(fits.any(axis=1)[:, None], boxes, _fallback_boxes(spec, heights, widths))


def _fallback_boxes(spec: ViewSpec, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.float64]:
    width = np.minimum(widths, np.rint(heights * spec.ratio[1]))
    height = np.minimum(heights, np.rint(widths / spec.ratio[0]))
    return _centered(height, width, heights, widths)


def _center_boxes(spec: ViewSpec, heights: NDArray[np.int64], widths: NDArray[np.int64]) -> NDArray[np.float64]:
    side = np.maximum(1.0, np.rint(spec.center_fraction * np.minimum(heights, widths)))
    return _centered(side, side, heights, widths)


def _centered(
    height: NDArray[np.float64],
    width: NDArray[np.float64],
    heights: NDArray[np.int64],
    widths: NDArray[np.int64],
) -> NDArray[np.float64]:
    return np.stack([(heights - height) // 2, (widths - width) // 2, height, width], axis=1)


def _between(numbers: NDArray[np.float64], low: float, high: float) -> NDArray[np.float64]:
    return low + (high - low) * numbers
