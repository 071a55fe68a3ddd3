"""What happened to a run on a cluster, from Slurm, its own log and Prometheus."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from operations.job_history import Event, JobHistory
from operations.servers import Server

RESOLUTION = 1.0  # seconds
# Of the log, what is told; the rest is about each life's start, and reports.
TURNS = r"(?:starting|resumed|stopped, saved|finished) at step \d+.*"
TOLD = re.compile(rf"(\S+ \S+) (?:INFO|ERROR) ({TURNS}|process \d+ .*)")
CURVES = {
    "step": "max by (run) (coldpress_step)",
    "samples / s": "max by (run) (rate(coldpress_samples_total[5s]))",
    "ranks that answer": 'count by (run) (up{job="coldpress"} == 1)',
    "frozen layers": "max by (run) (coldpress_frozen_layers)",
    "query tokens": "max by (run) (coldpress_query_tokens)",
    "restarts": "max by (run) (coldpress_restarts)",
}


@dataclass(frozen=True)
class Alert:
    """A time in which an alert fired."""

    name: str
    begin: float
    end: float


@dataclass(frozen=True)
class Restart:
    """What a blow cost, in seconds and steps: to save (None if there was no time), to be run again, to begin."""

    blow: Event
    saved: float | None
    queued: float
    started: float
    lost: int


@dataclass(frozen=True)
class Account:
    """All of it; times are Unix times."""

    job: dict[str, str]
    events: list[Event]
    restarts: list[Restart]
    curves: dict[str, dict[float, float]]
    alerts: list[Alert]

    @staticmethod
    def of(run: Path, job: dict[str, str], history: JobHistory, server: Server) -> Account:
        """Collect it from what the run left, what was seen of Slurm, and what Prometheus knows."""
        events = sorted([*history.events, *_told(run / "train.log")], key=lambda event: event.time)
        begin, end = events[0].time, events[-1].time + RESOLUTION
        rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
        blows = [event for event in events if event.step is not None]
        return Account(
            job,
            events,
            [_restart(blow, [event for event in events if event.time > blow.time], rows) for blow in blows],
            {name: _curve(server, expression, begin, end) for name, expression in CURVES.items()},
            _alerts(server, begin, end),
        )

    @property
    def begin(self) -> float:
        """Return when the job was submitted."""
        return self.events[0].time

    @property
    def blows(self) -> list[Event]:
        """Return what was done to the run."""
        return [restart.blow for restart in self.restarts]


def pieces(curve: dict[float, float]) -> list[list[tuple[float, float]]]:
    """Return a curve without the times in which there was none."""
    found: list[list[tuple[float, float]]] = []
    for when, value in sorted(curve.items()):
        if not found or when - found[-1][-1][0] > 2 * RESOLUTION:
            found.append([])
        found[-1].append((when, value))
    return found


def _told(log: Path) -> Iterator[Event]:
    for line in log.read_text().splitlines():
        if said := TOLD.fullmatch(line):
            yield Event(datetime.strptime(said[1], "%Y-%m-%d %H:%M:%S,%f").timestamp(), said[2])


def _restart(blow: Event, after: list[Event], rows: list[dict[str, float]]) -> Restart:
    """Return what a blow cost, from all that happened after it and from the reports of the run."""
    resumed = _first(after, "resumed")
    saved = next((e for e in after if e.text.startswith("stopped") and e.time < resumed.time), None)
    ended = next(e for e in after if re.match(r"job (?!RUNNING)", e.text))
    running = _first(after, "job RUNNING")
    step = _number(r"step (\d+)", resumed)
    assert blow.step is not None
    return Restart(
        blow=blow,
        saved=_number(r"([\d.]+) s after", saved) if saved else None,
        queued=running.time - ended.time,
        started=next(row["time"] for row in rows if row["step"] > step) - running.time,
        lost=int((_number(r"step (\d+)", saved) if saved else blow.step) - step),
    )


def _first(events: list[Event], text: str) -> Event:
    return next(event for event in events if event.text.startswith(text))


def _number(pattern: str, event: Event) -> float:
    found = re.search(pattern, event.text)
    assert found, event
    return float(found[1])


def _curve(server: Server, expression: str, begin: float, end: float) -> dict[float, float]:
    series = server.history(expression, begin, end, RESOLUTION)
    return {float(when): float(value) for each in series for when, value in each["values"]}


def _alerts(server: Server, begin: float, end: float) -> list[Alert]:
    alerts = []
    for each in server.history('ALERTS{alertstate="firing"}', begin, end, RESOLUTION):
        labels = each["metric"]
        name = labels["alertname"] + (f" of rank {labels['rank']}" if "rank" in labels else "")
        times = {float(when): float(value) for when, value in each["values"]}
        alerts += [Alert(name, piece[0][0], piece[-1][0]) for piece in pieces(times)]
    return sorted(alerts, key=lambda alert: (alert.begin, alert.name))
