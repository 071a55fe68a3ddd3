"""Student's t distribution, which neither torch nor the standard library has."""

from __future__ import annotations

import math


def two_sided(confidence: float, degrees: int) -> float:
    """Return the t that bounds |t| with probability `confidence`, given the degrees of freedom."""
    assert 0 <= confidence < 1
    assert degrees >= 1
    low, high = 0.0, 1.0
    while _inside(high, degrees) < confidence:
        high *= 2
    while (middle := (low + high) / 2) not in (low, high):
        low, high = (middle, high) if _inside(middle, degrees) < confidence else (low, middle)
    return low


def _inside(t: float, degrees: int) -> float:
    """Return the probability of [-t, t] (Abramowitz and Stegun, 1964, 26.7.3 and 26.7.4)."""
    angle = math.atan(t / math.sqrt(degrees))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = degrees % 2
    term, series = (cosine if odd else 1.0), 0.0
    for power in range(odd, degrees - 1, 2):
        series += term
        term *= (power + 1) / (power + 2) * cosine**2
    return 2 / math.pi * (angle + sine * series) if odd else sine * series
