"""Step time against what the arithmetic promises, cell by cell, in turn with the uncompressed step; and its parts."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from functools import partial
from typing import Any

from data.loader import Batch
from pipeline.benchmarks.cases import NoiseBatch, in_turn, make_batch, make_engine, make_plan, seconds
from pipeline.benchmarks.fed import batches_ahead, fed_fields, fed_steps, make_loader
from pipeline.benchmarks.memory import MIB, kept_for_backward, peak_of
from pipeline.benchmarks.report import Column, Report, Row
from pipeline.benchmarks.split import BACKWARD, FORWARD, PART_COLUMNS, PARTS, part_fields, split
from pipeline.benchmarks.timing import Spread
from pipeline.compression import Compression
from pipeline.compression.schedule import compression
from pipeline.config import BenchConfig
from pipeline.distributed import World
from pipeline.engine_config import SHARDED
from pipeline.flops import step_flops
from pipeline.methods import check_compressible
from pipeline.peaks import TERA, peak_flops
from pipeline.prewarm import prewarm
from pipeline.schedules import StepPlan

# As few samples as batch norm takes: what is left of forward and backward then is not arithmetic.
FEW = 2
Cell = tuple[int, float]
COLUMNS = (
    Column("case", "case"),
    Column("milliseconds", "ms/step", ".1f", better="less"),
    Column("sample_ms", "ms/sample", ".3f"),
    Column("speedup", "speed-up", ".2f", better="more"),
    Column("speedup_low", "min", ".2f"),
    Column("speedup_high", "max", ".2f"),
    Column("promised", "promised", ".2f"),
    Column("realized", "realized", ".2f"),
    Column("teraflops", "TFLOPS", ".3f"),
    Column("mfu", "MFU", ".1%"),
    Column("kept_mib", "kept for backward MiB", ".0f", better="less"),
    Column("peak_mib", "peak MiB", ".0f", better="less"),
    Column("recompiles", "recompiles", "d", better="less"),
    Column("fed_ms", "ms/step with data", ".1f", better="less"),
    Column("waiting", "of it waiting", ".1%"),
)


def bench_step(config: BenchConfig, world: World) -> Report:
    """Measure every (patch size, dropout) cell against the uncompressed step, and where its time goes.

    Raises:
        ValueError: a method whose sequences cannot be compressed.
    """
    cells = grid(config)
    if cells[1:]:
        check_compressible(config.method)
    bench = _Bench(config, world)
    bench.prewarm(cells)
    rows = [bench.measure(cell) for cell in cells]
    if config.data.shards:
        bench.feed(cells, rows)
    return Report(COLUMNS, rows, _notes(rows), further=(PART_COLUMNS,))


def grid(config: BenchConfig) -> list[Cell]:
    """Return the cells to measure, the uncompressed one first."""
    asked = [(size, dropout) for size in config.patch_sizes or [config.model.patch_size] for dropout in config.dropouts]
    return list(dict.fromkeys([(config.model.patch_size, 0.0), *asked]))


class _Bench:
    """One engine, whose weights see one cell after the other."""

    def __init__(self, config: BenchConfig, world: World) -> None:
        self._config, self._world = config, world
        self._engine, self._method = make_engine(config, world)
        self._baseline = make_plan(config, self._method, Compression(), 0)
        self._local = config.batch_size // world.size
        self._peak = peak_flops(config.peak_teraflops, config.engine.precision, world.device)

    def prewarm(self, cells: Sequence[Cell]) -> None:
        """Compile what the cells will need, if blocks are compiled at all."""
        prewarm(self._method, map(self._plan, cells), self._local, self._world.device)

    def measure(self, cell: Cell) -> dict[str, Any]:
        """Return the row of a cell."""
        plan, compiled = self._plan(cell), self._recompiles()
        whole, own, splits, few = in_turn(
            self._config.rounds,
            self._draw,
            lambda batch: seconds(self._engine, batch, self._baseline, self._world),
            lambda batch: seconds(self._engine, batch, plan, self._world),
            lambda batch: split(self._engine, batch, plan, self._world),
            lambda _: self._host(plan),
        )
        # Before memory is looked at, which may compile as well.
        row: dict[str, Any] = {"recompiles": self._recompiles() - compiled}
        promised = self._method.sample_cost(self._baseline) / self._method.sample_cost(plan)
        row |= self._row(cell, plan, Spread.of(own)) | _speedup(whole, own, promised) | part_fields(splits)
        hosts = [each for each in few if each is not None]
        return row | Spread.of(hosts).fields("host_ms") if hosts else row

    def feed(self, cells: Sequence[Cell], rows: list[dict[str, Any]]) -> None:
        """Add to the rows what steps take whose images come from shards."""
        skip = batches_ahead(self._config, self._world, self._method)
        with closing(make_loader(self._config, self._world, self._method)) as loader:
            batches: Iterator[Batch] = loader.batches()
            for cell, row in zip(cells, rows, strict=True):
                step = partial(self._engine.step, plan=self._plan(cell))
                row |= fed_fields(fed_steps(batches, step, self._world.device, skip, self._config.rounds))

    def _row(self, cell: Cell, plan: StepPlan, own: Spread) -> dict[str, Any]:
        flops = step_flops(self._method, plan, self._local) / own.median
        return {
            "case": "patch {:3d} dropout {:.2f}".format(*cell),
            "patch_size": cell[0],
            "dropout": cell[1],
            **Spread(*(1e3 * each for each in (own.median, own.low, own.high))).fields("milliseconds"),
            "sample_ms": 1e3 * own.median / self._config.batch_size,
            "teraflops": flops / TERA,
            "mfu": flops / self._peak if self._peak else None,
            "kept_mib": self._kept(plan),
            "peak_mib": peak_of(lambda: self._engine.step(self._draw(), plan), self._world.device),
        }

    def _host(self, plan: StepPlan) -> float | None:
        """Return the milliseconds of forward and backward of next to no samples; None where the engine takes none."""
        if self._config.engine.micro_batch or self._config.model.compile:
            return None
        parts = split(self._engine, make_batch(self._config, self._world, self._method, FEW), plan, self._world)
        return 1e3 * (parts[FORWARD] + parts[BACKWARD])

    def _kept(self, plan: StepPlan) -> float | None:
        # What is cut is gathered by the engine's forward only.
        if self._config.engine.stage == SHARDED:
            return None
        batch = make_batch(self._config, self._world, self._method, self._config.engine.micro_batch)
        return kept_for_backward(self._method, batch, plan) / MIB

    def _plan(self, cell: Cell) -> StepPlan:
        return make_plan(self._config, self._method, compression(*cell), 0)

    def _draw(self) -> NoiseBatch:
        return make_batch(self._config, self._world, self._method)

    def _recompiles(self) -> int:
        return self._method.encoder.run_block.recompiles


def _speedup(whole: Sequence[float], own: Sequence[float], promised: float) -> dict[str, Any]:
    """Return what a cell makes of the uncompressed step, round by round, and the share of the promise that this is."""
    ratios = [a / b for a, b in zip(whole, own, strict=True)]
    realized = [ratio / promised for ratio in ratios]
    return {
        **Spread.of(ratios).fields("speedup"),
        **Spread.of(realized).fields("realized"),
        "promised": promised,
        "uncompressed_ms": 1e3 * Spread.of(whole).median,
        "rounds": {"uncompressed": list(whole), "own": list(own)},
    }


def _notes(rows: Sequence[Row]) -> list[str]:
    notes = [
        "speed-up: over the uncompressed step of the same round. promised: by real tokens (Costs in ARCHITECTURE.md). "
        "realized: speed-up over promise.",
        "host at most: forward and backward of 2 samples, which are part of those above; data: waiting for the loader.",
    ]
    return [*notes, *missing(rows)]


def missing(rows: Sequence[Row]) -> list[str]:
    """Say of the cell that realizes least which parts take longer than their promise."""
    whole, *cells = rows
    if not cells:
        return []
    worst = min(cells, key=lambda row: float(row["realized"]))
    # The uncompressed parts as they would have been in the rounds of this cell: machines get slower and faster.
    share = worst["uncompressed_ms"] / whole["milliseconds"] / worst["promised"]
    over = {part: worst[f"{part}_ms"] - whole[f"{part}_ms"] * share for part in PARTS}
    ranked = sorted(over, key=lambda part: -over[part])
    said = ", ".join(f"{part} {over[part]:+.1f}" for part in ranked if abs(over[part]) >= 0.05)
    return [
        f"Least realized: {worst['case']}, {worst['realized']:.2f}; its parts take {worst['split_ms']:.1f} ms of "
        f"{whole['split_ms'] * share:.1f} promised: {said or 'nothing over'}."
    ]
