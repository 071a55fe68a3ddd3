"""Command: the whole of paper A at once: a baseline, its gradient errors, their schedule, and what each is worth."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from pipeline.analysis.measure import grid as cells
from pipeline.analysis.results import read
from pipeline.analysis.selection import best_constant
from pipeline.benchmarks.report import Column, Report
from pipeline.checkpoint_files import checkpoints, progress_of, step_of
from pipeline.children import coldpress, metrics_of, own_directory
from pipeline.compose import load
from pipeline.compression import Adaptive
from pipeline.config import TrainConfig
from pipeline.methods import check_compressible
from pipeline.study_plots import study_picture
from pipeline.trials import Task, Trial, caveats, check

MARKER = ".coldpress-study"
BASELINE, CONSTANT, STAGED, ADAPTIVE = "none", "constant", "staged", "adaptive"
SCHEDULES = (BASELINE, CONSTANT, STAGED, ADAPTIVE)
# Each quarter of a run is evaluated, and of the baseline analyzed.
MILESTONES = (0.25, 0.5, 0.75, 1.0)
NEVER = 10**9
COLUMNS = (
    Column("schedule", "compression"),
    Column("seed", "seed", ".0f"),
    Column("cost", "cost/sample", ".3f"),
    Column("samples", "samples", ",.0f"),
    Column("loss_first", "loss from", ".3f"),
    Column("loss_last", "to", ".3f"),
    *(Column(f"knn_{milestone:.0%}", f"k-NN {milestone:.0%}", ".1%") for milestone in (0.0, *MILESTONES)),
    Column("wall_seconds", "wall s", ",.0f"),
    Column("milliseconds_per_unit", "ms/unit", ".3f"),
    Column("reached", "reached: cost", ".0%"),
    Column("reached_time", "time", ".0%"),
)


@dataclass
class StudyConfig:
    """Baseline, analysis, schedule, and runs of one budget without compression, constant, staged and adaptive."""

    shards: str
    # Labelled shards to classify by the training shards; without, a held-out fifth of the training shards.
    val: str = ""
    output: str = "runs/study"
    # The experiment that all runs start from.
    baseline: str = "tiny_moco"
    seeds: list[int] = field(default_factory=lambda: [0])
    # Units of cost of each run.
    budget: float = 200e3
    # Of the analysis, as in `coldpress analyze`.
    patch_sizes: list[int] = field(default_factory=list)
    dropouts: list[float] = field(default_factory=lambda: [0.0, 0.25, 0.5, 0.75])
    samples: int = 4096
    sub_batch: int = 64
    # Of its budget, what the adaptive run may spend on measuring. In runs of some hundred steps the usual 0.02 would
    # pay for a handful of measurements.
    adaptive_share: float = 0.1
    # Support samples of the k-NN evaluations; 0 takes all.
    support: int = 5000

    def __post_init__(self) -> None:
        if not 0 < self.budget < math.inf:
            raise ValueError(f"budget must be above 0, got {self.budget:g}; 200e3 takes minutes a run on two cores.")
        if not self.seeds or len(set(self.seeds)) < len(self.seeds):
            raise ValueError(f"seeds must be one or several different numbers, got {self.seeds}.")


def run(config: StudyConfig) -> None:
    """Train the baseline, analyze it, then train with every way of compressing on the same budget; print one table.

    Raises:
        ValueError: what would stop it half-way, an output that holds something else, a command that failed.
    """
    task = Task(config.shards, config.val, config.budget, config.support, config.output)
    check(task, [_trial(config, BASELINE, config.seeds[0], ("compression=none",))])
    _check_grid(config, task)
    output = own_directory(Path(config.output), MARKER)
    rows = _rows(config, task, output)
    metrics = {row["run"]: metrics_of(output / row["run"]) for row in rows}
    for row in rows:
        baseline = next(r for r in rows if r["schedule"] == BASELINE and r["seed"] == row["seed"])
        row["reached"] = reached(row, baseline["knn_100%"])
        seconds = seconds_until(metrics[row["run"]], row["reached"])
        row["reached_time"] = seconds / seconds_until(metrics[baseline["run"]], 1.0)
    report = Report(COLUMNS, rows, [*_notes(rows), *caveats(rows)])
    print(report.table())
    report.write(output / "study.json", "study", asdict(config))
    study_picture(rows, metrics, output / "study.png")
    print(f"picture: {output / 'study.png'}")


def reached(row: dict[str, Any], accuracy: float) -> float:
    """Return the share of the budget at which a run's k-NN was first as good as `accuracy`, between evaluations linear.

    Not a number if it never was.
    """
    points = [(0.0, row["knn_0%"]), *((m, row[f"knn_{m:.0%}"]) for m in MILESTONES)]
    for (before, low), (after, high) in pairwise(points):
        if high >= accuracy:
            rise = (accuracy - low) / (high - low) if high > low else 0.0
            return before + max(0.0, rise) * (after - before)
    return float("nan")


def seconds_until(metrics: list[dict[str, float]], share: float) -> float:
    """Return the seconds of steps, without start and saves, in which a run spent a share of its budget."""
    if math.isnan(share):
        return share
    seconds = before = 0.0
    for row in metrics:
        if "loss" in row:
            spent = min(row["cost_total"], share * row["budget_total"])
            seconds += max(0.0, spent - before) / row["cost_per_second"]
            before = row["cost_total"]
    return seconds


def _rows(config: StudyConfig, task: Task, output: Path) -> list[dict[str, Any]]:
    """Train and evaluate every run."""
    rows: list[dict[str, Any]] = []
    untrained: dict[int, float] = {}
    for schedule, seed, trial in _trials(config, output):
        trained = trial.train(task)
        # The same for all runs of a seed.
        if seed not in untrained:
            untrained[seed] = trial.evaluate(task, "init")
        knn = {"knn_0%": untrained[seed], **_accuracies(task, trial)}
        rows.append({"run": trial.run, "schedule": schedule, "seed": seed, **trained, **knn})
    return rows


def _trials(config: StudyConfig, output: Path) -> Iterator[tuple[str, int, Trial]]:
    """Yield each run when what it needs is there: the first baseline, its analysis in between, then all others."""
    first, *others = config.seeds
    baseline = _trial(config, BASELINE, first, ("compression=none",))
    yield BASELINE, first, baseline
    coldpress("analyze", *_analysis(config, baseline.run))
    folder = output / baseline.run / "analysis"
    size, dropout = best_constant(read(folder / "gradient_error.json"))
    words = {
        BASELINE: ("compression=none",),
        CONSTANT: ("compression=constant", f"compression.patch_size={size}", f"compression.dropout={dropout}"),
        STAGED: ("compression=staged", f"compression.file={folder / 'schedule.yaml'}"),
        ADAPTIVE: _adaptive(config),
    }
    for seed in (first, *others):
        for schedule in SCHEDULES:
            if (schedule, seed) != (BASELINE, first):
                yield schedule, seed, _trial(config, schedule, seed, words[schedule])


def _check_grid(config: StudyConfig, task: Task) -> None:
    """Refuse before the first training what the analysis or the adaptive run would refuse after it.

    Raises:
        ValueError: cells that the model cannot take, or samples that sub-batches do not divide.
    """
    training: TrainConfig = load("train", _trial(config, ADAPTIVE, 0, _adaptive(config)).training_words(task))
    check_compressible(training.method)
    cells(config.patch_sizes, config.dropouts, training.model)
    assert isinstance(training.compression, Adaptive)
    training.compression.fitted(training.model.image_size, training.model.patch_size)
    load("analyze", _analysis(config, "x"))


def _analysis(config: StudyConfig, run: str) -> list[str]:
    amount = (f"samples={config.samples}", f"sub_batch={config.sub_batch}")
    return [f"run={run}", f"runs={config.output}", *_grid(config), *amount]


def _adaptive(config: StudyConfig) -> tuple[str, ...]:
    share = f"compression.share={config.adaptive_share}"
    return ("compression=adaptive", share, *(f"compression.{word}" for word in _grid(config)))


def _grid(config: StudyConfig) -> tuple[str, str]:
    sizes, rates = (str(each).replace(" ", "") for each in (config.patch_sizes, config.dropouts))
    return f"patch_sizes={sizes}", f"dropouts={rates}"


def _trial(config: StudyConfig, schedule: str, seed: int, words: tuple[str, ...]) -> Trial:
    saves = (
        f"checkpoint.milestones={[*MILESTONES]}".replace(" ", ""),
        f"checkpoint.every_steps={NEVER}",
        f"checkpoint.every_minutes={NEVER}",
    )
    return Trial(f"{schedule}-{seed}", config.baseline, (*words, f"seed={seed}", *saves))


def _accuracies(task: Task, trial: Trial) -> dict[str, float]:
    """Return the k-NN accuracy at each milestone of a finished run."""
    saved = checkpoints(Path(task.output) / trial.run / "checkpoints")
    steps = {m: step_of(next(c for c in saved if progress_of(c) >= m)) for m in MILESTONES}
    return {f"knn_{m:.0%}": trial.evaluate(task, str(step)) for m, step in steps.items()}


def _notes(rows: list[dict[str, Any]]) -> list[str]:
    """Say how the ways of compressing compare, with the spread over seeds where there are several."""
    notes = ["`reached`: the shares of the uncompressed run's cost and time at which its final k-NN was reached."]
    seeds = len({row["seed"] for row in rows})
    for schedule in SCHEDULES if seeds > 1 else ():
        knn = [row["knn_100%"] for row in rows if row["schedule"] == schedule]
        notes.append(f"{schedule}: k-NN {statistics.mean(knn):.2%} +- {statistics.stdev(knn):.2%} over {seeds} seeds.")
    return notes
