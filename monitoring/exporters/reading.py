"""Numbers of a catalogue as Prometheus takes them, and how often they are read."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from monitoring.metrics import PREFIX, Metric

FAMILIES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}


class Reading:
    """Values by the names and labels of a catalogue."""

    def __init__(self, catalog: Mapping[str, Metric]) -> None:
        self._catalog = catalog
        self._families: dict[str, GaugeMetricFamily | CounterMetricFamily] = {}

    def add(self, name: str, value: float, *labels: str) -> None:
        """Add a value; labels in the order of the catalogue."""
        metric = self._catalog[name]
        assert len(labels) == len(metric.labels), f"{name} has the labels {metric.labels}, got {labels}"
        if name not in self._families:
            self._families[name] = FAMILIES[metric.kind](PREFIX + name, metric.help, labels=metric.labels)
        self._families[name].add_metric(labels, value)

    def families(self) -> Sequence[Family]:
        """Return what there is, in the order in which it came."""
        return list(self._families.values())


class Cached(Collector):
    """Reads at most once in some seconds, however many ask; who asks during a reading gets the one before.

    A reading that hangs therefore holds up one scrape and no other, and shows by its age.
    """

    def __init__(self, read: Callable[[], Reading], seconds: float) -> None:
        self._read, self._seconds = read, seconds
        self._lock = threading.Lock()
        self._families: Sequence[Family] = ()
        self._next = 0.0

    def collect(self) -> Iterator[Family]:
        """Yield the newest reading."""
        if self._lock.acquire(blocking=False):
            try:
                if time.monotonic() >= self._next:
                    self._families = self._read().families()
                    self._next = time.monotonic() + self._seconds
            finally:
                self._lock.release()
        yield from self._families
