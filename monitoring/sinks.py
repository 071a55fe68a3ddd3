"""Where reports go. The loop knows one `MetricSink`; `build_sinks` decides what stands behind it."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from types import MappingProxyType
from typing import Any, Protocol

from monitoring.console import ConsoleSink
from monitoring.expendable import Expendable
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
    # Event files below the run's directory.
    tensorboard: bool = False
    # off; offline writes below the run's directory, for `wandb sync`; online talks to the service.
    wandb: str = "off"

    def __post_init__(self) -> None:
        if not 0 <= self.peak_teraflops < math.inf:
            raise ValueError(
                f"monitor.peak_teraflops must be at least 0, got {self.peak_teraflops:g}; 0 takes that of known GPUs."
            )
        if not 0 <= self.port < 65536:
            raise ValueError(f"monitor.port must be in [0, 65535], got {self.port}; 0 takes any free port.")
        if self.wandb not in ("off", "offline", "online"):
            raise ValueError(f"monitor.wandb must be off, offline or online, got {self.wandb}.")

    def check_installed(self) -> None:
        """Refuse to start a run whose loggers are not there.

        Raises:
            ValueError: a package is missing. Not when the config is read: a plan of the run needs none of them.
        """
        for package, asked in (("tensorboard", self.tensorboard), ("wandb", self.wandb != "off")):
            if asked and find_spec(package) is None:
                raise ValueError(
                    f"monitor.{package} needs the package {package}, which is not installed; "
                    f"pip install {package}, or leave monitor.{package} out."
                )


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
    settings: Mapping[str, Any] = MappingProxyType({}),
) -> MetricSink:
    """Open what this process reports to: console, metrics.jsonl and loggers on rank 0, an endpoint on every.

    The endpoint asks `live`; loggers that show how a run was set up are given `settings`.

    An endpoint that cannot be opened is one warning, never the end of a run.
    """
    sinks: list[MetricSink] = []
    if rank == 0:
        sinks += [ConsoleSink(), JsonlSink(run_dir / "metrics.jsonl", resume_step)]
        sinks += _loggers(config, run_dir, run, resume_step, settings)
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


def _loggers(
    config: MonitorConfig, run_dir: Path, run: str, resume_step: int, settings: Mapping[str, Any]
) -> list[MetricSink]:
    """Open what other packages show; metrics.jsonl has been cut to the resumed step before."""

    def tensorboard() -> MetricSink:
        from monitoring.tensorboard import TensorBoardSink

        return TensorBoardSink(run_dir / "tensorboard", resume_step)

    def wandb() -> MetricSink:
        from monitoring.wandb import WandbSink

        return WandbSink(run_dir, run=run, mode=config.wandb, settings=settings)

    asked = (("TensorBoard", config.tensorboard, tensorboard), ("W&B", config.wandb != "off", wandb))
    return [Expendable(name, build) for name, wanted, build in asked if wanted]
