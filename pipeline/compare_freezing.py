"""Command: a run without freezing, frozen in two ways for as many steps, and cut short at the cost of a frozen one."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from monitoring.metrics import TERMS
from pipeline.benchmarks.report import Column, Report
from pipeline.children import metrics_of, own_directory
from pipeline.freezing_plots import freezing_picture
from pipeline.trials import Task, Trial, check_shards, check_support, short_runs, step_seconds

MARKER = ".coldpress-compare-freezing"
UNFROZEN, UNSCALED, SCALED, SHORTENED = "unfrozen", "frozen", "frozen, scaled", "shortened"
COLUMNS = (
    Column("case", "run"),
    Column("steps", "steps", ",.0f"),
    Column("units", "cost", ",.0f"),
    Column("cost_ratio", "of unfrozen", ".3f"),
    Column("seconds", "seconds of steps", ",.0f"),
    Column("time_ratio", "of unfrozen", ".3f"),
    Column("realized", "realized", ".2f"),
    Column("last_loss", "last term of loss", ".4f"),
    Column("knn_init", "k-NN from", ".1%"),
    Column("knn", "to", ".1%"),
    Column("optimizer_mib", "optimizer MiB at the end", ".1f"),
)


@dataclass
class CompareFreezingConfig:
    """Runs of one experiment without freezing, with it, and cut short at the cost of the frozen one."""

    shards: str
    # Labelled shards to classify by the training shards; without, a held-out fifth of the training shards.
    val: str = ""
    output: str = "runs/compare-freezing"
    # The experiment that all runs start from.
    baseline: str = "small_localmim"
    # Steps of the runs that are not cut short.
    steps: int = 400
    # Support samples of the k-NN evaluations; 0 takes all.
    support: int = 5000

    def __post_init__(self) -> None:
        check_support(self.support)
        if self.steps < 2:
            raise ValueError(f"steps must be at least 2, got {self.steps}; 400 take minutes a run on two cores.")


def run(config: CompareFreezingConfig) -> None:
    """Train four times and print one table.

    Raises:
        ValueError: shards without labels or not whole, an output that holds something else, a command that failed.
    """
    task = Task(config.shards, config.val, config.steps, config.support, config.output)
    check_shards(task)
    output = own_directory(Path(config.output), MARKER)
    rows: list[dict[str, Any]] = []
    for case in (UNFROZEN, UNSCALED, SCALED, SHORTENED):
        rows.append(_row(task, case, trial(config, case, rows), rows))
    pace = "Time `of unfrozen` is held against the same run's own steps before any layer froze."
    report = Report(COLUMNS, rows, [verdict(rows), pace, *short_runs(rows)])
    print(report.table())
    report.write(output / "compare-freezing.json", "compare-freezing", asdict(config))
    freezing_picture({row["case"]: metrics_of(output / row["run"]) for row in rows}, output / "compare-freezing.png")
    print(f"picture: {output / 'compare-freezing.png'}")


def trial(config: CompareFreezingConfig, case: str, rows: list[dict[str, Any]]) -> Trial:
    """Return a run; the shortened one has the cost of the frozen one that came before."""
    words = {
        UNFROZEN: ("freeze=none", "budget.unit=steps"),
        UNSCALED: ("freeze=freezeout", "budget.unit=steps"),
        SCALED: ("freeze=freezeout", "freeze.scaled=true", "budget.unit=steps"),
    }
    if case == SHORTENED:
        units = next(row["units"] for row in rows if row["case"] == UNSCALED)
        return Trial("shortened", config.baseline, ("freeze=none", "budget.unit=cost", f"budget.value={units}"))
    return Trial(case.replace(", ", "-"), config.baseline, words[case])


def verdict(rows: list[dict[str, Any]]) -> str:
    """Say which run is best at the frozen run's cost, by k-NN."""
    equal = [row for row in rows if row["case"] != UNFROZEN]
    best = max(equal, key=lambda row: float(row["knn"]))
    others = ", ".join(f"{row['case']} {row['knn']:.1%}" for row in equal if row is not best)
    whole = next(row for row in rows if row["case"] == UNFROZEN)
    return (
        f"At the cost of the frozen run the best by k-NN is: {best['case']}, {best['knn']:.1%} ({others}); "
        f"unfrozen at full cost {whole['knn']:.1%}. One seed: a point either way is noise."
    )


def _row(task: Task, case: str, trial: Trial, rows: list[dict[str, Any]]) -> dict[str, Any]:
    trained = trial.train(task)
    # The untrained encoder is the same for all.
    knn = {"knn_init": rows[0]["knn_init"] if rows else trial.evaluate(task, "init")}
    knn["knn"] = trial.evaluate(task, "latest")
    return {"case": case, "run": trial.run, **trained, **knn, **ratios(metrics_of(Path(task.output) / trial.run), rows)}


def ratios(metrics: list[dict[str, float]], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """Return a run's cost and time, and both over those of the unfrozen run, the first of the rows.

    Its time is held against its own steps before any layer froze, as many as the unfrozen run has: between runs,
    minutes apart, a machine changes its pace by more than freezing saves.
    """
    training = [row for row in metrics if "loss" in row]
    steps = step_seconds(metrics)
    units, seconds = training[-1]["cost_total"], sum(count * each for count, each in steps.values())
    whole = rows[0] if rows else {"units": units, "steps": training[-1]["step"]}
    cost_ratio = units / whole["units"]
    time_ratio = seconds / (whole["steps"] * steps[0][1])
    return {
        "units": units,
        "cost_ratio": cost_ratio,
        "seconds": seconds,
        "time_ratio": time_ratio,
        "realized": (1 - time_ratio) / (1 - cost_ratio) if cost_ratio < 1 else None,
        "last_loss": _last_term(training[-1]),
        "optimizer_mib": training[-1]["optimizer_bytes"] / 2**20,
    }


def _last_term(metrics: dict[str, float]) -> float:
    """Return the term of the loss that stays to the end: LocalMIM's others go with their blocks."""
    terms = sorted(name for name in metrics if name.startswith(TERMS))
    return metrics[terms[-1]] if terms else metrics["loss"]
