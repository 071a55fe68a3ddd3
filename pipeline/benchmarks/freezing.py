"""Step time, memory and the price of a freeze, frozen layer by frozen layer, against a twin that never freezes."""

from __future__ import annotations

import math
import statistics
import time
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from pipeline.benchmarks.cases import alternate, make_batch, make_engine, make_plan
from pipeline.benchmarks.memory import MIB, kept_for_backward, peak_of
from pipeline.benchmarks.report import Column, Report
from pipeline.benchmarks.timing import Spread
from pipeline.compression import Compression
from pipeline.config import BenchConfig
from pipeline.distributed import World
from pipeline.engine_config import FSDP2
from pipeline.flops import step_flops
from pipeline.freezing import FreezeOut

# Of paper B: ten of a hundred epochs.
WARMUP = 0.1
COLUMNS = (
    Column("frozen", "frozen layers", "d"),
    Column("milliseconds", "ms/step", ".1f"),
    Column("ratio", "of unfrozen", ".3f", better="less"),
    Column("ratio_low", "min", ".3f"),
    Column("ratio_high", "max", ".3f"),
    Column("ideal", "ideal", ".3f"),
    Column("realized", "realized", ".2f"),
    Column("activation_mib", "kept for backward MiB", ".0f", better="less"),
    Column("peak_mib", "peak MiB", ".0f", better="less"),
    Column("optimizer_mib", "optimizer MiB", ".1f", better="less"),
    Column("freeze_seconds", "freeze s", ".2f"),
)


@dataclass(frozen=True)
class Row:
    """Some frozen layers: times as shares of the unfrozen twin's, `ideal` the same of FLOPs, and what is kept."""

    frozen: int
    milliseconds: float
    ratio: float
    ratio_low: float
    ratio_high: float
    ideal: float
    activation_mib: float
    peak_mib: float | None
    optimizer_mib: float
    freeze_seconds: float

    @property
    def realized(self) -> float | None:
        """Return the saved time over the time that could be saved; None where that is nothing."""
        return (1 - self.ratio) / (1 - self.ideal) if self.ideal < 0.999 else None


def bench_freezing(config: BenchConfig, world: World) -> Report:
    """Measure 0, 1, 2, ... frozen layers against a twin that never freezes, and what that makes of a whole run.

    Raises:
        ValueError: an engine under which a method cannot be called on its own.
    """
    if isinstance(config.engine, FSDP2):
        raise ValueError(
            "bench what=freezing counts what a forward beside the engine keeps, and with engine=fsdp2 there is none; "
            "take engine=zero2 or another stage."
        )
    engine, method = make_engine(config, world)
    twin, _ = make_engine(config, world)
    baseline = make_plan(config, method, Compression(), 0)
    rows: list[Row] = []
    batch, local = make_batch(config, world, method), config.batch_size // world.size
    for frozen in range(method.encoder.num_layers):
        plan = make_plan(config, method, Compression(), frozen)
        begin = time.perf_counter()
        engine.freeze(frozen)
        freeze_seconds = time.perf_counter() - begin
        unfrozen, seconds = alternate(config, world, (twin, baseline), (engine, plan))
        ratios = [b / a for a, b in zip(unfrozen, seconds, strict=True)]
        rows.append(
            Row(
                frozen=frozen,
                milliseconds=1e3 * statistics.median(seconds),
                **Spread.of(ratios).fields("ratio"),
                # Heads, which never freeze, and a prefix that both encoders share by now among them.
                ideal=step_flops(method, plan, local) / step_flops(method, baseline, local),
                activation_mib=kept_for_backward(method, batch, plan) / MIB,
                peak_mib=peak_of(partial(engine.step, batch, plan), world.device),
                optimizer_mib=engine.optimizer_bytes() / MIB,
                freeze_seconds=freeze_seconds,
            )
        )
    return Report(COLUMNS, [_fields(row) for row in rows], [whole_run(rows)])


def whole_run(rows: list[Row]) -> str:
    """Say what the steps measured make of a run under paper B's schedule: cubic, t0 = 0.8, 10 % of warm-up."""
    shares = time_shares(len(rows))
    ideal = sum(share * (1 - row.ideal) for share, row in zip(shares, rows, strict=True))
    # What twins of which none is frozen differ by is noise, and counts for more than half of the run.
    saved = sum(share * (1 - row.ratio) for share, row in zip(shares, rows, strict=True) if row.frozen)
    rebuilds = sum(row.freeze_seconds for row in rows)
    return (
        "A run of freeze.t0=0.8 freeze.curve=cubic rate.warmup=0.1 and as many steps as without freezing: "
        f"{saved:.1%} less time of {ideal:.1%} that could be saved, {saved / ideal if ideal else math.nan:.0%} of it, "
        f"data aside; all {len(rows) - 1} freezes together take {rebuilds:.1f} s."
    )


def time_shares(layers: int) -> list[float]:
    """Return the share of a run's steps at each number of frozen layers, 0 to all but the last."""
    times = FreezeOut().freeze_times(layers)
    ends = [WARMUP + (1 - WARMUP) * time for time in times if time is not None] + [1.0]
    return [end - begin for begin, end in zip([0.0, *ends], ends, strict=False)]


def _fields(row: Row) -> dict[str, Any]:
    return asdict(row) | {"realized": row.realized}
