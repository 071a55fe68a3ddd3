"""An exporter as a process of its own: serve, be found, leave when asked."""

from __future__ import annotations

import logging
import math
import signal
from dataclasses import dataclass
from pathlib import Path

from prometheus_client.registry import Collector

from monitoring.exporters.endpoint import TARGETS, Endpoint, node_name

log = logging.getLogger(__name__)

LEAVE = (signal.SIGTERM, signal.SIGINT)
# What schedulers announce an end with, which is followed by one of those.
WARNINGS = (signal.SIGUSR1, signal.SIGUSR2)


@dataclass
class ExporterConfig:
    """Where an exporter answers, and where Prometheus looks for it."""

    # Its target file is runs/.targets/NODE-KIND.json.
    runs: str = "runs"
    # auto is loopback, which is seen from its own node only, and under Slurm the node's address; 0.0.0.0 are all.
    address: str = "auto"
    # 0 takes any free port, as does a port that is taken.
    port: int = 0
    # What was read is this old before it is read again, however many scrapes there are.
    every_seconds: float = 5.0

    def __post_init__(self) -> None:
        if not 0 <= self.port < 65536:
            raise ValueError(f"port must be in [0, 65535], got {self.port}; 0 takes any free port.")
        if not 1 <= self.every_seconds < math.inf:
            raise ValueError(f"every_seconds must be at least 1, got {self.every_seconds:g}; 5 to 60 are usual.")


def serve(collector: Collector, config: ExporterConfig, kind: str) -> None:
    """Answer scrapes until SIGTERM or SIGINT.

    Raises:
        ValueError: the endpoint cannot be opened or published.
    """
    # Blocked, and fetched below: no moment is left in which one would end the process with its target still there.
    # Threads inherit it, so this comes first.
    signal.pthread_sigmask(signal.SIG_BLOCK, LEAVE)
    for number in WARNINGS:
        signal.signal(number, signal.SIG_IGN)
    endpoint = open_endpoint(collector, config, kind)
    log.info("%s exporter of %s on port %d", kind, node_name(), endpoint.port)
    signal.sigwait(LEAVE)
    endpoint.close()


def open_endpoint(collector: Collector, config: ExporterConfig, kind: str) -> Endpoint:
    """Open the endpoint of an exporter and publish it.

    Raises:
        ValueError: it cannot be opened or published.
    """
    node = node_name()
    # No rank is a word, so no run's file has this name. A job of its own: these are no ranks, which would be missed.
    target = Path(config.runs) / TARGETS / f"{node}-{kind}.json"
    labels = {"job": f"coldpress-{kind}", "node": node, "instance": f"{node}:{kind}"}
    try:
        return Endpoint(collector, config.address, config.port, target, labels)
    except OSError as error:
        raise ValueError(
            f"address={config.address} runs={config.runs}: {error}; "
            "say an address of this machine, and a directory that can be written."
        ) from error
