"""RandAugment (Cubuk et al., 2020) as timm's `rand-m9-mstd0.5-inc1` has it: which operators, and how strongly.

Each of two layers takes one of 15 operators, does nothing half of the time, and draws its magnitude around the one
asked for. What is drawn is a pure function of its keys; no pixels here.
"""

import math
from enum import IntEnum

import numpy as np
from numpy.typing import NDArray

from data.order import uniforms

LAYERS = 2
LARGEST = 10.0
_PROBABILITY = 0.5
_SPREAD = 0.5  # standard deviation of the magnitude
_NUMBERS = 5  # uniforms of a layer: operator, whether at all, magnitude (2), sign


class Operator(IntEnum):
    """What a layer does to a view; the comment is what its amount means."""

    NONE = 0
    AUTO_CONTRAST = 1
    EQUALIZE = 2
    INVERT = 3
    POSTERIZE = 4  # bits that are kept of a level
    SOLARIZE = 5  # levels from here on are inverted
    SOLARIZE_ADD = 6  # added to the darker half of the levels
    COLOR = 7  # factors; 1 changes nothing
    CONTRAST = 8
    BRIGHTNESS = 9
    SHARPNESS = 10
    ROTATE = 11  # degrees, counterclockwise
    SHEAR_X = 12  # pixels to the left for each pixel down
    SHEAR_Y = 13
    TRANSLATE_X = 14  # share of the side, to the left
    TRANSLATE_Y = 15


class Layer(IntEnum):
    """Where the numbers of a layer are."""

    OPERATOR = 0
    AMOUNT = 1


FACTORS = (Operator.COLOR, Operator.CONTRAST, Operator.BRIGHTNESS, Operator.SHARPNESS)

# Amounts at the largest magnitude.
_MOVES = {
    Operator.ROTATE: 30.0,
    Operator.SHEAR_X: 0.3,
    Operator.SHEAR_Y: 0.3,
    Operator.TRANSLATE_X: 0.45,
    Operator.TRANSLATE_Y: 0.45,
}
MOVES = tuple(_MOVES)
"""Operators that move pixels."""


def draw_layers(keys: NDArray[np.uint64], magnitude: float) -> NDArray[np.float64]:
    """Draw all layers for each key [n]: operators and amounts, [n, LAYERS * len(Layer)]."""
    numbers = uniforms(keys, LAYERS * _NUMBERS).reshape(-1, LAYERS, _NUMBERS)
    which, whether, radius, angle, side = np.moveaxis(numbers, 2, 0)
    # Box and Muller's normal numbers; 1 - u is never zero.
    normal = np.sqrt(-2 * np.log(1 - radius)) * np.cos(2 * math.pi * angle)
    level = np.clip(magnitude + _SPREAD * normal, 0.0, LARGEST) / LARGEST
    operator = 1 + np.floor(which * (len(Operator) - 1)).astype(np.int64)
    amount = _amounts(operator, level, np.where(side < 0.5, -1.0, 1.0))
    off = whether >= _PROBABILITY
    layers = np.stack([np.where(off, Operator.NONE, operator), np.where(off, 0.0, amount)], axis=2)
    return layers.reshape(len(keys), -1)


def _amounts(operator: NDArray[np.int64], level: NDArray[np.float64], sign: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return what a level, as a share of the largest, means to each operator: more is farther from no change."""
    amounts = {
        Operator.POSTERIZE: 4 - np.floor(4 * level),
        Operator.SOLARIZE: 256 - np.floor(256 * level),
        Operator.SOLARIZE_ADD: np.floor(110 * level),
        **{factor: np.maximum(0.1, 1 + sign * 0.9 * level) for factor in FACTORS},
        **{move: sign * most * level for move, most in _MOVES.items()},
    }
    found = np.zeros_like(level)
    for each, values in amounts.items():
        found = np.where(operator == each, values, found)
    return found
