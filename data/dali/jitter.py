"""Color jitter and grayscale on views, in two ways.

- `fused`: saturation, hue and grayscale are one mixing of colors, with brightness and contrast before or after it as
  drawn. The statistics of torchvision's random order; a pixel differs by the model of hue (YIQ) and by less clipping.
- `exact`: op by op in the drawn order, truncated to gray levels in between, the hue in HSV. torchvision's, pixel by
  pixel.
"""

import math
from collections.abc import Callable, Mapping
from typing import Any

import nvidia.dali.math as dm
from nvidia.dali import fn

from data.color import CHANNELS, EXACT_STEPS, TONE, TRUNCATION
from data.dali.pixels import Pixels, beside
from data.views import JITTERS, Column, ViewSpec

Numbers = Mapping[str, Any]
"""Parameters of a view in the graph, by name."""


def change_where(on: Any, view: Any, change: Callable[[Any], Any]) -> Any:
    """Change the samples of the batch for which ``on`` holds; only those pay for it."""
    # DALI reads this statement as a split of the batch and a merge; it does not read a conditional expression.
    if on:  # noqa: SIM108
        out = change(view)
    else:
        out = view
    return out


def fused(view: Any, numbers: Numbers, spec: ViewSpec, pixels: Pixels) -> Any:
    """Jitter and take to gray. ``numbers``: those of `data.color.fused_parameters`."""
    return change_where(numbers["colored"], view, lambda some: _tones_and_mixing(some, numbers, pixels))


def _tones_and_mixing(view: Any, numbers: Numbers, pixels: Pixels) -> Any:
    mean = fn.reductions.mean(pixels.luma(view, numbers["luma"]))
    for k in range(2):
        view = _tone(view, numbers, k, mean, pixels)
    view = pixels.mix(view, [numbers[name] for name in CHANNELS])
    for k in range(2, 4):
        view = _tone(view, numbers, k, mean, pixels)
    return view


def _tone(view: Any, numbers: Numbers, number: int, mean: Any, pixels: Pixels) -> Any:
    brightness, contrast, center, shift = (numbers[f"{name} {number}"] for name in TONE)
    middle = mean * beside(mean, center)
    return change_where(shift, view, lambda some: pixels.tone(some, brightness, contrast, middle, shift))


def exact(view: Any, numbers: Numbers, spec: ViewSpec, pixels: Pixels) -> Any:
    """Jitter op by op and take to gray. ``numbers``: those of `data.color.exact_parameters`."""
    if spec.jitter_probability > 0:
        view = _in_order(view, numbers, spec, pixels)
    if spec.grayscale > 0:
        view = change_where(numbers["grayscale"], view, lambda some: _gray(some, numbers, pixels))
    return view


def _in_order(view: Any, numbers: Numbers, spec: ViewSpec, pixels: Pixels) -> Any:
    changes = {
        Column.BRIGHTNESS: lambda some: _brightness(some, numbers, pixels),
        Column.CONTRAST: lambda some: _contrast(some, numbers, pixels),
        Column.SATURATION: lambda some: _saturation(some, numbers, pixels),
        Column.HUE: lambda some: _hue(some, numbers, hue_passes(spec), pixels),
    }
    for number, column in enumerate(EXACT_STEPS):
        if spec.jitter[JITTERS.index(column)] > 0:
            view = change_where(numbers[f"step {number}"], view, changes[column])
    return view


def _brightness(view: Any, numbers: Numbers, pixels: Pixels) -> Any:
    return pixels.tone(view, numbers["brightness"], 1.0, 0.0, shift=-TRUNCATION)


def _contrast(view: Any, numbers: Numbers, pixels: Pixels) -> Any:
    mean = fn.reductions.mean(pixels.luma(view, numbers["luma"], shifted=True))
    return pixels.tone(view, 1.0, numbers["contrast"], mean, shift=-TRUNCATION)


def _saturation(view: Any, numbers: Numbers, pixels: Pixels) -> Any:
    return pixels.mix(view, [numbers[name] for name in CHANNELS], shifted=True)


def _gray(view: Any, numbers: Numbers, pixels: Pixels) -> Any:
    return pixels.join([pixels.luma(view, numbers["luma"], shifted=True)] * 3)


def hue_passes(spec: ViewSpec) -> int:
    """Return in how many passes of a sixth of a turn at most the exact hue is turned."""
    return math.ceil(6 * spec.jitter[3])


def _hue(view: Any, numbers: Numbers, passes: int, pixels: Pixels) -> Any:
    """Turn the hue of HSV."""
    sixths, backwards = numbers["sixths"], numbers["backwards"]
    levels = _reversed_where(backwards, pixels.channels(view))
    for _ in range(passes):
        levels = _turned(levels, sixths, pixels)
    return pixels.join(_reversed_where(backwards, levels))


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
    pack, unpack = pixels.pack, pixels.unpack
    red, green, blue = levels
    high = dm.max(dm.max(red, green), blue)
    low = dm.min(dm.min(red, green), blue)
    largest, smallest = pack(high), pack(low)
    step = pack(pixels.tone(unpack(largest - smallest), sixths, 1.0, 0.0))
    rising, falling = unpack(smallest + step), unpack(largest - step)

    def turned(level: Any, following: Any) -> Any:
        own, other = pack(level), pack(following)
        above = unpack(pack(dm.max(rising, following)) - other)
        below = unpack(other - pack(dm.min(falling, following)))
        rise = dm.min(above, unpack(largest - own))
        fall = dm.min(below, unpack(own - smallest))
        return unpack(own + pack(rise) - pack(fall))

    return [turned(red, green), turned(green, blue), turned(blue, red)]
