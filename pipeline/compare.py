"""Command: every method with and without compression at the same cost: what is learned, and whether cost is time."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.benchmarks.report import Column, Report
from pipeline.children import own_directory
from pipeline.config import GROUPS
from pipeline.methods import METHODS, FineTune, Method
from pipeline.trials import Task, Trial, caveats, check, check_support

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


@dataclass
class CompareConfig:
    """Every method with and without compression at the same cost, with a small ViT on small images."""

    shards: str
    # Labelled shards to classify by the training shards; without, a held-out fifth of the training shards.
    val: str = ""
    output: str = "runs/compare"
    methods: list[str] = field(default_factory=lambda: ["moco", "simclr", "dino"])
    patch_size: int = 8
    dropout: float = 0.5
    # Units of cost of each run.
    budget: float = 120e3
    # Support samples of the k-NN evaluations; 0 takes all.
    support: int = 5000

    def __post_init__(self) -> None:
        possible = [name for name, kind in GROUPS["method"].items() if _compares(METHODS[kind])]
        if not self.methods or set(self.methods) - set(possible):
            raise ValueError(f"methods must be some of {', '.join(possible)}, got {self.methods}.")
        check_support(self.support)
        if not 0 < self.budget < math.inf:
            raise ValueError(f"budget must be above 0, got {self.budget:g}; 120e3 takes minutes a run on two cores.")


def _compares(method: type[Method]) -> bool:
    return not method.incompressible and not issubclass(method, FineTune)


def run(config: CompareConfig) -> None:
    """Train every method twice on the same budget and print one table.

    Raises:
        ValueError: what `check` finds, an output that holds something else, a command that failed.
    """
    methods = list(dict.fromkeys(config.methods))
    task = Task(config.shards, config.val, config.budget, config.support, config.output)
    check(task, [trial for method in methods for trial in trials(config, method)])
    output = own_directory(Path(config.output), MARKER)
    rows, notes = [], []
    for method in methods:
        whole, compressed = (_row(task, method, trial) for trial in trials(config, method))
        compressed["tokens"] = f"patch {config.patch_size}, dropout {config.dropout:g}"
        compressed["realized"] = whole["milliseconds_per_unit"] / compressed["milliseconds_per_unit"]
        rows += [whole, compressed]
        notes.append(_explain(whole, compressed))
    report = Report(COLUMNS, rows, [*notes, *caveats(rows)])
    print(report.table())
    report.write(output / "compare.json", "compare", asdict(config))


def trials(config: CompareConfig, method: str) -> tuple[Trial, Trial]:
    """Return the uncompressed and the compressed run of a method."""
    cell = (f"compression.patch_size={config.patch_size}", f"compression.dropout={config.dropout}")
    return (
        Trial(f"{method}-none", f"small_{method}", ("compression=none",)),
        Trial(f"{method}-constant", f"small_{method}", ("compression=constant", *cell)),
    )


def _row(task: Task, method: str, trial: Trial) -> dict[str, Any]:
    trained = trial.train(task)
    knn = {"knn_init": trial.evaluate(task, "init"), "knn": trial.evaluate(task, "latest")}
    return {"method": method, "run": trial.run, "tokens": "none", **knn, **trained}


def _explain(whole: dict[str, Any], compressed: dict[str, Any]) -> str:
    """Say how much of the promise came true."""
    promised = whole["cost"] / compressed["cost"]
    realized = promised * compressed["realized"]
    return (
        f"{whole['method']}: a compressed sample costs {promised:.2f}x less and takes {realized:.2f}x less time; "
        f"a unit takes {100 * (1 / compressed['realized'] - 1):+.1f} % of time, of which waiting for data is "
        f"{100 * (compressed['data_wait'] - whole['data_wait']):+.1f} points."
    )
