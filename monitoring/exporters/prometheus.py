"""What each process of a run tells Prometheus."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path

from prometheus_client.core import InfoMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from monitoring.exporters.endpoint import TARGETS, Endpoint, node_name
from monitoring.exporters.reading import Reading
from monitoring.live import Live
from monitoring.metrics import CATALOG, LIVE, PHASE, PREFIX, TERMS, check

# A counter that appears with its first event has not grown, to Prometheus.
NOTHING_YET = {metric.name: 0.0 for metric in CATALOG.values() if metric.kind == "counter"}


class PrometheusSink:
    """Serve the latest value of every metric that was ever reported.

    The target file is `<runs>/.targets/<run>-<rank>.json`: Prometheus takes a wildcard only in the last part
    of a file_sd path, so all runs share one directory.
    """

    def __init__(
        self,
        run_dir: Path,
        *,
        run: str,
        rank: int,
        world_size: int,
        address: str,
        port: int,
        live: Callable[[], Live | None] = lambda: None,
    ) -> None:
        """Open the endpoint, on any free port when `port` is 0 or taken; every scrape asks `live`.

        Raises:
            OSError: the address is not one of this machine, or the target file cannot be written.
        """
        known = {**NOTHING_YET, "start_timestamp_seconds": time.time()}
        self._latest = _Latest(known, _run_info(world_size), live)
        directory, node = run_dir.parent / TARGETS, node_name()
        # An instance without the port: a restart on another port continues the same series.
        labels = {"run": run, "rank": str(rank), "node": node, "instance": f"{node}:{rank}"}
        self.endpoint = Endpoint(self._latest, address, port, directory / f"{run_dir.name}-{rank}.json", labels)
        if rank == 0:
            _forget_ranks(directory, run_dir.name, world_size)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Replace the values that are reported; the others keep theirs."""
        check(metrics)
        self._latest.update({"last_step_timestamp_seconds": time.time(), **metrics, "step": step})

    def close(self) -> None:
        """Take the target back and close the endpoint."""
        self.endpoint.close()


class _Latest(Collector):
    """What a scrape sees. It comes on a thread of its own: the mapping is replaced, never changed."""

    def __init__(self, values: dict[str, float], info: dict[str, str], live: Callable[[], Live | None]) -> None:
        self._values, self._info, self._live = values, info, live

    def update(self, values: Mapping[str, float]) -> None:
        # A term that a training report no longer has is gone; all else keeps its last value.
        gone = [name for name in self._values if name.startswith(TERMS) and name not in values and "loss" in values]
        self._values = {name: v for name, v in {**self._values, **values}.items() if name not in gone}

    def collect(self) -> Iterator[Family]:
        yield InfoMetricFamily(f"{PREFIX}run", "What is running.", self._info)
        reading = Reading(CATALOG)
        for name, value in self._values.items():
            reading.add(name, value)
        yield from reading.families()
        live = self._live()
        if live is not None:
            yield from _families(live)


def _families(live: Live) -> Iterator[Family]:
    """Yield what a process says at the moment of a scrape."""
    reading = Reading(LIVE)
    for name, value in live.numbers.items():
        reading.add(name, value)
    reading.add(PHASE, 1, live.phase)
    yield from reading.families()
    for durations in live.durations:
        yield from durations.collect()


def _run_info(world_size: int) -> dict[str, str]:
    return {
        "version": version("coldpress"),
        "world_size": str(world_size),
        "job_id": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _forget_ranks(directory: Path, name: str, world_size: int) -> None:
    """Remove what an earlier, killed life of the run with more processes left."""
    with suppress(OSError):
        for path in directory.glob("*.json"):
            run, _, rank = path.stem.rpartition("-")
            if run == name and rank.isdigit() and int(rank) >= world_size:
                path.unlink(missing_ok=True)
