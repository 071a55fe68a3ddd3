"""What the run has learned: loss and accuracy against budget, samples and time, and what runs spent on one accuracy."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

from pipeline.reports import html
from pipeline.reports.charts import Line, Look, curves
from pipeline.reports.history import Accuracy, Point
from pipeline.reports.numbers import amount, percent, seconds_text, time_unit
from pipeline.reports.record import Record
from pipeline.reports.same_accuracy import reached_by_all


class _Axis(NamedTuple):
    """A way to read how far a run was: its name, of a report, of a probe."""

    name: str
    of_report: Callable[[Point], float]
    of_probe: Callable[[Accuracy], float]


def learning(records: Sequence[Record]) -> str:
    """Return loss and k-NN of some runs, the first of which the page is about."""
    axes = _axes(records)
    losses = [(f"Training loss, by {axis.name.split(' (')[0]}", _losses(records, axis)) for axis in axes]
    probed = [record for record in records if record.history.probes]
    accuracies = [(f"k-NN, by {axis.name.split(' (')[0]}", _accuracies(probed, axis)) for axis in axes]
    return html.section(
        "Learning",
        *(_warnings(record) for record in records),
        html.charts(losses) if any(record.history.points for record in records) else "",
        html.charts(accuracies) if probed else html.paragraph("No k-NN probe was run.", "note"),
    )


def _axes(records: Sequence[Record]) -> list[_Axis]:
    longest = max((r.history.last.seconds for r in records if r.history.last), default=0.0)
    unit, length = time_unit(longest)
    time = _Axis(f"training time ({unit})", lambda point: point.seconds / length, lambda probe: probe.seconds / length)
    cost = _Axis("cost (units)", lambda point: point.totals["cost_total"], lambda probe: probe.cost)
    samples = _Axis("samples", lambda point: point.totals["samples_total"], lambda probe: probe.samples)
    units = {record.budget_unit for record in records}
    budget = _Axis(f"budget ({units.pop()})", lambda point: point["budget_spent"], lambda probe: probe.budget)
    # Budgets in different units cannot be laid side by side; cost can.
    return [cost if units or "cost" in budget.name else budget, samples, time]


def _losses(records: Sequence[Record], axis: _Axis) -> str:
    lines = [
        Line(r.name, [axis.of_report(point) for point in r.history.points], r.history.curve("loss")) for r in records
    ]
    return curves(lines, Look(axis.name, "loss", end=_end(records, axis)))


def _accuracies(records: Sequence[Record], axis: _Axis) -> str:
    lines = [
        Line(r.name, [axis.of_probe(p) for p in r.history.probes], [100 * p.top1 for p in r.history.probes])
        for r in records
    ]
    return curves(lines, Look(axis.name, "k-NN top-1 (%)", marks=True, end=_end(records, axis)))


def _end(records: Sequence[Record], axis: _Axis) -> float:
    """Return where the longest run is, also where its last losses are no numbers."""
    ends = [axis.of_report(record.history.last) for record in records if record.history.last]
    return max((end for end in ends if math.isfinite(end)), default=0.0)


def _warnings(record: Record) -> str:
    history, told = record.history, []
    if not history.points:
        told.append("has not reported yet, or its metrics.jsonl cannot be read")
    elif lost := sum(not math.isfinite(loss) for loss in history.curve("loss")):
        told.append(f"{lost} of {len(history.points)} reports have a loss that is no number: the gaps of its curve")
    if history.damaged:
        told.append(f"{history.damaged} lines of metrics.jsonl are damaged and left out")
    return html.paragraph(f"{record.name}: {'; '.join(told)}.", "warning") if told else ""


def same_accuracy(records: Sequence[Record]) -> str:
    """Return what each of several runs spent to reach the best accuracy that all have, nothing of a single run."""
    if len(records) < 2:
        return ""
    found = reached_by_all({record.name: record.history for record in records})
    if found is None:
        return html.section("To the same k-NN", html.paragraph("Not every run was probed: it cannot be said.", "note"))
    accuracy, spent = found
    first = spent[records[0].name]
    rows = [
        [
            name,
            *(amount(each.cost), _times(first.cost, each.cost)),
            *(seconds_text(each.seconds), _times(first.seconds, each.seconds)),
            *(amount(each.samples), "first probe" if each.at_once else ""),
        ]
        for name, each in spent.items()
    ]
    head = ["run", "cost", "its ratio", "training time", "its ratio", "samples", "reached at"]
    return html.section(
        "To the same k-NN",
        html.paragraph(
            f"What each run had spent when its online k-NN first reached {percent(accuracy)}, the highest that all "
            f"have reached; between two probes the line is taken, and ratios are to {records[0].name}. Training time "
            "is without the pauses between lives. Who was there at the first probe spent at most that. Probes see few "
            "samples: differences of some percent are noise."
        ),
        html.table(head, rows),
    )


def _times(first: float, other: float) -> str:
    return f"{other / first:.2f} x" if first else "-"
