"""Command: every method with and without compression at the same cost: what is learned, and whether cost is time."""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch

from data.manifest import Manifest, SampleIndex
from pipeline.benchmarks.report import Column, Report
from pipeline.children import best_knn, coldpress, metrics_of, own_directory
from pipeline.compose import load
from pipeline.config import CompareConfig, TrainConfig
from pipeline.methods import build_method
from pipeline.models.vit import ViT
from pipeline.schedules import StepPlan

MARKER = ".coldpress-compare"
# Figures of a run of fewer steps are those of its start.
FEW_STEPS = 30
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
    """One run of the comparison: a method, what is done to its tokens, and the words that say so."""

    method: str
    name: str
    words: tuple[str, ...]

    @property
    def run(self) -> str:
        """Return the name of the run."""
        return f"{self.method}-{self.words[0].partition('=')[2]}"


def run(config: CompareConfig) -> None:
    """Train every method twice on the same budget and print one table.

    Raises:
        ValueError: what `check` finds, an output that holds something else, a command that failed.
    """
    check(config)
    output = own_directory(Path(config.output), MARKER)
    rows, notes = [], []
    for method in dict.fromkeys(config.methods):
        whole, compressed = (measure(config, case) for case in cases(config, method))
        compressed["realized"] = whole["milliseconds_per_unit"] / compressed["milliseconds_per_unit"]
        rows += [whole, compressed]
        notes.append(_explain(whole, compressed))
    report = Report(COLUMNS, rows, [*notes, *caveats(rows)])
    print(report.table())
    report.write(output / "compare.json", "compare", asdict(config))


def cases(config: CompareConfig, method: str) -> tuple[Case, Case]:
    """Return the uncompressed and the compressed run of a method."""
    cell = (f"compression.patch_size={config.patch_size}", f"compression.dropout={config.dropout}")
    return (
        Case(method, "none", ("compression=none",)),
        Case(method, f"patch {config.patch_size}, dropout {config.dropout:g}", ("compression=constant", *cell)),
    )


def check(config: CompareConfig) -> None:
    """Find what would stop a comparison only when some of its runs are over.

    Raises:
        ValueError: shards that are not whole, or have no labels or not the same ones; a patch size or a dropout that a
            model does not take; a budget that some run spends in its first step.
    """
    _check_shards(config)
    costs = {case: cost_of_step(config, case) for method in config.methods for case in cases(config, method)}
    dearest = max(costs, key=lambda case: costs[case])
    if config.budget <= costs[dearest]:
        raise ValueError(
            f"budget must buy every run at least 2 steps, got {config.budget:g}: one step of {dearest.method} "
            f"(compression {dearest.name}) costs {costs[dearest]:g}; 90e3 takes minutes a run on two cores."
        )


def cost_of_step(config: CompareConfig, case: Case) -> float:
    """Return the units of cost of one step of a run.

    Raises:
        ValueError: a patch size or a dropout that its model does not take.
    """
    try:
        training: TrainConfig = load("train", _training(config, case))
        with torch.device("meta"):
            method = build_method(training.method, ViT(training.model, training.seed))
        query = training.compression.at(0.0)
        key = training.compression.key_at(0.0, method.key_compression(query))
        plan = StepPlan(0.0, 1.0, 0.0, 1.0, (1.0,) * method.encoder.num_layers, query, key)
        return training.batch_size * method.sample_cost(plan)
    except ValueError as error:
        # What a training calls compression.patch_size is our patch_size.
        raise ValueError(str(error).removeprefix("compression.")) from error


def measure(config: CompareConfig, case: Case) -> dict[str, Any]:
    """Train and evaluate one case and return its row."""
    begin = time.monotonic()
    coldpress("train", *_training(config, case))
    wall = time.monotonic() - begin
    return {
        "method": case.method,
        "tokens": case.name,
        "wall_seconds": wall,
        "knn_init": _evaluate(config, case, "init"),
        "knn": _evaluate(config, case, "latest"),
        **summarize(metrics_of(Path(config.output) / case.run)),
    }


def summarize(rows: list[dict[str, float]]) -> dict[str, float]:
    """Return what the metrics of a whole run say.

    Time is that of steps, without start and saves: the median over the log intervals, since a machine that others use,
    too, stutters.
    """
    training = [row for row in rows if "loss" in row]
    first, last = training[0], training[-1]
    return {
        "steps": last["step"],
        "samples": last["samples_total"],
        "cost": last["cost_total"] / last["samples_total"],
        "step_first": first["step"],
        "loss_first": first["loss"],
        "loss_last": last["loss"],
        "milliseconds_per_unit": statistics.median(1e3 / row["cost_per_second"] for row in training),
        "data_wait": statistics.median(row["data_wait_ratio"] for row in training),
    }


def caveats(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the table's columns are not, and which of its rows say little."""
    logged = ", ".join(f"{step:.0f}" for step in sorted({row["step_first"] for row in rows}))
    notes = [f"`loss from` is of the first step that is logged ({logged}), `k-NN from` of the untrained encoder."]
    short = [f"{row['method']} {row['tokens']}: {row['steps']:.0f}" for row in rows if row["steps"] < FEW_STEPS]
    if short:
        notes.append(
            f"Fewer than {FEW_STEPS} steps, so that figures are noise of the start ({'; '.join(short)}): "
            "say a larger budget."
        )
    return notes


def _check_shards(config: CompareConfig) -> None:
    train, val = config.shards, config.val or config.shards
    sets = {shards: Manifest.load(Path(shards)) for shards in (train, val)}
    if not sets[train].classes:
        raise ValueError(f"shards: {train} has no labels, which k-NN asks for; shard folders of classes.")
    if sets[val].classes != sets[train].classes:
        raise ValueError(
            f"val: {val} has {len(sets[val].classes)} classes, {train} has {len(sets[train].classes)} or others; "
            "both must be sharded from the same class names."
        )
    for shards, manifest in sets.items():
        SampleIndex.load(Path(shards), manifest)


def _training(config: CompareConfig, case: Case) -> list[str]:
    """Return the words of a case's training command."""
    what = (f"experiment=small_{case.method}", f"data.shards={config.shards}", f"budget.value={config.budget}")
    return [*what, *_place(config, case), *case.words]


def _place(config: CompareConfig, case: Case) -> tuple[str, str]:
    return f"run={case.run}", f"runs={config.output}"


def _evaluate(config: CompareConfig, case: Case, checkpoint: str) -> float:
    extra = [f"shards={config.val}"] if config.val else []
    where = _place(config, case)
    coldpress("evaluate", *where, f"checkpoint={checkpoint}", f"support={config.support}", "k=[20]", *extra)
    return best_knn(Path(config.output) / case.run)


def _explain(whole: dict[str, Any], compressed: dict[str, Any]) -> str:
    """Say how much of the promise came true."""
    promised = whole["cost"] / compressed["cost"]
    realized = promised * compressed["realized"]
    return (
        f"{whole['method']}: a compressed sample costs {promised:.2f}x less and takes {realized:.2f}x less time; "
        f"a unit takes {100 * (1 / compressed['realized'] - 1):+.1f} % of time, of which waiting for data is "
        f"{100 * (compressed['data_wait'] - whole['data_wait']):+.1f} points."
    )
