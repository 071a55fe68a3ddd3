"""Command: where every run is, or one of them; reads files only."""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import NamedTuple, TypeVar

from pipeline.run_status import RunStatus, look_at, run_directories

# Heartbeats are written every 5 s; a network file system may show them a minute late.
SILENT_SECONDS = 120.0
ALARM = 1
T = TypeVar("T")
# Who needs somebody comes first.
ORDER = ("unreadable", "running", "starting", "hung", "failed", "stopped", "finished")


@dataclass
class StatusConfig:
    """A look at one run, or at all of a folder; exit code 1 if the one that was named has gone silent."""

    # Empty: every run below `runs`.
    run: str = ""
    runs: str = "runs"
    # A run that says it is running and has left no trace for so long is in alarm.
    silent_seconds: float = SILENT_SECONDS
    # For machines: a list of objects.
    json: bool = False

    def __post_init__(self) -> None:
        if not self.silent_seconds > 0:
            raise ValueError(f"silent_seconds must be above 0, got {self.silent_seconds:g}; 120 is usual.")
        if self.run and Path(self.run).name != self.run:
            raise ValueError(f"run must be a plain name without slashes, got {self.run!r}; use runs=DIR for the place.")


def run(config: StatusConfig) -> int:
    """Print a line for each run; return 1 if the run that was asked for is in alarm."""
    found = sorted(
        (look_at(directory, config.silent_seconds) for directory in _directories(config)),
        key=lambda status: (not status.alarm, _place(status.state), status.heard_age or 0.0, status.run),
    )
    if config.json:
        print(json.dumps([_object(status) for status in found], indent=1, allow_nan=False))
    else:
        print(table(found, _width()) if found else f"no runs in {config.runs}.")
    return ALARM if config.run and any(status.alarm for status in found) else 0


def _object(status: RunStatus) -> dict[str, object]:
    """Return what JSON can say of a run: it knows no nan."""
    return {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in asdict(status).items()}


def _directories(config: StatusConfig) -> list[Path]:
    runs = Path(config.runs)
    if not config.run:
        if not runs.is_dir():
            raise ValueError(f"runs: no folder at {runs}; give runs=DIR.")
        return list(run_directories(runs))
    if not (runs / config.run).is_dir():
        raise ValueError(f"run: no run in {runs / config.run}; give run=NAME and, if it is elsewhere, runs=DIR.")
    return [runs / config.run]


def _place(state: str) -> int:
    return ORDER.index(state) if state in ORDER else 0


def _width() -> int:
    # In a pipe nothing is cut but by 120 columns.
    return shutil.get_terminal_size((120, 24)).columns if os.isatty(1) or "COLUMNS" in os.environ else 120


class Column(NamedTuple):
    """A column of the table; where the table is too wide, the one with the largest `rank` goes first."""

    title: str
    rank: int
    text: Callable[[RunStatus], str]


COLUMNS = (
    Column("state", 0, lambda s: "ALARM" if s.alarm else s.state),
    Column("done", 0, lambda s: _text(s.progress, lambda p: f"{100 * p:.1f} %")),
    Column("step", 6, lambda s: _text(s.step, lambda n: f"{n:,}")),
    Column("left", 1, lambda s: _text(s.eta_seconds if s.state == "running" and not s.alarm else None, duration)),
    Column("images/s", 4, lambda s: _text(s.samples_per_second, lambda n: f"{n:,.0f}")),
    Column("loss", 5, lambda s: _text(s.loss, lambda n: f"{n:.4g}")),
    Column("k-NN", 3, lambda s: _text(s.knn_top1, lambda n: f"{100 * n:.1f} %")),
    Column("eval", 7, lambda s: _text(s.evaluated_top1, lambda n: f"{100 * n:.1f} %")),
    Column("saved", 2, lambda s: _text(s.checkpoint_age, lambda n: f"{duration(n)} ago")),
    Column("heard", 1, lambda s: _text(s.heard_age, lambda n: f"{duration(n)} ago")),
)
NAME_WIDTH = 32


def table(found: Sequence[RunStatus], width: int) -> str:
    """Return an aligned table of at most `width` columns; below a run, why it is not well."""
    columns = list(COLUMNS)
    while True:
        rows = [["run", *(c.title for c in columns)]]
        rows += [[shortened(s.run, NAME_WIDTH), *(c.text(s) for c in columns)] for s in found]
        widths = [max(map(len, cells)) for cells in zip(*rows, strict=True)]
        if sum(widths) + 2 * len(columns) <= width or all(c.rank == 0 for c in columns):
            break
        columns.remove(max(columns, key=lambda c: c.rank))
    lines = [_line(rows[0], widths)]
    for status, cells in zip(found, rows[1:], strict=True):
        lines.append(_line(cells, widths))
        if status.reason:
            lines.append(shortened(f"  {' '.join(status.reason.split())}", width))
    return "\n".join(lines)


def _line(cells: Sequence[str], widths: Sequence[int]) -> str:
    """Left: run and state; right: numbers."""
    left = [f"{cell:<{w}}" for cell, w in zip(cells[:2], widths[:2], strict=True)]
    right = [f"{cell:>{w}}" for cell, w in zip(cells[2:], widths[2:], strict=True)]
    return "  ".join([*left, *right]).rstrip()


def shortened(text: str, width: int) -> str:
    """Return a text cut to a width."""
    return text if len(text) <= width else f"{text[: width - 3]}..."


def _text(value: T | None, form: Callable[[T], str]) -> str:
    return "-" if value is None else form(value)


def duration(seconds: float) -> str:
    """Return a length of time in its largest unit."""
    for unit, length, limit in (("s", 1, 90), ("min", 60, 5400), ("h", 3600, 48 * 3600)):
        if seconds < limit:
            return f"{seconds / length:.3g} {unit}" if unit == "h" else f"{seconds / length:.0f} {unit}"
    return f"{seconds / 86400:.0f} d"
