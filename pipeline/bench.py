"""Command: one benchmark, or all; a table on the screen and, with output=FILE, JSON with the machine, and a picture."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

from pipeline import distributed
from pipeline.bench_plots import draw
from pipeline.benchmarks.checkpoint import bench_checkpoint
from pipeline.benchmarks.freezing import bench_freezing
from pipeline.benchmarks.loader import bench_loader
from pipeline.benchmarks.loop import bench_loop
from pipeline.benchmarks.monitoring import bench_monitoring
from pipeline.benchmarks.regressions import Baseline, changes, verdict
from pipeline.benchmarks.report import Report
from pipeline.benchmarks.scale import bench_scale
from pipeline.benchmarks.start import bench_start
from pipeline.benchmarks.step import bench_step
from pipeline.benchmarks.suite import ALL, command_line, run_all
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
    "scale": bench_scale,
}


def run(config: BenchConfig, overrides: Sequence[str] = ()) -> int:
    """Run one benchmark and report it, or all; return 1 if one is worse than what it is compared with.

    Raises ValueError for a benchmark or a place for its output that does not exist, for an earlier report that it
    cannot be compared with, and for what the benchmark itself refuses.
    """
    if config.what not in (*BENCHMARKS, ALL):
        raise ValueError(f"what must be one of {', '.join((*BENCHMARKS, ALL))}, got {config.what}.")
    if config.output and not Path(config.output).absolute().parent.is_dir():
        raise ValueError(f"output: no directory for {config.output}; make it first.")
    baseline = Baseline(Path(config.compare), asdict(config)) if config.compare else None
    if config.what == ALL:
        return run_all(config, overrides, baseline)
    return _run(config, overrides, baseline)


def _run(config: BenchConfig, overrides: Sequence[str], baseline: Baseline | None) -> int:
    earlier = baseline.rows(config.what) if baseline is not None else []
    world = distributed.start()
    report = BENCHMARKS[config.what](config, world)
    if not world.is_main:
        return 0
    print(report.table())
    found = changes(report.all_columns, earlier, report.rows)
    if baseline is not None:
        said = verdict(baseline, found)
        print(f"\n{said}")
        report = replace(report, facts={**report.facts, "compared": said.splitlines()})
    if config.output:
        output = Path(config.output)
        report.write(output, config.what, asdict(config), command_line(overrides))
        draw(config.what, report.rows, output.with_suffix(".png"))
    return int(any(change.worse for change in found))
