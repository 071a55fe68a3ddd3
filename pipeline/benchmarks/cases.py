"""What benchmarks take steps with: engines, plans and batches of noise, and steps in turn."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from pipeline.compression import Compression
from pipeline.config import BenchConfig
from pipeline.distributed import World
from pipeline.engines import build_engine
from pipeline.methods import Method, build_method
from pipeline.methods.base import Batch
from pipeline.models.vit import ViT
from pipeline.schedules import StepPlan
from pipeline.training_engine import TrainingEngine

WARMUP = 2
HALFWAY = 0.5


@dataclass(frozen=True)
class NoiseBatch:
    """Images that no loader had to read."""

    views: tuple[Tensor, ...]
    index: Tensor
    labels: Tensor | None = None


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


def make_batch(config: BenchConfig, world: World, method: Method, samples: int = 0) -> NoiseBatch:
    """Return this process's part of a batch, or a batch of so many samples."""
    local = samples or config.batch_size // world.size
    sizes = [spec.size for spec in method.views()]
    images = tuple(torch.randn(local, 3, size, size, device=world.device) for size in sizes)
    index = torch.arange(local, device=world.device)
    return NoiseBatch(images, index, index % method.classes if method.classes else None)


Case = tuple[TrainingEngine, StepPlan]


def alternate(config: BenchConfig, world: World, a: Case, b: Case) -> tuple[list[float], list[float]]:
    """Time two cases in turn and return seconds of each round."""

    def timed(case: Case) -> Callable[[NoiseBatch], float]:
        engine, plan = case
        return lambda batch: seconds(engine, batch, plan, world)

    first, second = in_turn(config.rounds, lambda: make_batch(config, world, a[0].method), timed(a), timed(b))
    return first, second


def in_turn(rounds: int, draw: Callable[[], NoiseBatch], *runs: Callable[[NoiseBatch], Any]) -> list[list[Any]]:
    """Give the images of each round to all runs in turn; return, by run, what came of the rounds after the warm-up."""
    kept: list[list[Any]] = [[] for _ in runs]
    for round_ in range(WARMUP + rounds):
        batch = draw()
        for run, results in zip(runs, kept, strict=True):
            result = run(batch)
            if round_ >= WARMUP:
                results.append(result)
    return kept


def seconds(engine: TrainingEngine, batch: Batch, plan: StepPlan, world: World) -> float:
    """Return how long a step takes, until the device has done it."""
    return stopped(lambda: engine.step(batch, plan), world.device)


def stopped(work: Callable[[], object], device: torch.device) -> float:
    """Return how long some work takes, from a device that has nothing to do until it has done all of it."""
    synchronize(device)
    begin = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - begin


def synchronize(device: torch.device) -> None:
    """Wait until the device has done what it was asked for."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)
