"""The algebra behind changes of color and blur: parameter rows in, what the operators take out. No pixels here.

Without the clipping in between, color jitter is one affine map of RGB whatever its order. Saturation and hue (as a
rotation of chroma in YIQ) keep the luma, so they commute with each other and with brightness and contrast, which
act on all channels alike. What depends on the order is only what gets clipped on the way.
"""

import math
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.views import JITTERS, Column

Floats = NDArray[np.float32]
Parameters = dict[str, NDArray[Any]]

CHANNELS = ("red", "green", "blue")

LUMA = (0.299, 0.587, 0.114)
"""Weights of R, G and B in the luma (ITU-R BT.601)."""

_TO_YIQ = np.array([LUMA, (0.596, -0.274, -0.322), (0.211, -0.523, 0.312)])
TORCHVISION_LUMA = (0.2989, 0.587, 0.114)
"""torchvision's, which sum to less than 1: truncated, the luma of a gray v is v - 1."""

TRUNCATION = 0.49
"""Rounding truncates after this is subtracted: not quite a half, lest float error cost a whole number one level."""

# Outside of three standard deviations lies 0.3 % of a Gaussian.
_REACH = 3.0


_B, _C, _S, _H = JITTERS

EXACT_STEPS = (_B, _C, _B, _S, _B, _C, _B, _H, _B, _C, _B, _S, _B, _C, _B)
"""Operators in a row in which each of the 24 orders of the four is found by leaving others out.

The graph holds each as often as it stands here, so that the cheapest stands here most, and the hue once.
"""


TONE = ("brightness", "contrast", "center", "shift")
"""The numbers of a tone: x -> brightness (center mean + contrast (x - center mean)) + shift, in gray levels."""


def fused_parameters(rows: Floats) -> Parameters:
    """Return what the fused jitter takes of parameter rows [n, len(Column)].

    colored: [n], 0 where there is nothing to do. "brightness 0" and so on: [n], the numbers of four tones, of which
    two come before the mixing of colors and two after it; their mean is that of the view's luma before any jitter; a
    shift of 0 means that there is nothing to do. luma, red, green, blue: weights [n, 3] of what the mean is of, and
    of the mixed channels.
    """
    tones, mixing = _tones(rows), _mixing(rows)
    return {
        "colored": rows[:, Column.JITTER] + rows[:, Column.GRAYSCALE],
        **{f"{name} {k}": tones[:, k, place] for k in range(4) for place, name in enumerate(TONE)},
        "luma": np.broadcast_to(LUMA, (len(rows), 3)),
        **{name: mixing[:, channel] for channel, name in enumerate(CHANNELS)},
    }


def _tones(rows: Floats) -> NDArray[np.float64]:
    """Put brightness and contrast before or after the mixing, which stands for the hue, in their order: [n, 4, 4].

    Where torchvision truncates, we round: each tone takes its truncation off, the second that of the mixing too.
    """
    order = np.argsort(positions(rows)[:, [0, 1, 3]], axis=1)
    mixing = np.argmax(order == 2, axis=1)
    tones = np.tile([1.0, 1.0, 1.0, 0.0], (len(rows), 4, 1))
    sample, gain = np.arange(len(rows)), np.ones(len(rows))
    for rank in range(2):
        # Of brightness (0) and contrast (1), the one that comes first, then the other.
        which = order[sample, rank + (rank >= mixing)]
        factor = rows[sample, Column.BRIGHTNESS + which].astype(float)
        tone = tones[sample, rank + 2 - mixing]
        tone[sample, which], tone[:, 2] = factor, gain
        tone[:, 3] = -TRUNCATION * ((factor != 1) + rank * (rows[:, Column.SATURATION] != 1))
        tones[sample, rank + 2 - mixing] = tone
        gain = np.where(which == 0, factor, gain)
    return tones


def positions(rows: Floats) -> NDArray[np.int64]:
    """Return the place, 0 to 3, of brightness, contrast, saturation and hue in the order of each row: [n, 4]."""
    order = rows[:, Column.FIRST : Column.FIRST + len(JITTERS)]
    place: NDArray[np.int64] = np.argmax(order[:, None, :] == np.array(JITTERS)[None, :, None], axis=2)
    return place


def _mixing(rows: Floats) -> NDArray[np.float64]:
    """Return matrices [n, 3, 3] that saturate, turn the hue (in YIQ) and take to gray.

    The rows of a matrix that takes to gray are equal to the last bit, so that no trace of color is left.
    """
    angle = np.radians(rows[:, Column.HUE].astype(float))
    saturation = rows[:, Column.SATURATION].astype(float)
    chroma = np.zeros((len(rows), 3, 3))
    chroma[:, 0, 0] = 1.0
    chroma[:, 1, 1] = chroma[:, 2, 2] = saturation * np.cos(angle)
    chroma[:, 1, 2] = saturation * np.sin(angle)
    chroma[:, 2, 1] = -chroma[:, 1, 2]
    gray = rows[:, Column.GRAYSCALE, None, None] > 0
    return np.where(gray, LUMA, np.linalg.inv(_TO_YIQ) @ chroma @ _TO_YIQ)


def exact_parameters(rows: Floats, passes: int) -> Parameters:
    """Return what the exact jitter takes of parameter rows [n, len(Column)], which turns the hue in so many passes.

    "step 0" and so on: [n], which of `EXACT_STEPS` are taken, 0 or 1. brightness, contrast: [n], factors. luma: [n, 4],
    three weights and a gray level that is added; red, green, blue: the same, of a view whose saturation is changed.
    sixths: [n], what each pass turns the hue by, in sixths of a turn, to the side that ``backwards`` says, 0 or 1.
    grayscale: [n], 0 or 1.
    """
    factor = rows[:, Column.SATURATION, None, None].astype(float)
    # torchvision's saturation blends with the truncated luma and truncates the result.
    saturated = factor * np.eye(3) + (1 - factor) * np.array(TORCHVISION_LUMA)
    offset = np.broadcast_to(-TRUNCATION - 0.5 * (1 - factor), (len(rows), 3, 1))
    mixing, steps = np.concatenate([saturated, offset], axis=2), _steps(rows)
    return {
        **{f"step {number}": steps[:, number] for number in range(len(EXACT_STEPS))},
        "brightness": rows[:, Column.BRIGHTNESS],
        "contrast": rows[:, Column.CONTRAST],
        "luma": np.broadcast_to((*TORCHVISION_LUMA, -0.5), (len(rows), 4)),
        **{name: mixing[:, channel] for channel, name in enumerate(CHANNELS)},
        "sixths": np.abs(rows[:, Column.HUE]) / (60 * max(1, passes)),
        "backwards": rows[:, Column.HUE] < 0,
        "grayscale": rows[:, Column.GRAYSCALE],
    }


def _steps(rows: Floats) -> NDArray[np.bool_]:
    """Return which of `EXACT_STEPS` each row takes, [n, 15]: for each operator the first behind the one before it."""
    steps, numbers = np.array(EXACT_STEPS), np.arange(len(EXACT_STEPS))
    taken, last = np.zeros((len(rows), len(steps)), bool), np.full(len(rows), -1)
    for slot in range(Column.FIRST, Column.FIRST + len(JITTERS)):
        last = np.argmax((steps == rows[:, slot, None]) & (numbers > last[:, None]), axis=1)
        taken[np.arange(len(rows)), last] = rows[:, Column.JITTER] > 0
    return taken


def blur_kernels(rows: Floats) -> list[Floats]:
    """Return a one-dimensional Gaussian per row, as long as its sigma needs; [1.] where there is no blur."""
    return [_gaussian(float(sigma)) for sigma in rows[:, Column.SIGMA]]


def _gaussian(sigma: float) -> Floats:
    radius = math.ceil(_REACH * sigma)
    if radius == 0:
        return np.ones(1, np.float32)
    weights: NDArray[np.float64] = np.exp(-0.5 * (np.arange(-radius, radius + 1) / sigma) ** 2)
    weights /= weights.sum()
    return weights.astype(np.float32)
