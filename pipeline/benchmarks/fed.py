"""Steps whose images a loader brings: how long each takes, and how much of that it waits."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch

from data.loader import Loader
from data.resources import usual_prefetch
from pipeline.benchmarks.cases import synchronize
from pipeline.benchmarks.timing import Spread
from pipeline.config import BenchConfig
from pipeline.distributed import World
from pipeline.methods import Method

B = TypeVar("B")


class FedStep(NamedTuple):
    """Seconds of a step, and those of them before its images were there."""

    seconds: float
    waiting: float


def fed_steps(
    batches: Iterator[B], step: Callable[[B], object], device: torch.device, skip: int, steps: int
) -> list[FedStep]:
    """Take steps one after the other, as a run does; the first ones, which find full queues, do not count."""
    taken = []
    for _ in range(skip + steps):
        synchronize(device)
        begin = time.perf_counter()
        batch = next(batches)
        waited = time.perf_counter() - begin
        step(batch)
        synchronize(device)
        taken.append(FedStep(time.perf_counter() - begin, waited))
    return taken[skip:]


def fed_fields(steps: Sequence[FedStep]) -> dict[str, float]:
    """Return milliseconds of steps and of waiting, and the share of it, as fields of a row."""
    fields = Spread.of([1e3 * each.seconds for each in steps]).fields("fed_ms")
    fields |= Spread.of([1e3 * each.waiting for each in steps]).fields("data_ms")
    return fields | {"waiting": fields["data_ms"] / fields["fed_ms"]}


def make_loader(config: BenchConfig, world: World, method: Method) -> Loader:
    """Return the loader that a run of these settings would have."""
    return Loader(
        config.data,
        method.views(),
        seed=0,
        batch_size=config.batch_size,
        rank=world.rank,
        world_size=world.size,
        device=world.device,
    )


def batches_ahead(config: BenchConfig, world: World, method: Method) -> int:
    """Return how many batches may lie ready when nobody has taken one for long."""
    return 1 + (config.data.prefetch or usual_prefetch(config.batch_size // world.size, method.views()))
