"""A run's reports as curves: counters that go on over its lives, against budget, samples, cost and time."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from monitoring.metrics import PHASES, seconds_in

# What a process counts from zero.
COUNTERS = (
    "samples_total",
    "tokens_total",
    "cost_total",
    "uncompressed_cost_total",
    "tuning_cost_total",
    "skipped_steps_total",
)
Row = Mapping[str, float]


@dataclass(frozen=True)
class Point:
    """One report, and all that was counted up to it; steps that were lost and done again count once."""

    life: int
    # Of training, from its first step on; the time between lives is left out.
    seconds: float
    totals: Mapping[str, float]
    row: Row

    def __getitem__(self, name: str) -> float:
        """Return a number of the report, nan if it has none."""
        return self.row.get(name, math.nan)


@dataclass(frozen=True)
class Accuracy:
    """The k-NN accuracy of one probe, and where the run was."""

    top1: float
    budget: float
    seconds: float
    samples: float
    cost: float


@dataclass(frozen=True)
class History:
    """Every report of a run, oldest first."""

    points: Sequence[Point] = ()
    probes: Sequence[Accuracy] = ()
    # Lines of the file that are no report.
    damaged: int = 0
    # Of the main process, over all lives; empty for runs that did not report them.
    phase_seconds: Mapping[str, float] = field(default_factory=dict)

    def curve(self, name: str) -> list[float]:
        """Return a number of all reports, nan where there is none."""
        return [point[name] for point in self.points]

    def has(self, name: str) -> bool:
        """Return whether any report has a number of this name."""
        return any(math.isfinite(value) for value in self.curve(name))

    @property
    def last(self) -> Point | None:
        """Return the newest report."""
        return self.points[-1] if self.points else None


def read_history(path: Path) -> History:
    """Return the history in a metrics.jsonl; one that is missing or unreadable is empty."""
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return History()
    rows = [row for row in map(_row, lines) if row is not None]
    points = _accumulated([row for row in rows if "loss" in row])
    return History(points, _probes(points, rows), len(lines) - len(rows), _phases(points))


def _row(line: bytes) -> Row | None:
    try:
        content = json.loads(line)
        return {str(name): math.nan if value is None else float(value) for name, value in content.items()}
    except (ValueError, TypeError, AttributeError):
        return None


def _accumulated(rows: Sequence[Row]) -> list[Point]:
    points: list[Point] = []
    before: Row = {}
    for row in rows:
        previous = points[-1] if points else None
        if previous is None:
            points.append(Point(0, _first_seconds(row), {name: row.get(name, math.nan) for name in COUNTERS}, row))
        elif row.get("steps_total", 0) > before.get("steps_total", 0):
            points.append(_later(previous, row))
        else:
            points.append(_reborn(previous, row))
        before = row
    return points


def _first_seconds(row: Row) -> float:
    """Return the time that the steps of a life's first report took."""
    return row.get("steps_total", 0.0) * row.get("step_seconds", 0.0)


def _later(previous: Point, row: Row) -> Point:
    totals = {name: previous.totals[name] + row.get(name, math.nan) - previous[name] for name in COUNTERS}
    return Point(previous.life, previous.seconds + max(0.0, row["time"] - previous["time"]), totals, row)


def _reborn(previous: Point, row: Row) -> Point:
    """Return the first point of a life, whose counters start anew.

    Between the last report of the life before and the checkpoint there may be steps that no report is left of: they
    are counted like those just before them.
    """
    missing = max(0.0, row["step"] - row.get("steps_total", 0.0) - previous["step"])
    steps = max(1.0, previous["steps_total"])
    totals = {
        name: previous.totals[name] + row.get(name, math.nan) + missing * previous[name] / steps for name in COUNTERS
    }
    seconds = previous.seconds + missing * previous["step_seconds"] + _first_seconds(row)
    return Point(previous.life + 1, seconds, totals, row)


def _probes(points: Sequence[Point], rows: Sequence[Row]) -> list[Accuracy]:
    """Place each probe among the reports by its step."""
    found = {row["step"]: row["knn_top1_ratio"] for row in rows if "knn_top1_ratio" in row and "step" in row}
    if not points:
        return []
    steps = [point["step"] for point in points]
    asked = sorted(step for step, top1 in found.items() if math.isfinite(top1))

    def at(value: Callable[[Point], float]) -> list[float]:
        return [float(each) for each in np.interp(asked, steps, [value(point) for point in points])]

    places = zip(
        at(lambda p: p["budget_spent"]),
        at(lambda p: p.seconds),
        at(lambda p: p.totals["samples_total"]),
        at(lambda p: p.totals["cost_total"]),
        strict=True,
    )
    return [Accuracy(found[step], *place) for step, place in zip(asked, places, strict=True)]


def _phases(points: Sequence[Point]) -> dict[str, float]:
    """Return the seconds in each phase: what the last report of each life says."""
    last = {point.life: point for point in points}.values()
    sums = {phase: sum(point[seconds_in(phase)] for point in last) for phase in PHASES}
    return {phase: seconds for phase, seconds in sums.items() if math.isfinite(seconds)}
