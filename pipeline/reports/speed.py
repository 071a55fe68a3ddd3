"""How fast the run was, where its time went, and what compression and freezing have saved of it."""

from __future__ import annotations

import math
from collections.abc import Sequence

from pipeline.reports import html
from pipeline.reports.charts import Line, Look, curves, shares
from pipeline.reports.numbers import amount, factor, percent, seconds_text
from pipeline.reports.record import Record
from pipeline.reports.savings import Stage

PHASE_NAMES = {
    "start": "start, first step",
    "data": "waiting for data",
    "tune": "choosing compression",
    "forward": "forward",
    "backward": "backward",
    "step": "gradients, update",
    "report": "reporting, agreeing",
    "probe": "k-NN probes",
    "save": "waiting for saves",
    "end": "end",
}
SHOWN_SHARE = 1e-3


def speed(record: Record) -> str:
    """Return throughput over the budget and the phases of a step."""
    history = record.history
    if not history.points:
        return ""
    x = history.curve("budget_spent")
    begins = [
        p["budget_spent"] for p, before in zip(history.points[1:], history.points, strict=False) if p.life > before.life
    ]
    axis = f"budget ({record.budget_unit})"

    def chart(title: str, name: str, unit: str, scale: float = 1.0) -> tuple[str, str]:
        y = [scale * value for value in history.curve(name)]
        return title, curves([Line(title, x, y)], Look(axis, unit, from_zero=True, begins=begins))

    pictures = [
        chart("Images a second", "samples_per_second", "images / s"),
        chart("Tokens a second", "tokens_per_second", "tokens / s"),
        chart("Waiting for data", "data_wait_ratio", "% of the time", 100),
    ]
    lives = "Dotted lines: the run went on after an interruption. " if begins else ""
    note = f"{lives}Phases are the main process's as its host sees them: a GPU may be busy with what was asked before."
    return html.section("Speed", html.charts([*pictures, *_phases(record)]), html.paragraph(note, "note"))


def _phases(record: Record) -> list[tuple[str, str]]:
    seconds = record.history.phase_seconds
    total = sum(seconds.values())
    shown = {phase: spent for phase, spent in seconds.items() if spent > SHOWN_SHARE * total}
    if not shown:
        return []
    labels = [f"{percent(spent / total)}, {seconds_text(spent)}" for spent in shown.values()]
    names = [PHASE_NAMES[phase] for phase in shown]
    return [(f"Where {seconds_text(total)} went", shares(names, list(shown.values()), labels))]


def saved(record: Record) -> str:
    """Return, stage by stage, what the cost formula promised and what the clock says."""
    found = record.savings
    if not found.stages:
        return ""
    head = ["budget", "patch", "dropout", "tokens q/k", "frozen", "samples", "cost / image", "images/s"]
    head += ["promised", "realized", "of the promise"]
    rows = [[*_shape(stage), *_speed(stage), *_worth(stage.promised, found.realized(stage))] for stage in found.stages]
    return html.section(
        "What was saved",
        html.paragraph(
            "A token that is not processed is time that is not spent. Promised: the cost of an image with nothing "
            "compressed or frozen over its cost in the stage, by the formula. Realized: images a second over those of "
            "this run's own stage without compression and freezing (medians of reports). More than the promise is what "
            "the formula leaves out, attention above all, or another load on the machine."
        ),
        html.paragraph(_verdict(record)),
        html.table(head, rows),
    )


def _shape(stage: Stage) -> list[str]:
    patch, dropout, query, key, frozen = stage.shape
    return [
        f"{100 * stage.begin:.1f} - {100 * stage.end:.1f} %",
        f"{patch:.0f}",
        f"{dropout:.2f}",
        f"{query:.0f} / {key:.0f}",
        f"{frozen:.0f}",
    ]


def _speed(stage: Stage) -> list[str]:
    return [amount(stage.samples), f"{stage.cost:.4g}", amount(stage.samples_per_second)]


def _worth(promised: float, realized: float | None) -> list[str]:
    if realized is None:
        return [factor(promised), "-", "-"]
    # Of a saving, not of a speed: 1.0 x promises nothing.
    gained = (1 - 1 / realized) / (1 - 1 / promised) if promised - 1 > SHOWN_SHARE and realized > 0 else math.nan
    return [factor(promised), factor(realized), percent(gained)]


def _verdict(record: Record) -> str:
    found = record.savings
    cost = sum(stage.samples * stage.cost for stage in found.stages)
    whole_cost = sum(stage.samples * stage.uncompressed_cost for stage in found.stages)
    if not math.isfinite(whole_cost):
        return "The run did not report what its images would cost without compression: nothing can be said of it."
    both = f"{amount(cost)} instead of {amount(whole_cost)}"
    promise = f"In units of cost: {both} for the same images, {factor(found.promised)}."
    if all(stage.is_whole for stage in found.stages):
        return f"{promise} Nothing was compressed or frozen."
    if found.whole_seconds is None:
        return (
            f"{promise} By the clock it cannot be said: no stage of this run is without compression and freezing. "
            "A run without, named in against=[...], tells."
        )
    return (
        f"{promise} By the clock: {seconds_text(found.seconds)} instead of {seconds_text(found.whole_seconds)}, "
        f"{factor(found.whole_seconds / found.seconds)}."
    )


def compared(records: Sequence[Record]) -> str:
    """Return the runs of a comparison in numbers, nothing of a single run."""
    rows = []
    for record in records if len(records) > 1 else []:
        last, best = record.history.last, max((p.top1 for p in record.history.probes), default=None)
        rows.append(
            [
                record.name,
                "ALARM" if record.status.alarm else record.status.state,
                percent(record.status.progress),
                amount(last.totals["samples_total"]) if last else "-",
                amount(last.totals["cost_total"]) if last else "-",
                seconds_text(last.seconds if last else None),
                amount(last["loss"]) if last else "-",
                percent(best),
            ]
        )
    head = ["run", "state", "done", "samples", "cost", "training time", "last loss", "best k-NN"]
    return html.section("Side by side", html.table(head, rows))
