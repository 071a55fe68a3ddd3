"""Command: one benchmark; a table on the screen and, with output=FILE, JSON with the machine it was measured on."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path

from pipeline import distributed
from pipeline.benchmarks.checkpoint import bench_checkpoint
from pipeline.benchmarks.freezing import bench_freezing
from pipeline.benchmarks.loader import bench_loader
from pipeline.benchmarks.loop import bench_loop
from pipeline.benchmarks.monitoring import bench_monitoring
from pipeline.benchmarks.report import Report
from pipeline.benchmarks.start import bench_start
from pipeline.benchmarks.step import bench_step
from pipeline.benchmarks.targets import bench_targets
from pipeline.config import BenchConfig
from pipeline.distributed import World

BENCHMARKS: dict[str, Callable[[BenchConfig, World], Report]] = {
    "step": bench_step,
    "loop": bench_loop,
    "freezing": bench_freezing,
    "loader": bench_loader,
    "start": bench_start,
    "targets": bench_targets,
    "checkpoint": bench_checkpoint,
    "monitoring": bench_monitoring,
}


def run(config: BenchConfig) -> None:
    """Run one benchmark and report it.

    Raises ValueError for a benchmark or a place for its output that does not exist, and for what the benchmark
    itself refuses.
    """
    if config.what not in BENCHMARKS:
        raise ValueError(f"what must be one of {', '.join(BENCHMARKS)}, got {config.what}.")
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise ValueError(f"output: no directory for {config.output}; make it first.")
    world = distributed.start()
    report = BENCHMARKS[config.what](config, world)
    if world.is_main:
        print(report.table())
        if config.output:
            report.write(Path(config.output), config.what, asdict(config))
