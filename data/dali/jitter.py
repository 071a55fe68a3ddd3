"""Color jitter and grayscale on views, in two ways.

- `fused`: saturation, hue and grayscale are one mixing of colors, with brightness and contrast before or after it as
  drawn. The statistics of torchvision's random order; a pixel differs by the model of hue (YIQ) and by less clipping.
- `exact`: op by op in the drawn order, truncated to gray levels in between, the hue in HSV. torchvision's, pixel by
  pixel.
"""

from collections.abc import Callable
from typing import Any

import nvidia.dali.math as dm
from nvidia.dali import fn, types

from data.color import TRUNCATION, Exact, Fused
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
    return change_where(on, view, lambda some: _tone_mix_tone(some, parameters, pixels))


def _tone_mix_tone(view: Any, parameters: Any, pixels: Pixels) -> Any:
    mean = fn.reductions.mean(pixels.luma(view, parameters[Fused.WEIGHTS : Fused.MATRIX]))
    later_mean = mean * beside(mean, parameters[Fused.CENTER_AFTER])
    view = pixels.tone(view, parameters[Fused.BRIGHTNESS_BEFORE], parameters[Fused.CONTRAST_BEFORE], mean)
    view = pixels.mix(view, parameters[Fused.MATRIX :])
    return pixels.tone(view, parameters[Fused.BRIGHTNESS_AFTER], parameters[Fused.CONTRAST_AFTER], later_mean)


def exact(view: Any, row: Any, parameters: Any, spec: ViewSpec, pixels: Pixels) -> Any:
    """Jitter op by op and take to gray. ``parameters``: those of `data.color.Exact`."""
    if spec.jitter_probability > 0:
        view = change_where(row[Column.JITTER] > 0, view, lambda some: _in_order(some, row, parameters, spec, pixels))
    if spec.grayscale > 0:
        view = change_where(row[Column.GRAYSCALE] > 0, view, lambda some: _gray(some, parameters, pixels))
    return view


def _in_order(view: Any, row: Any, parameters: Any, spec: ViewSpec, pixels: Pixels) -> Any:
    changes = {
        Column.BRIGHTNESS: lambda some: _brightness(some, row, pixels),
        Column.CONTRAST: lambda some: _contrast(some, row, parameters, pixels),
        Column.SATURATION: lambda some: _saturation(some, parameters, pixels),
        Column.HUE: lambda some: _hue(some, row, pixels),
    }
    for slot in range(Column.FIRST, Column.FIRST + len(JITTERS)):
        for k, column in enumerate(JITTERS):
            if spec.jitter[k] > 0:
                view = change_where(row[slot] == float(column), view, changes[column])
    return view


def _brightness(view: Any, row: Any, pixels: Pixels) -> Any:
    return pixels.tone(view, row[Column.BRIGHTNESS], 1.0, 0.0, shift=-TRUNCATION)


def _contrast(view: Any, row: Any, parameters: Any, pixels: Pixels) -> Any:
    mean = fn.reductions.mean(_truncated_luma(view, parameters, pixels))
    return pixels.tone(view, 1.0, row[Column.CONTRAST], mean, shift=-TRUNCATION)


def _saturation(view: Any, parameters: Any, pixels: Pixels) -> Any:
    return pixels.mix(view, parameters[Exact.MATRIX :], parameters[Exact.OFFSET])


def _gray(view: Any, parameters: Any, pixels: Pixels) -> Any:
    return pixels.join([_truncated_luma(view, parameters, pixels)] * 3)


def _truncated_luma(view: Any, parameters: Any, pixels: Pixels) -> Any:
    return pixels.luma(view, parameters[Exact.WEIGHTS : Exact.MATRIX], parameters[Exact.LUMA_OFFSET])


def _hue(view: Any, row: Any, pixels: Pixels) -> Any:
    """Turn the hue of HSV, in whole gray levels.

    With V the largest and m the smallest of R, G, B, and H the hue in units of C = V - m (6 C are a whole turn),
    each channel is V - C clamp(2 - |distance of H from where the channel is off|, 0, 1): no division.
    """
    red, green, blue = (fn.cast(channel, dtype=types.INT16) for channel in pixels.channels(view))
    high = dm.max(dm.max(red, green), blue)
    low = dm.min(dm.min(red, green), blue)
    range_ = high - low
    hue = _hue_in_ranges(red, green, blue, high, range_)
    turned = hue + fn.cast(range_ * beside(view, row[Column.HUE] / 60.0), dtype=types.INT16)
    three, floor = range_ * _whole(3), low - range_
    channels = [
        dm.min(dm.max(dm.abs(dm.abs(turned - range_ * _whole(k)) - three) + floor, low), high) for k in (0, 2, 4)
    ]
    return fn.cast(pixels.join(channels), dtype=types.UINT8)


def _hue_in_ranges(red: Any, green: Any, blue: Any, high: Any, range_: Any) -> Any:
    """Return H C for H in [-1, 5]: G - B if R is the largest, else 2 C + B - R if G is, else 4 C + R - G."""
    other = fn.cast(red < high, dtype=types.INT16)
    blue_leads = other * fn.cast(green < high, dtype=types.INT16)
    rest = range_ * _whole(2) - (red + green + blue)
    return (green - blue) + other * (blue * _whole(3) + rest) + blue_leads * (red * _whole(3) + rest)


def _whole(number: int) -> Any:
    """Return a constant that keeps the numbers it meets 16 bits wide."""
    return types.Constant(number, dtype=types.INT16)
