"""LocalMIM's step with targets from one pass over the pixels, against one pass for each scale and color."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from unittest.mock import patch

from torch import Tensor

from pipeline.benchmarks.peers.hog_by_scale import hog_by_scale
from pipeline.benchmarks.report import Column, Report
from pipeline.benchmarks.step import WARMUP, make_batch, make_engine, make_plan, seconds
from pipeline.compression import Compression
from pipeline.config import BenchConfig
from pipeline.distributed import World
from pipeline.methods import LocalMIMConfig
from pipeline.models.hog import hog_targets

COLUMNS = (
    Column("case", "targets"),
    Column("milliseconds", "ms/step", ".1f"),
    Column("ratio", "over one pass", ".3f"),
    Column("ratio_low", "min", ".3f"),
    Column("ratio_high", "max", ".3f"),
)
Targets = Callable[[Tensor, Sequence[int], int], list[Tensor]]


def bench_targets(config: BenchConfig, world: World) -> Report:
    """Measure whole steps of an unfrozen LocalMIM with both ways of making its targets.

    Raises:
        ValueError: another method, which has no such targets.
    """
    if not isinstance(config.method, LocalMIMConfig):
        raise ValueError("what=targets measures LocalMIM's; say method=localmim.")
    engine, method = make_engine(config, world)
    plan = make_plan(config, method, Compression(), 0)
    ways: dict[str, Targets] = {"one pass": hog_targets, "by scale and color": hog_by_scale}
    times: dict[str, list[float]] = {name: [] for name in ways}
    for round_ in range(WARMUP + config.rounds):
        for name, way in ways.items():
            batch = make_batch(config, world, method)
            with patch("pipeline.methods.localmim.hog_targets", way):
                took = seconds(engine, batch, plan, world)
            if round_ >= WARMUP:
                times[name].append(took)
    return Report(COLUMNS, [_row(name, each, times["one pass"]) for name, each in times.items()])


def _row(name: str, times: list[float], ours: list[float]) -> dict[str, float | str]:
    ratios = [a / b for a, b in zip(times, ours, strict=True)]
    return {
        "case": name,
        "milliseconds": 1e3 * statistics.median(times),
        "ratio": statistics.median(ratios),
        "ratio_low": min(ratios),
        "ratio_high": max(ratios),
    }
