"""RandAugment on views, operator by operator, as PIL does it.

Of a view only what its two drawn operators ask for is done. How far the views are from those of timm's transform (PIL)
with the same numbers of magnitude 9 (gray levels, mean over 128 photographs, views of 224 pixels, on the CPU):

invert, posterize, solarize, solarize_add  0
auto_contrast                              0.004
brightness, contrast                       0.01
color                                      0.2 (the luma is not rounded before it is mixed in)
sharpness                                  0.3 (nor is the smoothed image; PIL leaves the outermost pixels as they are)
rotate                                     0.13 (within half a pixel of an edge we mix, PIL does not); bicubic PIL: 2.2
shear, translate                           0.08 (the same); bicubic PIL: 0.9 to 1.3
equalize                                   3, worst image 27 (a level becomes the share of those up to it, as in OpenCV;
                                           in PIL of those below it); 7 after a rotation or a shear, 42 after a shift by
                                           0.4, whose fill is one frequent level
whole views, as drawn                      0.5, without those equalized 0.06, median 0.01; bicubic PIL: 1.0, 0.6, 0.01
"""

import math
from collections.abc import Callable
from enum import IntEnum
from typing import Any

import numpy as np
import nvidia.dali.math as dm
from numpy.typing import NDArray
from nvidia.dali import fn, types

from data.color import LUMA, TRUNCATION, Floats
from data.dali.jitter import change_where
from data.dali.pixels import Pixels, beside
from data.randaugment import LAYERS, MOVES, Layer, Operator


class Applied(IntEnum):
    """Where the numbers that the operators take of a layer are."""

    OPERATOR = 0
    AMOUNT = 1
    OFFSET = 2  # in gray levels
    MATRIX = 3  # row by row: a mixing of colors, 3x4; a filter, 3x3; from a place in the result to the source's, 2x3


# What comes in from beyond the edges: ImageNet's mean color.
FILL = (124, 116, 104)
_WIDTH = Applied.MATRIX + 12
_IDENTITY = np.array([[0, 0, 0], [0, 1, 0], [0, 0, 0]])
# PIL's filter SMOOTH, towards which or away from which sharpness goes.
_SMOOTH = np.array([[1, 1, 1], [1, 5, 1], [1, 1, 1]]) / 13


def layer_parameters(layers: Floats, size: int) -> Floats:
    """Return what the operators take: [n, LAYERS * _WIDTH] as told by `Applied`.

    layers: what `draw_layers` drew, [n, LAYERS * len(Layer)]; size: of the views, in pixels.
    """
    drawn = layers.reshape(-1, len(Layer)).astype(float)
    found = np.zeros((len(drawn), _WIDTH))
    found[:, : Applied.OFFSET], found[:, Applied.OFFSET] = drawn, -TRUNCATION
    posterized = drawn[:, Layer.OPERATOR] == Operator.POSTERIZE
    # Of the bits that are kept, a mask.
    found[posterized, Applied.AMOUNT] = 256 - 2 ** (8 - drawn[posterized, Layer.AMOUNT])
    for row, (operator, amount) in zip(found, drawn, strict=True):
        matrix = _matrix(Operator(int(operator)), amount, size)
        row[Applied.MATRIX : Applied.MATRIX + matrix.size] = matrix.ravel()
    return found.reshape(len(layers), -1).astype(np.float32)


def _matrix(operator: Operator, amount: float, size: int) -> NDArray[np.float64]:
    if operator is Operator.CONTRAST:
        return np.array(LUMA)
    if operator is Operator.COLOR:
        return np.column_stack([amount * np.eye(3) + (1 - amount) * np.array(LUMA), np.full(3, -TRUNCATION)])
    if operator is Operator.SHARPNESS:
        return amount * _IDENTITY + (1 - amount) * _SMOOTH
    if operator is Operator.ROTATE:
        turn, middle = math.radians(amount), np.full(2, size / 2)
        rotation = np.array([[math.cos(turn), -math.sin(turn)], [math.sin(turn), math.cos(turn)]])
        return np.column_stack([rotation, middle - rotation @ middle])
    moves = {
        Operator.SHEAR_X: [[1, amount, 0], [0, 1, 0]],
        Operator.SHEAR_Y: [[1, 0, 0], [amount, 1, 0]],
        Operator.TRANSLATE_X: [[1, 0, amount * size], [0, 1, 0]],
        Operator.TRANSLATE_Y: [[1, 0, 0], [0, 1, amount * size]],
    }
    return np.array(moves.get(operator, []), float)


def randaugment(view: Any, parameters: Any, pixels: Pixels) -> Any:
    """Change a view, arranged by ``pixels``, by one layer after the other."""
    for k in range(LAYERS):
        view = _changed(view, parameters[k * _WIDTH : (k + 1) * _WIDTH], pixels)
    return view


def _changed(view: Any, layer: Any, pixels: Pixels) -> Any:
    return change_where(layer[Applied.OPERATOR] > 0, view, lambda some: _layer(some, layer, pixels))


def _layer(view: Any, layer: Any, pixels: Pixels) -> Any:
    amount, offset, matrix = layer[Applied.AMOUNT], layer[Applied.OFFSET], layer[Applied.MATRIX :]
    changes: dict[Operator, Callable[[Any], Any]] = {
        Operator.AUTO_CONTRAST: _auto_contrast,
        Operator.EQUALIZE: pixels.equalize,
        Operator.INVERT: _inverted,
        Operator.POSTERIZE: lambda some: some & beside(some, fn.cast(amount, dtype=types.UINT8)),
        Operator.SOLARIZE: lambda some: _where(some < beside(some, amount), some, _inverted(some)),
        Operator.SOLARIZE_ADD: lambda some: _where(some < 128.0, _raised(some, amount), some),
        Operator.COLOR: lambda some: pixels.mix(some, [matrix[4 * k : 4 * k + 4] for k in range(3)], shifted=True),
        Operator.CONTRAST: lambda some: _contrast(some, amount, offset, matrix[:3], pixels),
        Operator.BRIGHTNESS: lambda some: pixels.tone(some, amount, 1.0, 0.0, shift=offset),
        Operator.SHARPNESS: lambda some: pixels.filter(some, fn.reshape(matrix[:9], shape=[3, 3]), offset),
    }
    operator = layer[Applied.OPERATOR]
    for each, change in changes.items():
        view = change_where(operator == float(each), view, change)
    warp = fn.reshape(matrix[:6], shape=[2, 3])
    return change_where(operator >= float(min(MOVES)), view, lambda some: pixels.warp(some, warp, FILL))


def _auto_contrast(view: Any) -> Any:
    """Stretch each channel's levels to 0 to 255."""
    low = fn.reductions.min(view, axis_names="HW", keep_dims=True)
    span = fn.reductions.max(view, axis_names="HW", keep_dims=True) - low
    # A channel of one level stays as it is.
    flat = span == 0
    gain = 255.0 / dm.max(span, 1) * (flat ^ True) + flat
    return fn.cast((view - low * (flat ^ True)) * gain - TRUNCATION, dtype=types.UINT8)


def _inverted(view: Any) -> Any:
    return types.Constant(255, dtype=types.UINT8) - view


def _raised(view: Any, amount: Any) -> Any:
    return fn.cast(view + beside(view, amount), dtype=types.UINT8)


def _where(mask: Any, view: Any, other: Any) -> Any:
    return mask * view + (mask ^ True) * other


def _contrast(view: Any, factor: Any, offset: Any, weights: Any, pixels: Pixels) -> Any:
    middle = dm.floor(fn.reductions.mean(pixels.luma(view, weights)) + 0.5)
    return pixels.tone(view, 1.0, factor, middle, shift=offset)
