"""Step time against what the arithmetic promises, on noise images, alternating with the baseline."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.benchmarks.report import Column, Report
from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.config import BenchConfig
from pipeline.distributed import World
from pipeline.engines import build_engine
from pipeline.methods import Method, build_method, check_compressible
from pipeline.models.vit import ViT
from pipeline.schedules import StepPlan
from pipeline.training_engine import TrainingEngine

WARMUP = 2
HALFWAY = 0.5
COLUMNS = (
    Column("case", "case"),
    Column("milliseconds", "ms/step", ".1f"),
    Column("speedup", "speed-up", ".2f"),
    Column("spread", "spread", ".2f"),
    Column("promised", "promised", ".2f"),
    Column("realized", "realized", ".2f"),
)


@dataclass(frozen=True)
class NoiseBatch:
    """Images that no loader had to read."""

    views: tuple[Tensor, ...]
    index: Tensor
    labels: Tensor | None = None


@dataclass(frozen=True)
class Measurement:
    """One case against the baseline that ran in turn with it."""

    case: str
    milliseconds: float
    spread: float
    speedup: float
    promised: float

    @property
    def realized(self) -> float:
        """Return measured speed-up over promised speed-up."""
        return self.speedup / self.promised


def bench_step(config: BenchConfig, world: World) -> Report:
    """Measure every (patch size, dropout) cell against the uncompressed step.

    Raises:
        ValueError: a method whose sequences cannot be compressed.
    """
    check_compressible(config.method)
    engine, method = make_engine(config, world)
    baseline = make_plan(config, method, Compression(), 0)
    cells = [(p, d) for p in (config.patch_sizes or [config.model.patch_size]) for d in config.dropouts]
    rows = []
    for patch_size, dropout in cells:
        plan = make_plan(config, method, compression(patch_size, dropout), 0)
        pair = alternate(config, world, (engine, baseline), (engine, plan))
        rows.append(_measure(f"patch {patch_size:3d} dropout {dropout:.2f}", method, baseline, plan, pair))
    return _report(rows)


def make_engine(
    config: BenchConfig, world: World, build: Callable[[Any, ViT], Method] = build_method
) -> tuple[TrainingEngine, Method]:
    """Return an engine of its own and its method."""
    torch.manual_seed(0)
    method = build(config.method, ViT(config.model, 0))
    local = config.batch_size // world.size
    return build_engine(method, config.engine, config.optim, local_batch=local, device=world.device), method


def make_plan(config: BenchConfig, method: Method, query: Compression, frozen: int) -> StepPlan:
    """Return the plan of a step half-way through a run."""
    rate = config.rate.peak(config.batch_size)
    plan = StepPlan(
        progress=HALFWAY,
        learning_rate=rate,
        weight_decay=config.optim.weight_decay_at(HALFWAY),
        momentum=method.momentum(HALFWAY),
        layer_rates=(0.0,) * frozen + (rate,) * (method.encoder.num_layers - frozen),
        query=query,
        key=method.key_compression(query),
        last_layer_rate=rate,
        teacher_temperature=method.teacher_temperature(HALFWAY),
    )
    assert plan.frozen_layers == frozen
    return plan


def make_batch(config: BenchConfig, world: World, method: Method) -> NoiseBatch:
    """Return this process's part of a batch."""
    local = config.batch_size // world.size
    sizes = [spec.size for spec in method.views()]
    images = tuple(torch.randn(local, 3, size, size, device=world.device) for size in sizes)
    index = torch.arange(local, device=world.device)
    return NoiseBatch(images, index, index % method.classes if method.classes else None)


Case = tuple[TrainingEngine, StepPlan]


def alternate(config: BenchConfig, world: World, a: Case, b: Case) -> tuple[list[float], list[float]]:
    """Time two cases in turn and return seconds of each round."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_ in range(WARMUP + config.rounds):
        for case, kept in zip((a, b), times, strict=True):
            engine, plan = case
            took = seconds(engine, make_batch(config, world, engine.method), plan, world)
            if round_ >= WARMUP:
                kept.append(took)
    return times


def seconds(engine: TrainingEngine, batch: NoiseBatch, plan: StepPlan, world: World) -> float:
    """Return how long a step takes, until the device has done it."""
    begin = time.perf_counter()
    engine.step(batch, plan)
    if world.device.type == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _measure(
    case: str, method: Method, baseline: StepPlan, plan: StepPlan, pair: tuple[list[float], list[float]]
) -> Measurement:
    ratios = [a / b for a, b in zip(*pair, strict=True)]
    return Measurement(
        case=case,
        milliseconds=1e3 * statistics.median(pair[1]),
        spread=(max(ratios) - min(ratios)) / 2,
        speedup=statistics.median(ratios),
        promised=method.sample_cost(baseline) / method.sample_cost(plan),
    )


def _report(rows: list[Measurement]) -> Report:
    return Report(COLUMNS, [asdict(row) | {"realized": row.realized} for row in rows])
