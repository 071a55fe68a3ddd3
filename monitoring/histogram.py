"""Durations, counted in buckets."""

from __future__ import annotations

from bisect import bisect_left
from itertools import accumulate

# Upper bounds in seconds: from a small model's phase to a save that blocks.
BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0)


class Histogram:
    """How many durations fell where; written by one thread, read by any."""

    def __init__(self) -> None:
        self.total = 0.0
        self._counts = [0] * (len(BOUNDS) + 1)

    def observe(self, seconds: float) -> None:
        """Count one duration."""
        self._counts[bisect_left(BOUNDS, seconds)] += 1
        self.total += seconds

    def buckets(self) -> list[tuple[str, float]]:
        """Return how many were at most as long as each bound, as Prometheus wants them; the last is "+Inf"."""
        bounds = [*(f"{bound:g}" for bound in BOUNDS), "+Inf"]
        return list(zip(bounds, map(float, accumulate(self._counts)), strict=True))
