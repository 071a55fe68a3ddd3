"""Durations, counted in buckets by prometheus_client."""

from __future__ import annotations

from prometheus_client import Histogram, disable_created_metrics

from monitoring.metrics import LIVE, PREFIX

# Upper bounds in seconds: from a small model's phase to a save that blocks.
BOUNDS = (0.001, 0.003, 0.01, 0.03, 0.1, 0.3, 1.0, 3.0, 10.0, 60.0)

# A series more for each histogram that tells when it was made, which start_timestamp_seconds does.
disable_created_metrics()  # type: ignore[no-untyped-call]


def histogram(name: str) -> Histogram:
    """Return a histogram of the catalogue, which no registry has: a process may have several of a name."""
    metric = LIVE[name]
    return Histogram(PREFIX + name, metric.help, metric.labels, registry=None, buckets=BOUNDS)
