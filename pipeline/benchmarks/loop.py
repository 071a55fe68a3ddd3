"""Our uncompressed step against a plain PyTorch loop, on the same images and shapes, in turn; and both with loaders."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor

from data.manifest import Manifest
from data.resources import share_of_cores
from pipeline.benchmarks.cases import NoiseBatch, in_turn, make_batch, make_engine, make_plan, stopped
from pipeline.benchmarks.fed import FedStep, batches_ahead, fed_fields, fed_steps, make_loader
from pipeline.benchmarks.memory import peak_of
from pipeline.benchmarks.peers.plain_loop import PlainLoop
from pipeline.benchmarks.peers.plain_methods import PLAIN
from pipeline.benchmarks.peers.webdataset_torchvision import AHEAD_OF_WORKERS, V1_ON_PIL, webdataset_batches
from pipeline.benchmarks.report import Column, Report
from pipeline.benchmarks.split import PART_COLUMNS, Stopwatch, part_fields, split
from pipeline.benchmarks.timing import Spread
from pipeline.compression import Compression
from pipeline.config import BenchConfig
from pipeline.distributed import World
from pipeline.methods import METHODS, build_method
from pipeline.methods.base import Batch
from pipeline.models.vit import ViT

OURS, THEIRS = "coldpress", "plain PyTorch loop"
T = TypeVar("T")
# Of a stretch, behind those that find full queues.
STEPS = 3
COLUMNS = (
    Column("case", "case"),
    Column("milliseconds", "ms/step", ".1f", better="less"),
    Column("milliseconds_low", "min", ".1f"),
    Column("milliseconds_high", "max", ".1f"),
    Column("samples_per_second", "samples/s", ".1f"),
    Column("ratio", "as fast as the loop", ".2f", better="more"),
    Column("ratio_low", "min", ".2f"),
    Column("ratio_high", "max", ".2f"),
    Column("peak_mib", "peak MiB", ".0f", better="less"),
    Column("fed_ms", "ms/step with data", ".1f", better="less"),
    Column("waiting", "of it waiting", ".1%"),
    Column("fed_ratio", "as fast as the loop", ".2f", better="more"),
    Column("fed_ratio_low", "min", ".2f"),
    Column("fed_ratio_high", "max", ".2f"),
)


def bench_loop(config: BenchConfig, world: World) -> Report:
    """Measure one process's uncompressed steps, which both take from the same weights.

    Raises:
        ValueError: a method that has no plain loop, or several processes.
    """
    _check(config, world)
    bench = _Bench(config, world)
    rows = bench.measure()
    if config.data.shards:
        for row, fields in zip(rows, bench.feed(), strict=True):
            row |= fields
    return Report(COLUMNS, rows, NOTES, further=(PART_COLUMNS,))


NOTES = (
    "as fast as the loop: its time over ours, round by round. It computes the same loss, and reads it back at every "
    "step, as training scripts do.",
    "with data: ours with coldpress's loader, the loop with webdataset and torchvision v1 on PIL images.",
)


class _Bench:
    """Both, with networks of their own."""

    def __init__(self, config: BenchConfig, world: World) -> None:
        self._config, self._world = config, world
        self._engine, self._method = make_engine(config, world)
        torch.manual_seed(0)
        twin = build_method(config.method, ViT(config.model, 0))
        self._loop = PlainLoop(twin, config.optim, config.engine.precision, world.device)
        self._plan = make_plan(config, self._method, Compression(), 0)

    def measure(self) -> list[dict[str, Any]]:
        """Return the rows of both on noise."""
        device = self._world.device
        ours, theirs, our_parts, their_parts = in_turn(
            self._config.rounds,
            self._draw,
            lambda batch: stopped(lambda: self._ours(batch), device),
            lambda batch: stopped(lambda: self._theirs(batch.views), device),
            lambda batch: split(self._engine, batch, self._plan, self._world),
            self._split_theirs,
        )
        batch = self._draw()
        peaks = (peak_of(lambda: self._ours(batch), device), peak_of(lambda: self._theirs(batch.views), device))
        return [
            self._row(OURS, ours, theirs) | part_fields(our_parts) | {"peak_mib": peaks[0]},
            self._row(THEIRS, theirs, theirs) | part_fields(their_parts) | {"peak_mib": peaks[1]},
        ]

    def feed(self) -> list[dict[str, float]]:
        """Return what the rows of both have of steps whose images come from shards, in stretches that take turns."""
        workers = self._config.data.threads or share_of_cores()
        ahead = batches_ahead(self._config, self._world, self._method)
        ours: list[list[FedStep]] = []
        theirs: list[list[FedStep]] = []
        with ExitStack() as stack:
            # The workers first: they fork, and best of all before DALI has threads.
            their_batches = stack.enter_context(closing(self._their_batches(workers)))
            loader = stack.enter_context(closing(make_loader(self._config, self._world, self._method)))
            our_batches = loader.batches()
            for _ in range(self._config.rounds):
                theirs.append(self._stretch(their_batches, self._theirs, 1 + AHEAD_OF_WORKERS * workers))
                ours.append(self._stretch(our_batches, self._ours, ahead))
        return [_fed_row(ours, theirs), _fed_row(theirs, theirs)]

    def _ours(self, batch: Batch) -> None:
        self._engine.step(batch, self._plan)

    def _theirs(self, views: Sequence[Tensor]) -> None:
        self._loop.step([view.to(self._world.device, non_blocking=True) for view in views], self._plan)

    def _split_theirs(self, batch: NoiseBatch) -> dict[str, float]:
        watch = Stopwatch(self._world.device)
        with watch.watching(self._loop.method, "follow"):
            self._loop.step(batch.views, self._plan, watch)
            return watch.stop()

    def _row(self, case: str, own: Sequence[float], loop: Sequence[float]) -> dict[str, Any]:
        median = Spread.of(own).median
        return {
            "case": case,
            **Spread.of([1e3 * each for each in own]).fields("milliseconds"),
            "samples_per_second": self._config.batch_size / median,
            **Spread.of([a / b for a, b in zip(loop, own, strict=True)]).fields("ratio"),
            "rounds": list(own),
        }

    def _draw(self) -> NoiseBatch:
        return make_batch(self._config, self._world, self._method)

    def _stretch(self, batches: Iterator[T], step: Callable[[T], None], skip: int) -> list[FedStep]:
        return fed_steps(batches, step, self._world.device, skip, STEPS)

    def _their_batches(self, workers: int) -> Any:
        config = self._config
        manifest = Manifest.load(Path(config.data.shards))
        tars = [Path(config.data.shards) / shard.name for shard in manifest.shards]
        return webdataset_batches(
            V1_ON_PIL,
            tars,
            list(self._method.views()),
            batch_size=config.batch_size,
            workers=min(workers, len(tars)),
            pin_memory=self._world.device.type == "cuda",
        )


def _fed_row(own: Sequence[Sequence[FedStep]], loop: Sequence[Sequence[FedStep]]) -> dict[str, float]:
    ratios = [_median(theirs) / _median(ours) for theirs, ours in zip(loop, own, strict=True)]
    return fed_fields([step for stretch in own for step in stretch]) | Spread.of(ratios).fields("fed_ratio")


def _median(stretch: Sequence[FedStep]) -> float:
    return Spread.of([step.seconds for step in stretch]).median


def _check(config: BenchConfig, world: World) -> None:
    kind = METHODS[type(config.method)]
    if kind not in PLAIN:
        names = ", ".join(each.__name__ for each in PLAIN)
        raise ValueError(f"what=loop has plain loops of {names}, not of {kind.__name__}; take another method.")
    if world.size > 1:
        raise ValueError(f"what=loop measures one process, not {world.size}; start it without a launcher.")
