"""The Prometheus door: one endpoint a process, and the file by which Prometheus finds it."""

from __future__ import annotations

import errno
import json
import logging
import os
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from wsgiref.simple_server import WSGIServer

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, InfoMetricFamily
from prometheus_client.metrics_core import Metric as Family
from prometheus_client.registry import Collector

from monitoring.live import Live
from monitoring.metrics import CATALOG, LIVE, PHASE, PREFIX, TERMS, check

log = logging.getLogger(__name__)

WILDCARDS = ("0.0.0.0", "::")
# A counter that appears with its first event has not grown, to Prometheus.
NOTHING_YET = {metric.name: 0.0 for metric in CATALOG.values() if metric.kind == "counter"}
FAMILIES = {"gauge": GaugeMetricFamily, "counter": CounterMetricFamily}


class PrometheusSink:
    """Serve the latest value of every metric that was ever reported.

    The target file is `<runs>/.targets/<run>-<rank>.json`: Prometheus takes a wildcard only in the last part
    of a file_sd path, so all runs share one directory. It goes when the sink is closed and stays when the
    process is killed, which is what the alert on a lost rank looks for.
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
        registry = CollectorRegistry()
        registry.register(self._latest)
        self._server, self._thread = _serve(registry, address, port)
        self.port: int = self._server.server_port
        directory = run_dir.parent / ".targets"
        self._target = directory / f"{run_dir.name}-{rank}.json"
        node = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        host = node if address in WILDCARDS else address
        # An instance without the port: a restart on another port continues the same series.
        labels = {"run": run, "rank": str(rank), "node": node, "instance": f"{node}:{rank}"}
        try:
            _publish(self._target, [{"targets": [f"{host}:{self.port}"], "labels": labels}])
            if rank == 0:
                _forget_ranks(directory, run_dir.name, world_size)
        except OSError:
            self._stop()
            raise

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Replace the values that are reported; the others keep theirs."""
        check(metrics)
        self._latest.update({"last_step_timestamp_seconds": time.time(), **metrics, "step": step})

    def close(self) -> None:
        """Take the target back and close the endpoint."""
        with suppress(OSError):
            self._target.unlink(missing_ok=True)
        self._stop()

    def _stop(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


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
        for name, value in self._values.items():
            metric = CATALOG[name]
            yield FAMILIES[metric.kind](PREFIX + name, metric.help, value=value)
        live = self._live()
        if live is not None:
            yield from _families(live)


def _families(live: Live) -> Iterator[Family]:
    """Yield what a process says at the moment of a scrape."""
    for name, value in live.numbers.items():
        yield FAMILIES[LIVE[name].kind](PREFIX + name, LIVE[name].help, value=value)
    phase = GaugeMetricFamily(PREFIX + PHASE, LIVE[PHASE].help, labels=[LIVE[PHASE].label])
    phase.add_metric([live.phase], 1)
    yield phase
    for durations in live.durations:
        yield from durations.collect()


def _run_info(world_size: int) -> dict[str, str]:
    return {
        "version": version("coldpress"),
        "world_size": str(world_size),
        "job_id": os.environ.get("SLURM_JOB_ID", ""),
        "restart": os.environ.get("SLURM_RESTART_COUNT", "0"),
    }


def _serve(registry: CollectorRegistry, address: str, port: int) -> tuple[WSGIServer, threading.Thread]:
    try:
        return start_http_server(port, addr=address, registry=registry)
    except OSError as error:
        if error.errno != errno.EADDRINUSE:
            raise
        log.warning("port %d is taken, the metrics endpoint takes another", port)
        return start_http_server(0, addr=address, registry=registry)


def _publish(path: Path, content: object) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # A name that Prometheus' *.json does not match.
    temporary = path.with_name(f".{path.name}.tmp")
    temporary.write_text(json.dumps(content))
    # Prometheus runs as another user.
    temporary.chmod(0o644)
    os.replace(temporary, path)


def _forget_ranks(directory: Path, name: str, world_size: int) -> None:
    """Remove what an earlier, killed life of the run with more processes left."""
    for path in directory.glob("*.json"):
        run, _, rank = path.stem.rpartition("-")
        if run == name and rank.isdigit() and int(rank) >= world_size:
            path.unlink(missing_ok=True)
