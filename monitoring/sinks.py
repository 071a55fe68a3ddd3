"""Where reports go. The loop knows one `MetricSink`; `build_sinks` decides what stands behind it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from monitoring.console import ConsoleSink
from monitoring.exporters.prometheus import PrometheusSink
from monitoring.jsonl import JsonlSink
from monitoring.live import Live
from monitoring.metrics import check

log = logging.getLogger(__name__)


class MetricSink(Protocol):
    """Takes flat reports under the names of the catalogue."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take the numbers known at `step`, all or some of them."""

    def close(self) -> None:
        """Take no more."""


@dataclass
class MonitorConfig:
    """How a run can be watched from outside; every process has an endpoint of its own."""

    prometheus: bool = True
    # auto is loopback, which is seen from its own node only, and under Slurm the node's address; 0.0.0.0 are all.
    address: str = "auto"
    # 0 takes any free port; otherwise port + local rank, or any free one when that is taken.
    port: int = 0
    # TFLOPS that each process's device can reach at best, in the format that it computes in; its share is mfu_ratio.
    # 0 is what NVIDIA's data sheet says of this GPU, and nothing of one that is not in pipeline/peaks.py.
    peak_teraflops: float = 0.0

    def __post_init__(self) -> None:
        if not 0 <= self.peak_teraflops < math.inf:
            raise ValueError(
                f"monitor.peak_teraflops must be at least 0, got {self.peak_teraflops:g}; 0 takes that of known GPUs."
            )
        if not 0 <= self.port < 65536:
            raise ValueError(f"monitor.port must be in [0, 65535], got {self.port}; 0 takes any free port.")


class NullSink:
    """Goes nowhere."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Check the names all the same."""
        check(metrics)

    def close(self) -> None:
        """Do nothing."""


class MultiSink:
    """Hands every report to several sinks."""

    def __init__(self, sinks: Sequence[MetricSink]) -> None:
        self._sinks = sinks

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the report on."""
        check(metrics)
        for sink in self._sinks:
            sink.write(step, metrics)

    def close(self) -> None:
        """Close all."""
        for sink in self._sinks:
            sink.close()


def build_sinks(
    config: MonitorConfig,
    run_dir: Path,
    *,
    run: str,
    rank: int,
    local_rank: int,
    world_size: int,
    resume_step: int,
    live: Callable[[], Live | None] = lambda: None,
) -> MetricSink:
    """Open what this process reports to: console and metrics.jsonl on rank 0, an endpoint, which asks `live`, on every.

    An endpoint that cannot be opened is one warning, never the end of a run.
    """
    sinks: list[MetricSink] = []
    if rank == 0:
        sinks += [ConsoleSink(), JsonlSink(run_dir / "metrics.jsonl", resume_step)]
    if config.prometheus:
        try:
            port = config.port and config.port + local_rank
            sinks.append(
                PrometheusSink(
                    run_dir,
                    run=run,
                    rank=rank,
                    world_size=world_size,
                    address=config.address,
                    port=port,
                    live=live,
                )
            )
        # Addresses that are no names, no thread left, a full disk: nothing of it is a reason not to train.
        except Exception as error:
            log.warning("no metrics endpoint on %s: %s; the run goes on without.", config.address, error)
    return MultiSink(sinks) if sinks else NullSink()
