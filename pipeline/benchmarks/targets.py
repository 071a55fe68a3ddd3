"""LocalMIM's step with targets from one pass over the pixels, against one pass for each scale and color."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

from torch import Tensor

from pipeline.benchmarks.cases import alternate, make_engine, make_plan
from pipeline.benchmarks.peers.hog_by_scale import hog_by_scale
from pipeline.benchmarks.report import Column, Report
from pipeline.benchmarks.timing import Spread
from pipeline.compression import Compression
from pipeline.config import BenchConfig
from pipeline.distributed import World
from pipeline.methods import LocalMIMConfig
from pipeline.methods.localmim import LocalMIM

COLUMNS = (
    Column("case", "targets"),
    Column("milliseconds", "ms/step", ".1f"),
    Column("ratio", "over one pass", ".3f", better="more"),
    Column("ratio_low", "min", ".3f"),
    Column("ratio_high", "max", ".3f"),
)


class ByScale(LocalMIM):
    """LocalMIM with targets as its published code makes them."""

    def targets(self, images: Tensor, cells: Sequence[int]) -> list[Tensor]:
        """Return the targets for each cell size."""
        return hog_by_scale(images, cells, self.config.bins)


def bench_targets(config: BenchConfig, world: World) -> Report:
    """Measure whole steps of an unfrozen LocalMIM with both ways of making its targets.

    Raises:
        ValueError: another method, which has no such targets.
    """
    if not isinstance(config.method, LocalMIMConfig):
        raise ValueError("what=targets measures LocalMIM's; say method=localmim.")
    ours, method = make_engine(config, world)
    theirs, _ = make_engine(config, world, ByScale)
    plan = make_plan(config, method, Compression(), 0)
    times = dict(
        zip(("one pass", "by scale and color"), alternate(config, world, (ours, plan), (theirs, plan)), strict=True)
    )
    return Report(COLUMNS, [_row(name, each, times["one pass"]) for name, each in times.items()])


def _row(name: str, times: list[float], ours: list[float]) -> dict[str, float | str]:
    ratios = [a / b for a, b in zip(times, ours, strict=True)]
    return {
        "case": name,
        "milliseconds": 1e3 * statistics.median(times),
        **Spread.of(ratios).fields("ratio"),
    }
