"""Color jitter and grayscale on views, in two ways.

- `fused`: saturation, hue and grayscale are one mixing of colors, with brightness and contrast before or after it as
  drawn. The statistics of torchvision's random order; a pixel differs by the model of hue (YIQ) and by less clipping.
- `exact`: op by op in the drawn order, truncated to gray levels in between, the hue in HSV. torchvision's, pixel by
  pixel.
"""

import math
from collections.abc import Callable
from typing import Any

import nvidia.dali.math as dm
from nvidia.dali import fn

from data.color import EXACT_STEPS, TRUNCATION, Exact, Fused
from data.dali.pixels import Pixels, beside
from data.views import JITTERS, Column, ViewSpec


def change_where(on: Any, view: Any, change: Callable[[Any], Any]) -> Any:
    """Change the samples of the batch for which ``on`` holds; only those pay for it."""
    # DALI reads this statement as a split of the batch and a merge; it does not read a conditional expression.
    if on:  # noqa: SIM108
        out = change(view)
    else:
        out = view
    return out


def fused(view: Any, row: Any, parameters: Any, spec: ViewSpec, pixels: Pixels) -> Any:
    """Jitter and take to gray. ``parameters``: those of `data.color.Fused`."""
    on = row[Column.JITTER] + row[Column.GRAYSCALE] > 0
    return change_where(on, view, lambda some: _tones_and_mixing(some, parameters, pixels))


def _tones_and_mixing(view: Any, parameters: Any, pixels: Pixels) -> Any:
    mean = fn.reductions.mean(pixels.luma(view, parameters[Fused.WEIGHTS : Fused.MATRIX]))
    for k in range(2):
        view = _tone(view, parameters, k, mean, pixels)
    view = pixels.mix(view, parameters[Fused.MATRIX :])
    for k in range(2, 4):
        view = _tone(view, parameters, k, mean, pixels)
    return view


def _tone(view: Any, parameters: Any, number: int, mean: Any, pixels: Pixels) -> Any:
    brightness, contrast, center, shift = (parameters[Fused.TONES + 4 * number + k] for k in range(4))
    middle = mean * beside(mean, center)
    return change_where(shift < 0, view, lambda some: pixels.tone(some, brightness, contrast, middle, shift))


def exact(view: Any, row: Any, parameters: Any, spec: ViewSpec, pixels: Pixels) -> Any:
    """Jitter op by op and take to gray. ``parameters``: those of `data.color.Exact`."""
    if spec.jitter_probability > 0:
        view = _in_order(view, row, parameters, spec, pixels)
    if spec.grayscale > 0:
        view = change_where(row[Column.GRAYSCALE], view, lambda some: _gray(some, parameters, pixels))
    return view


def _in_order(view: Any, row: Any, parameters: Any, spec: ViewSpec, pixels: Pixels) -> Any:
    changes = {
        Column.BRIGHTNESS: lambda some: _brightness(some, row, pixels),
        Column.CONTRAST: lambda some: _contrast(some, row, parameters, pixels),
        Column.SATURATION: lambda some: _saturation(some, parameters, pixels),
        Column.HUE: lambda some: _hue(some, row, spec, pixels),
    }
    for number, column in enumerate(EXACT_STEPS):
        if spec.jitter[JITTERS.index(column)] > 0:
            view = change_where(parameters[Exact.STEPS + number], view, changes[column])
    return view


def _brightness(view: Any, row: Any, pixels: Pixels) -> Any:
    return pixels.tone(view, row[Column.BRIGHTNESS], 1.0, 0.0, shift=-TRUNCATION)


def _contrast(view: Any, row: Any, parameters: Any, pixels: Pixels) -> Any:
    mean = fn.reductions.mean(_truncated_luma(view, parameters, pixels))
    return pixels.tone(view, 1.0, row[Column.CONTRAST], mean, shift=-TRUNCATION)


def _saturation(view: Any, parameters: Any, pixels: Pixels) -> Any:
    return pixels.mix(view, parameters[Exact.SATURATION : Exact.STEPS], shifted=True)


def _gray(view: Any, parameters: Any, pixels: Pixels) -> Any:
    return pixels.join([_truncated_luma(view, parameters, pixels)] * 3)


def _truncated_luma(view: Any, parameters: Any, pixels: Pixels) -> Any:
    return pixels.luma(view, parameters[Exact.LUMA : Exact.SATURATION], shifted=True)


def _hue(view: Any, row: Any, spec: ViewSpec, pixels: Pixels) -> Any:
    """Turn the hue of HSV, by a sixth of a turn at most in each pass."""
    passes = math.ceil(6 * spec.jitter[3])
    sixths = row[Column.HUE] * (1 / (60.0 * passes))
    levels = _reversed_where(sixths < 0, pixels.channels(view))
    for _ in range(passes):
        levels = _turned(levels, dm.abs(sixths), pixels)
    return pixels.join(_reversed_where(sixths < 0, levels))


def _reversed_where(on: Any, channels: list[Any]) -> list[Any]:
    """Exchange red and blue, and with them the two ways around the circle of hues."""
    red, green, blue = channels
    if on:
        first, last = blue, red
    else:
        first, last = red, blue
    return [first, green, last]


def _turned(levels: list[Any], sixths: Any, pixels: Pixels) -> list[Any]:
    """Turn the hue by ``sixths`` of a turn, 0 to 1, from red towards green. All levels stay within 0 to 255.

    Let V and m be the largest and the smallest of the three, and e = sixths (V - m). A channel rises by what m + e is
    above the next one (red's is green, and so on around the circle), to V at most, and falls by what the next one is
    above V - e, to m at most. This is the turn of HSV, without divisions and without knowing the hue: where a channel
    could do both, it is at V or at m already.
    """
    red, green, blue = levels
    high = dm.max(dm.max(red, green), blue)
    low = dm.min(dm.min(red, green), blue)
    step = pixels.tone(high - low, sixths, 1.0, 0.0)
    rising, falling = low + step, high - step

    def turned(level: Any, following: Any) -> Any:
        rise = dm.min(dm.max(rising, following) - following, high - level)
        fall = dm.min(dm.max(following, falling) - falling, level - low)
        return level + rise - fall

    return [turned(red, green), turned(green, blue), turned(blue, red)]
