"""What stands at the ends of the page: the run in a few numbers, evaluations, lives, and how it was started."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from datetime import datetime
from itertools import zip_longest

from pipeline.reports import html
from pipeline.reports.lives import BROKEN_OFF, Life, losses
from pipeline.reports.numbers import amount, factor, percent, seconds_text
from pipeline.reports.record import Record


def summary(record: Record) -> str:
    """Return the run in a few numbers."""
    status, last = record.status, record.history.last
    best = max((probe.top1 for probe in record.history.probes), default=None)
    evaluated = max((top1 for each in record.evaluations for _, top1 in each.results), default=None)
    found = record.savings
    numbers = [
        ("state", "ALARM" if status.alarm else status.state),
        (f"of {amount(last['budget_total'])} {record.budget_unit}" if last else "done", percent(status.progress)),
        ("last loss", f"{last['loss']:.4g}" if last else "-"),
        ("best online k-NN", percent(best)),
        ("best evaluation", percent(evaluated)),
        ("images / s, median", amount(statistics.median(record.history.curve("samples_per_second"))) if last else "-"),
        ("images", amount(last.totals["samples_total"]) if last else "-"),
        (f"training time, {max(1, len(record.lives))} li{'fe' if len(record.lives) < 2 else 'ves'}", _time(record)),
        ("promised speed-up", factor(found.promised) if last else "-"),
        ("realized", factor(found.whole_seconds / found.seconds) if found.whole_seconds and found.seconds else "-"),
    ]
    reason = html.paragraph(status.reason, "warning") if status.reason else ""
    return "\n".join((html.heading(record.name), html.paragraph(_what(record), "note"), html.tiles(numbers), reason))


def _time(record: Record) -> str:
    return seconds_text(record.history.last.seconds if record.history.last else None)


def _what(record: Record) -> str:
    """Say in a line what was trained."""
    model, config = record.config.get("model", {}), record.config
    machine = record.lives[-1].machine if record.lives else ""
    parts = [
        record.chosen("method"),
        f"{model.get('name', '')} at {model.get('image_size', '?')} px" if model else "",
        f"batch {config['batch_size']:,}" if isinstance(config.get("batch_size"), int) else "",
        *(f"{group} {record.chosen(group)}" for group in ("compression", "freeze", "engine") if record.chosen(group)),
        str(config.get("data", {}).get("shards", "")),
        f"on {machine}" if machine else "",
    ]
    return " · ".join(filter(None, parts)) or "config.yaml cannot be read."


def evaluations(record: Record) -> str:
    """Return every figure of eval/."""
    names = list(dict.fromkeys(name for each in record.evaluations for name, _ in each.results))
    rows = [
        [each.file, each.checkpoint, *(percent(dict(each.results).get(name)) for name in names), each.samples]
        for each in record.evaluations
    ]
    # k-NN's results are named by k alone.
    titles = [f"k = {name}" if name.isdigit() else name for name in names]
    note = html.paragraph("Top-1 accuracy.", "note") if rows else ""
    return html.section("Evaluations", note, html.table(["file", "checkpoint", *titles, "support / queries"], rows))


def lives(record: Record) -> str:
    """Return when each life began, how it ended, and what that cost."""
    if not record.lives:
        return html.section("Lives", html.paragraph("train.log cannot be read: lives are not known.", "note"))
    rows = [
        [
            str(number),
            f"{datetime.fromtimestamp(life.began):%Y-%m-%d %H:%M:%S}",
            seconds_text(life.heard - life.began),
            f"{life.first_step:,} - {life.last_step:,}",
            f"{loss.steps:,}" if loss else "-",
            seconds_text(loss.seconds) if loss else "-",
            seconds_text(loss.pause) if loss else "-",
            _end(life, is_last=loss is None, record=record),
            life.machine,
        ]
        for number, (life, loss) in enumerate(zip_longest(record.lives, losses(record.lives)), start=1)
    ]
    head = ["life", "began", "lasted", "steps", "steps lost", "time lost", "until the next", "end", "machine"]
    return html.section("Lives", html.paragraph(_lost(record.lives), "note"), html.table(head, rows, long="end"))


def _end(life: Life, *, is_last: bool, record: Record) -> str:
    if life.end:
        return life.end
    return "goes on" if is_last and record.status.state == "running" and not record.status.alarm else BROKEN_OFF


def _lost(all_lives: Sequence[Life]) -> str:
    found = losses(all_lives)
    if not found:
        return "One life, never interrupted."
    steps, seconds, pause = (sum(getattr(loss, name) for loss in found) for name in ("steps", "seconds", "pause"))
    return (
        f"{len(all_lives)} lives: {steps:,} steps, {seconds_text(seconds)}, were lost and done again as far as "
        f"train.log tells (to the last report before the end); {seconds_text(pause)} passed between lives, "
        "starts and queues included."
    )


def environment(record: Record) -> str:
    """Return versions, command and configuration."""
    packages = record.environment.get("packages", {})
    versions = {"python": str(record.environment.get("python", "")).split(" ")[0]} | packages
    rows = [[name, str(version)] for name, version in versions.items() if version]
    rows += [["platform", str(record.environment["platform"])]] if record.environment.get("platform") else []
    slurm = record.environment.get("slurm", {})
    rows += [
        [name, str(slurm[name])] for name in ("SLURM_JOB_ID", "SLURM_JOB_NODELIST", "SLURM_NTASKS") if name in slurm
    ]
    command = " ".join(map(str, record.environment.get("command", [])))
    return html.section(
        "Environment",
        html.table(["of the last life", "version"], rows),
        html.folded("command", command),
        html.folded("overrides", record.overrides_text),
        html.folded("configuration", record.config_text),
    )
