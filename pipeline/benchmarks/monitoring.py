"""What watching a run costs it: CPU time of every mark, count, report and scrape, as a share of a step."""

from __future__ import annotations

import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from monitoring.console import summary
from monitoring.exporters.prometheus import PrometheusSink
from monitoring.jsonl import JsonlSink
from pipeline.benchmarks.cases import WARMUP, make_batch, make_engine, make_plan, seconds
from pipeline.benchmarks.report import Column, Report
from pipeline.benchmarks.timing import Spread
from pipeline.checkpoint import TrainState
from pipeline.compression import Compression
from pipeline.config import BenchConfig, TrainConfig
from pipeline.distributed import World
from pipeline.heartbeat import Heartbeat, Phase
from pipeline.meter import Meter
from pipeline.schedules import Budget, StepPlan, Unit
from pipeline.training_engine import StepResult, TrainingEngine

STEPS, REPORTS, SCRAPES = 2000, 200, 50
# As a run has it and as Prometheus is configured; the most that watching may cost; a step that a GPU takes long for.
LOG_EVERY, SCRAPE_SECONDS, LIMIT, LONG_STEP = TrainConfig.log_every, 15.0, 1e-3, 0.2
COLUMNS = (
    Column("part", "part"),
    Column("microseconds", "CPU us", ".1f", better="less"),
    Column("microseconds_low", "min", ".1f"),
    Column("microseconds_high", "max", ".1f"),
    Column("of_step", "us/step", ".1f"),
    Column("share", "% of step", ".4f"),
    Column("share_long", f"% of {LONG_STEP:g} s", ".4f"),
)
# Scrapes as Prometheus sends them, from another process, which is not to be measured.
SCRAPER = """
import sys, urllib.request
headers = {"Accept": "application/openmetrics-text;version=1.0.0", "Accept-Encoding": "gzip"}
for _ in range(int(sys.argv[2])):
    urllib.request.urlopen(urllib.request.Request(sys.argv[1], headers=headers)).read()
"""


def bench_monitoring(config: BenchConfig, world: World) -> Report:
    """Measure each part on its own: what it takes from the training thread, or from Python's lock."""
    engine, method = make_engine(config, world)
    plan = make_plan(config, method, Compression(), 0)
    steps = [seconds(engine, make_batch(config, world, method), plan, world) for _ in range(WARMUP + config.rounds)]
    with TemporaryDirectory(prefix="coldpress-") as name:
        parts = _Watched(config, world, engine, plan, Path(name)).measure(config.rounds)
    return _report(parts, statistics.median(steps[WARMUP:]))


class _Watched:
    """All that watches a process of a run."""

    def __init__(self, config: BenchConfig, world: World, engine: TrainingEngine, plan: StepPlan, runs: Path) -> None:
        self._engine, self._plan, self._state = engine, plan, TrainState(step=1)
        self._heartbeat = Heartbeat()
        self._meter = Meter(engine.method, Budget(1, Unit.steps), config.batch_size, world.size, peak=1.0)
        (runs / "a").mkdir()
        where = {"run": "a", "rank": world.rank, "world_size": world.size, "address": "127.0.0.1", "port": 0}
        self._endpoint = PrometheusSink(runs / "a", live=self._heartbeat.live, **where)  # type: ignore[arg-type]
        self._lines = JsonlSink(runs / "a" / "metrics.jsonl", 0)

    def measure(self, rounds: int) -> dict[str, Spread]:
        """Return CPU seconds of one of each; whatever the thread that does it."""
        result = StepResult(torch.zeros(()), {}, applied=True)
        parts: dict[str, tuple[Callable[[], object], int]] = {
            "marks and histograms of a step": (self._mark, STEPS),
            "counts of a step": (lambda: self._meter.count(self._plan, result, 1.0, 0.0), STEPS),
            f"report, every {LOG_EVERY} steps": (self._write, REPORTS),
        }
        found = {name: Spread.of([_cpu(part, times) for _ in range(rounds)]) for name, (part, times) in parts.items()}
        scrapes = Spread.of([self._scrape(SCRAPES) for _ in range(rounds)])
        self._endpoint.close()
        self._lines.close()
        return found | {f"scrape, every {SCRAPE_SECONDS:g} s": scrapes, "scrape, every second": scrapes}

    def _mark(self) -> None:
        # As the loop and the engine do.
        self._heartbeat.begin(1)
        for phase in (Phase.tune, Phase.forward, Phase.backward, Phase.step):
            self._heartbeat.enter(phase)
        self._heartbeat.finish(1)

    def _write(self) -> None:
        report = self._meter.report(self._state, self._plan, self._engine, loss=1.0)
        summary(1, report)
        self._lines.write(1, report)
        self._endpoint.write(1, report)

    def _scrape(self, times: int) -> float:
        url = f"http://127.0.0.1:{self._endpoint.endpoint.port}/metrics"
        began = time.process_time()
        subprocess.run([sys.executable, "-c", SCRAPER, url, str(times)], check=True)
        return (time.process_time() - began) / times


def _cpu(part: Callable[[], object], times: int) -> float:
    began = time.process_time()
    for _ in range(times):
        part()
    return (time.process_time() - began) / times


def _report(parts: dict[str, Spread], step: float) -> Report:
    def row(part: str, cpu: Spread, of_steps: Callable[[float], float]) -> dict[str, Any]:
        micro = Spread(*(1e6 * each for each in (cpu.median, cpu.low, cpu.high)))
        shares = {"share": 100 * of_steps(step) * cpu.median / step}
        shares["share_long"] = 100 * of_steps(LONG_STEP) * cpu.median / LONG_STEP
        return {"part": part, **micro.fields("microseconds"), "of_step": of_steps(step) * micro.median, **shares}

    # How many of each fall on a step that takes so long.
    often: list[Callable[[float], float]] = [lambda _: 1, lambda _: 1, lambda _: 1 / LOG_EVERY]
    often += [lambda seconds: seconds / SCRAPE_SECONDS, lambda seconds: seconds]
    rows = [row(name, cpu, each) for (name, cpu), each in zip(parts.items(), often, strict=True)]
    usual = rows[:-1]
    total = {name: sum(each[name] for each in usual) for name in ("of_step", "share", "share_long")}
    relation = "below" if max(total["share"], total["share_long"]) < 100 * LIMIT else "NOT below"
    note = (
        f"A step took {1e3 * step:.0f} ms; watching it {total['of_step']:.0f} us, {total['share']:.4f} % of it and "
        f"{total['share_long']:.4f} % of one of {LONG_STEP:g} s: {relation} the {100 * LIMIT:g} % that it may take."
    )
    return Report(COLUMNS, [*rows, {"part": f"all, scraped every {SCRAPE_SECONDS:g} s", **total}], [note])
