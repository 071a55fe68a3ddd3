"""What was promised and what was realized: stages of a run, their cost by the formula and their time by the clock."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby, pairwise

from pipeline.reports.history import History, Point

SHAPE = ("patch_size_pixels", "token_dropout_ratio", "query_tokens", "key_tokens", "frozen_layers")
# Costs of a sample that differ by less are the same but for rounding.
SAME = 1e-6


@dataclass(frozen=True)
class Stage:
    """A stretch of a run in which every step had the same shape."""

    begin: float
    end: float
    # As `SHAPE`.
    shape: tuple[float, ...]
    samples: float
    # Of one sample; the other one with nothing compressed or frozen, nan in runs that did not report it.
    cost: float
    uncompressed_cost: float
    # Median of its reports, without those that begin a life or the stage.
    samples_per_second: float

    @property
    def promised(self) -> float:
        """Return how many times faster the cost formula says that the stage is than one without compression."""
        return self.uncompressed_cost / self.cost if self.cost else math.nan

    @property
    def is_whole(self) -> bool:
        """Return whether nothing is compressed or frozen."""
        # A frozen embedding alone costs what it did, by the formula, and yet saves time.
        return abs(self.promised - 1) < SAME and self.shape[SHAPE.index("frozen_layers")] == 0


@dataclass(frozen=True)
class Savings:
    """The stages of a run and what they add up to."""

    stages: Sequence[Stage]

    @property
    def whole_rate(self) -> float | None:
        """Return the samples a second of the longest stage without compression, None if there is none."""
        whole = [stage for stage in self.stages if stage.is_whole and stage.samples_per_second > 0]
        return max(whole, key=lambda stage: stage.samples).samples_per_second if whole else None

    @property
    def promised(self) -> float:
        """Return the promise of all stages together, by their samples."""
        cost = sum(stage.samples * stage.cost for stage in self.stages)
        return sum(stage.samples * stage.uncompressed_cost for stage in self.stages) / cost if cost else math.nan

    @property
    def seconds(self) -> float:
        """Return the time of all samples, each at its stage's median speed."""
        return sum(stage.samples / stage.samples_per_second for stage in self.stages if stage.samples_per_second > 0)

    def realized(self, stage: Stage) -> float | None:
        """Return how many times faster a stage was than the run's own stage without compression, None without one."""
        return stage.samples_per_second / self.whole_rate if self.whole_rate else None

    @property
    def whole_seconds(self) -> float | None:
        """Return the time that all samples would have taken at the speed of the stage without compression."""
        return sum(stage.samples for stage in self.stages) / self.whole_rate if self.whole_rate else None


def savings(history: History) -> Savings:
    """Return a run's stages.

    A report belongs to the shape of its last step. Where a report begins a stage, some of its steps were of the one
    before: it counts for the samples, and for cost and speed only where the stage has no other.
    """
    stages: list[Stage] = []
    points = list(history.points)
    index = 0
    for shape, group in groupby(points, key=_shape):
        inside = list(group)
        before = points[index - 1] if index else None
        begin = before["progress_ratio"] if before else 0.0
        stages.append(_stage(shape, begin, before, inside))
        index += len(inside)
    return Savings(stages)


def _shape(point: Point) -> tuple[float, ...]:
    return tuple(point[name] for name in SHAPE)


def _stage(shape: tuple[float, ...], begin: float, before: Point | None, inside: Sequence[Point]) -> Stage:
    first, last = inside[0], inside[-1]
    clean = [pair for pair in pairwise(inside) if pair[0].life == pair[1].life]
    # Nothing but one report: the interval that begins the stage has to do.
    intervals: Sequence[tuple[Point | None, Point]] = clean or [(before, first)]
    return Stage(
        begin,
        last["progress_ratio"],
        shape,
        last.totals["samples_total"] - (before.totals["samples_total"] if before else 0.0),
        _per_sample(intervals, "cost_total", "tuning_cost_total"),
        _per_sample(intervals, "uncompressed_cost_total"),
        statistics.median([after["samples_per_second"] for _, after in intervals]),
    )


def _per_sample(intervals: Sequence[tuple[Point | None, Point]], name: str, without: str = "") -> float:
    def counted(counter: str) -> float:
        return sum(b.totals[counter] - (a.totals[counter] if a else 0.0) for a, b in intervals)

    samples = counted("samples_total")
    return (counted(name) - (counted(without) if without else 0.0)) / samples if samples else math.nan
