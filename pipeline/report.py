"""Command: one page of a run, or of several side by side; a file of its own that loads nothing from anywhere."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field
from datetime import datetime
from pathlib import Path

from data.publishing import write_atomically
from pipeline.reports import html
from pipeline.reports.course import course
from pipeline.reports.learning import learning, same_accuracy
from pipeline.reports.papers import environment, evaluations, lives, summary
from pipeline.reports.record import Record, read_record
from pipeline.reports.speed import compared, saved, speed
from pipeline.run_status import CONFIG_NAME

# As long as `coldpress status` waits by default.
SILENT_SECONDS = 120.0

log = logging.getLogger(__name__)


@dataclass
class ReportConfig:
    """A page of a run."""

    run: str = "???"
    runs: str = "runs"
    # Other runs below `runs`, whose curves are laid beside.
    against: list[str] = field(default_factory=list)
    # Empty: report.html in the run's directory.
    output: str = ""

    def __post_init__(self) -> None:
        names = [self.run, *self.against]
        for name in names:
            if not name or Path(name).name != name:
                raise ValueError(f"run and against must be plain names, got {name!r}; use runs=DIR for the place.")
        if len(set(names)) < len(names):
            raise ValueError(f"against must be other runs, each once, got {self.against} beside run={self.run}.")


def run(config: ReportConfig) -> None:
    """Write the page."""
    records = [read_record(_directory(config, name), SILENT_SECONDS) for name in (config.run, *config.against)]
    path = Path(config.output) if config.output else Path(config.runs) / config.run / "report.html"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(path, page(records).encode())
    log.info("report: %s", path)


def page(records: list[Record]) -> str:
    """Return the page of the first of some runs, with the curves of the others beside its own."""
    first = records[0]
    now = f"{datetime.now():%Y-%m-%d %H:%M}"
    return html.page(
        f"{first.name}: coldpress report",
        summary(first),
        compared(records),
        same_accuracy(records),
        learning(records),
        saved(first),
        speed(first),
        course(first),
        evaluations(first),
        lives(first),
        environment(first),
        html.paragraph(f"Written by `coldpress report` on {now}.", "note"),
    )


def _directory(config: ReportConfig, name: str) -> Path:
    directory = Path(config.runs) / name
    if not (directory / CONFIG_NAME).exists():
        raise ValueError(f"run: no run in {directory}; give run=NAME and, if it is elsewhere, runs=DIR.")
    return directory
