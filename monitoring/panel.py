"""What panels, rows and dashboards are, and the queries that many of them ask."""

from __future__ import annotations

from dataclasses import dataclass

# What every query filters by.
RUN = '{run=~"$run"}'
RATE = "[$__rate_interval]"


@dataclass(frozen=True)
class Panel:
    """A picture: queries with their legends, the unit of what they return, and what an operator does about it."""

    title: str
    queries: tuple[tuple[str, str], ...]
    description: str
    unit: str = "short"
    kind: str = "timeseries"
    stacked: bool = False


@dataclass(frozen=True)
class Row:
    """Panels that belong together."""

    title: str
    panels: tuple[Panel, ...]


@dataclass(frozen=True)
class Dashboard:
    """A page; `many`: of several runs at once."""

    uid: str
    title: str
    rows: tuple[Row, ...]
    many: bool = False


def of_run(name: str, function: str = "max") -> str:
    """Return the query of a number that all processes of a run report alike."""
    return f"{function} by (run) (coldpress_{name}{RUN})"


def rate_of_run(name: str) -> str:
    """Return the query of a counter's growth per second."""
    return f"max by (run) (rate(coldpress_{name}{RUN}{RATE}))"


def share_of_phases() -> str:
    """Return the query of the share of time that each phase takes, the mean over ranks."""
    return f"avg by (run, phase) (rate(coldpress_phase_duration_seconds_sum{RUN}{RATE}))"


def quantile(q: float) -> str:
    """Return the query of a quantile of step durations, of all ranks together."""
    buckets = f"sum by (run, le) (rate(coldpress_step_duration_seconds_bucket{RUN}{RATE}))"
    return f"histogram_quantile({q:g}, {buckets})"
