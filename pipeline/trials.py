"""Training runs that are set side by side: what each was told, and what its files say of it."""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch

from data.manifest import Manifest, SampleIndex
from pipeline.children import best_knn, coldpress, metrics_of
from pipeline.compose import load
from pipeline.config import TrainConfig
from pipeline.methods import build_method
from pipeline.models.vit import ViT
from pipeline.schedules import StepPlan

# Figures of a run of fewer steps are those of its start.
FEW_STEPS = 30


@dataclass(frozen=True)
class Task:
    """What all runs have in common: data, budget in the unit that their words say, and how they are judged."""

    shards: str
    # Labelled shards to classify by the training shards; empty: a held-out fifth of those.
    val: str
    budget: float
    # Support samples of the k-NN evaluations; 0 takes all.
    support: int
    output: str


@dataclass(frozen=True)
class Trial:
    """One training run: its name, the experiment that it starts from, and the words that make it this one."""

    run: str
    experiment: str
    words: tuple[str, ...]

    def train(self, task: Task) -> dict[str, float]:
        """Train and return the time it took and what `summarize` makes of its metrics."""
        begin = time.monotonic()
        coldpress("train", *self.training_words(task))
        wall = time.monotonic() - begin
        return {"wall_seconds": wall, **summarize(metrics_of(Path(task.output) / self.run))}

    def evaluate(self, task: Task, checkpoint: str) -> float:
        """Return the k-NN accuracy of a checkpoint."""
        extra = [f"shards={task.val}"] if task.val else []
        place = self._place(task)
        coldpress("evaluate", *place, f"checkpoint={checkpoint}", f"support={task.support}", "k=[20]", *extra)
        return best_knn(Path(task.output) / self.run)

    def training_words(self, task: Task) -> list[str]:
        """Return the words of the training command."""
        data, budget = f"data.shards={task.shards}", f"budget.value={task.budget}"
        return [f"experiment={self.experiment}", data, budget, *self._place(task), *self.words]

    def _place(self, task: Task) -> tuple[str, str]:
        return f"run={self.run}", f"runs={task.output}"


def check(task: Task, trials: Sequence[Trial]) -> None:
    """Find what would stop a comparison only when some of its runs are over.

    Raises:
        ValueError: shards that are not whole, or have no labels or not the same ones; a patch size or a dropout that a
            model does not take; a budget that some run spends in its first step.
    """
    check_shards(task)
    costs = {trial.run: cost_of_step(task, trial) for trial in trials}
    dearest = max(costs, key=lambda run: costs[run])
    if task.budget <= costs[dearest]:
        raise ValueError(
            f"budget must buy every run at least 2 steps, got {task.budget:g}: one step of {dearest} costs "
            f"{costs[dearest]:g}; 120e3 takes minutes a run on two cores."
        )


def cost_of_step(task: Task, trial: Trial) -> float:
    """Return the units of cost of a run's first step.

    Raises:
        ValueError: a patch size or a dropout that its model does not take.
    """
    try:
        training: TrainConfig = load("train", trial.training_words(task))
        with torch.device("meta"):
            method = build_method(training.method, ViT(training.model, training.seed))
        query = training.compression.at(0.0)
        key = training.compression.key_at(0.0, method.key_compression(query))
        plan = StepPlan(0.0, 1.0, 0.0, 1.0, (1.0,) * method.encoder.num_layers, query, key)
        return training.batch_size * method.sample_cost(plan)
    except ValueError as error:
        # What a training calls compression.patch_size is our patch_size.
        raise ValueError(str(error).removeprefix("compression.")) from error


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


def step_seconds(rows: list[dict[str, float]]) -> dict[int, tuple[float, float]]:
    """Return, by frozen layers, how many steps a run took and how long each: the median over log intervals."""
    training = [row for row in rows if "loss" in row]
    steps: Counter[int] = Counter()
    seconds: dict[int, list[float]] = {}
    for before, row in pairwise([{"steps_total": 0.0}, *training]):
        frozen = int(row["frozen_layers"])
        steps[frozen] += int(row["steps_total"] - before["steps_total"])
        seconds.setdefault(frozen, []).append(row["step_seconds"])
    return {frozen: (steps[frozen], statistics.median(each)) for frozen, each in seconds.items()}


def caveats(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say what the table's columns are not, and which of its rows say little."""
    logged = ", ".join(f"{step:.0f}" for step in sorted({row["step_first"] for row in rows}))
    first = f"`loss from` is of the first step that is logged ({logged}), `k-NN from` of the untrained encoder."
    return [first, *short_runs(rows)]


def short_runs(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Say which rows say little."""
    short = [f"{row['run']}: {row['steps']:.0f}" for row in rows if row["steps"] < FEW_STEPS]
    if not short:
        return []
    return [
        f"Fewer than {FEW_STEPS} steps, so that figures are noise of the start ({'; '.join(short)}): "
        "say a larger budget."
    ]


def check_support(support: int) -> None:
    if support < 0:
        raise ValueError(f"support must be a number of samples, got {support}; 0 takes all.")


def check_shards(task: Task) -> None:
    """Raise ValueError for shards that are not whole, or have no labels or not the same ones."""
    train, val = task.shards, task.val or task.shards
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
