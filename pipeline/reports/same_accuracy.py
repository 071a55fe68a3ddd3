"""What runs spent to reach one accuracy: the only fair reading of curves that cost and took differently."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from pipeline.reports.history import Accuracy, History


@dataclass(frozen=True)
class Reached:
    """What a run had spent when it first reached an accuracy; `at_once` if its first probe was there already."""

    cost: float
    seconds: float
    samples: float
    at_once: bool


def common_accuracy(histories: Sequence[History]) -> float | None:
    """Return the highest accuracy that every run has reached, None if one of them was never probed."""
    best = [max((probe.top1 for probe in history.probes), default=None) for history in histories]
    reached = [top1 for top1 in best if top1 is not None]
    return min(reached) if reached and len(reached) == len(best) else None


def reached(history: History, accuracy: float) -> Reached | None:
    """Return what it took to reach an accuracy, linearly between the two probes around the first crossing."""
    before: Accuracy | None = None
    for probe in history.probes:
        if probe.top1 >= accuracy:
            return _crossing(before, probe, accuracy)
        before = probe
    return None


def _crossing(before: Accuracy | None, after: Accuracy, accuracy: float) -> Reached:
    if before is None:
        return Reached(after.cost, after.seconds, after.samples, at_once=True)
    share = (accuracy - before.top1) / (after.top1 - before.top1)

    def between(a: float, b: float) -> float:
        return a + share * (b - a)

    return Reached(
        between(before.cost, after.cost),
        between(before.seconds, after.seconds),
        between(before.samples, after.samples),
        at_once=False,
    )


def reached_by_all(histories: Mapping[str, History]) -> tuple[float, dict[str, Reached]] | None:
    """Return the best common accuracy and what each run spent on it, None if there is none."""
    accuracy = common_accuracy(list(histories.values()))
    if accuracy is None:
        return None
    spent = {name: reached(history, accuracy) for name, history in histories.items()}
    return accuracy, {name: each for name, each in spent.items() if each is not None}
