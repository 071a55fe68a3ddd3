"""A walk over the grid: what was measured around the present cell, and when it is enough to move."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pipeline.compression.adaptive import FittedAdaptive, GridCell


class Comparison(NamedTuple):
    """By how much the error of a neighbor is above that of the present cell, and the standard error of that."""

    difference: float
    error: float


class Evidence(NamedTuple):
    """A mean of comparisons that forgets: sums of weights, of weighted differences, of weighted squared errors."""

    weight: float = 0.0
    total: float = 0.0
    variance: float = 0.0
    progress: float = 0.0

    def after(self, seen: Comparison, progress: float, memory: float) -> Evidence:
        """Return the evidence with one more comparison, all earlier ones fading by exp(-passed / memory)."""
        kept = math.exp((self.progress - progress) / memory)
        return Evidence(
            kept * self.weight + 1,
            kept * self.total + seen.difference,
            kept**2 * self.variance + seen.error**2,
            progress,
        )

    def reversed(self) -> Evidence:
        """Return the same as seen from the other cell."""
        return self._replace(total=-self.total)

    def mean(self) -> Comparison:
        """Return the weighted mean and its standard error."""
        return Comparison(self.total / self.weight, self.variance**0.5 / self.weight)


@dataclass(frozen=True)
class Move:
    """A step to a neighbor and why: the mean comparison with it."""

    before: GridCell
    after: GridCell
    reason: Comparison


class Search:
    """Where a run stands on the grid. `numbers` is all there is to it, as JSON that a checkpoint can hold.

    Evidence belongs to a pair of neighbors, so that what was seen from the one still counts at the other: going back
    takes as much evidence to the contrary.
    """

    def __init__(self, grid: FittedAdaptive, numbers: Mapping[str, Any]) -> None:
        """Go on from what `numbers` returned; from nothing, or from a cell of another grid, at the grid's start."""
        self._grid = grid
        cell = (*numbers.get("cell", ()),)
        self.cell: GridCell = cell if cell in grid.grid() else grid.start
        self.spent: float = numbers.get("spent", 0.0)
        self._evidence = {pair: Evidence(*each) for pair, each in numbers.get("evidence", {}).items()}

    def numbers(self) -> dict[str, Any]:
        """Return the present cell, what measuring has cost, and the evidence."""
        evidence = {pair: [*each] for pair, each in self._evidence.items()}
        return {"cell": [*self.cell], "spent": self.spent, "evidence": evidence}

    def observe(self, seen: Mapping[GridCell, Comparison], progress: float) -> Move | None:
        """Take in how all neighbors compare with the present cell; move if one is better beyond doubt.

        What is not finite is not looked at. A tie is no reason to move.
        """
        if not all(math.isfinite(number) for comparison in seen.values() for number in comparison):
            return None
        for neighbor, comparison in seen.items():
            known = self._about(neighbor)
            self._remember(neighbor, known.after(comparison, progress, self._grid.memory))
        best = min(seen, key=self._upper_bound)
        if not self._upper_bound(best) < 0:
            return None
        move = Move(self.cell, best, self._about(best).mean())
        self.cell = best
        return move

    def _upper_bound(self, neighbor: GridCell) -> float:
        """Return the difference that a neighbor is below for all that is known."""
        difference, error = self._about(neighbor).mean()
        return difference + self._grid.evidence * error

    def _about(self, neighbor: GridCell) -> Evidence:
        known = self._evidence.get(_pair(self.cell, neighbor), Evidence())
        return known if self.cell < neighbor else known.reversed()

    def _remember(self, neighbor: GridCell, evidence: Evidence) -> None:
        pair = _pair(self.cell, neighbor)
        self._evidence[pair] = evidence if self.cell < neighbor else evidence.reversed()


def _pair(one: GridCell, other: GridCell) -> str:
    """Return one name for both orders of two cells: the second compared with the first, the smaller one."""
    return " ".join(f"{size}/{dropout}" for size, dropout in sorted((one, other)))
