"""Command: every method with and without compression at the same cost: what is learned, and whether cost is time."""

from __future__ import annotations

import statistics
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from data.manifest import Manifest
from pipeline.benchmarks.report import Column, Report
from pipeline.children import best_knn, coldpress, metrics_of, own_directory
from pipeline.config import CompareConfig

MARKER = ".coldpress-compare"
COLUMNS = (
    Column("method", "method"),
    Column("tokens", "compression"),
    Column("cost", "cost/sample", ".3f"),
    Column("samples", "samples", ",.0f"),
    Column("loss_first", "loss from", ".3f"),
    Column("loss_last", "to", ".3f"),
    Column("knn_init", "k-NN from", ".1%"),
    Column("knn", "to", ".1%"),
    Column("wall_seconds", "wall s", ",.0f"),
    Column("milliseconds_per_unit", "ms/unit", ".3f"),
    Column("data_wait", "data wait", ".1%"),
    Column("realized", "realized", ".2f"),
)


@dataclass(frozen=True)
class Case:
    """One run of the comparison."""

    method: str
    name: str
    words: tuple[str, ...]


def run(config: CompareConfig) -> None:
    """Train every method twice on the same budget and print one table.

    Raises:
        ValueError: shards that cannot be read, an output that holds something else, a command that failed.
    """
    Manifest.load(Path(config.shards))
    output = own_directory(Path(config.output), MARKER)
    rows, notes = [], []
    for method in config.methods:
        whole, compressed = (measure(config, output, case) for case in cases(config, method))
        compressed["realized"] = whole["milliseconds_per_unit"] / compressed["milliseconds_per_unit"]
        rows += [whole, compressed]
        notes.append(_explain(whole, compressed))
    report = Report(COLUMNS, rows, notes)
    print(report.table())
    report.write(output / "compare.json", "compare", asdict(config))


def cases(config: CompareConfig, method: str) -> tuple[Case, Case]:
    """Return the uncompressed and the compressed run of a method."""
    cell = (f"compression.patch_size={config.patch_size}", f"compression.dropout={config.dropout}")
    return (
        Case(method, "none", ("compression=none",)),
        Case(method, f"patch {config.patch_size}, dropout {config.dropout:g}", ("compression=constant", *cell)),
    )


def measure(config: CompareConfig, output: Path, case: Case) -> dict[str, Any]:
    """Train and evaluate one case and return its row."""
    name = f"{case.method}-{case.words[0].partition('=')[2]}"
    where = (f"run={name}", f"runs={output}")
    begin = time.monotonic()
    words = (f"experiment=small_{case.method}", f"data.shards={config.shards}", f"budget.value={config.budget:g}")
    coldpress("train", *words, *where, *case.words)
    wall = time.monotonic() - begin
    knn = [_evaluate(config, output / name, where, checkpoint) for checkpoint in ("init", "latest")]
    trained = summarize(metrics_of(output / name))
    return {
        "method": case.method,
        "tokens": case.name,
        "wall_seconds": wall,
        "knn_init": knn[0],
        "knn": knn[1],
        **trained,
    }


def summarize(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return what the metrics of a whole run say.

    Time is that of steps, without start and saves: the median over the log intervals, since a machine that others use,
    too, stutters.
    """
    training = [row for row in rows if "loss" in row]
    last = training[-1]
    return {
        "steps": last["step"],
        "samples": last["samples_total"],
        "cost": last["cost_total"] / last["samples_total"],
        "loss_first": training[0]["loss"],
        "loss_last": last["loss"],
        "milliseconds_per_unit": statistics.median(1e3 / row["cost_per_second"] for row in training),
        "data_wait": statistics.median(row["data_wait_ratio"] for row in training),
    }


def _evaluate(config: CompareConfig, run: Path, where: tuple[str, ...], checkpoint: str) -> float:
    extra = [f"shards={config.val}"] if config.val else []
    coldpress("evaluate", *where, f"checkpoint={checkpoint}", f"support={config.support}", "k=[20]", *extra)
    return best_knn(run)


def _explain(whole: dict[str, Any], compressed: dict[str, Any]) -> str:
    """Say how much of the promise came true."""
    promised = whole["cost"] / compressed["cost"]
    realized = promised * compressed["realized"]
    return (
        f"{whole['method']}: a compressed sample costs {promised:.2f}x less and takes {realized:.2f}x less time; "
        f"a unit takes {100 * (1 / compressed['realized'] - 1):+.1f} % of time, of which waiting for data is "
        f"{100 * (compressed['data_wait'] - whole['data_wait']):+.1f} points."
    )
