"""Everything that a run's directory holds for a report."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from pipeline.compose import read_yaml
from pipeline.reports.history import History, read_history
from pipeline.reports.lives import Life, read_lives
from pipeline.reports.savings import Savings, savings
from pipeline.run_status import RunStatus, figures, look_at


@dataclass(frozen=True)
class Evaluation:
    """What a file of eval/ says: of which checkpoint, by what, how well."""

    file: str
    checkpoint: str
    samples: str
    results: Sequence[tuple[str, float]]


@dataclass(frozen=True)
class Record:
    """One run as its files tell it; what is missing or damaged is empty."""

    name: str
    status: RunStatus
    history: History
    lives: Sequence[Life] = ()
    savings: Savings = field(default_factory=lambda: Savings(()))
    config: Mapping[str, Any] = field(default_factory=dict)
    environment: Mapping[str, Any] = field(default_factory=dict)
    evaluations: Sequence[Evaluation] = ()
    config_text: str = ""
    overrides_text: str = ""

    @property
    def budget_unit(self) -> str:
        """Return what the budget counts, for axes."""
        unit = self.config.get("budget", {}).get("unit", "")
        return "units of cost" if unit == "cost" else str(unit) or "its unit"

    def chosen(self, group: str) -> str:
        """Return the option that was taken of a group, nothing where an older run did not write it down."""
        return str(self.environment.get("choices", {}).get(group, ""))


def read_record(directory: Path, silent_seconds: float) -> Record:
    """Return what is to know of a run."""
    history = read_history(directory / "metrics.jsonl")
    return Record(
        directory.name,
        look_at(directory, silent_seconds),
        history,
        read_lives(directory / "train.log"),
        savings(history),
        read_yaml(directory / "config.yaml"),
        _json(directory / "environment.json"),
        [found for path in sorted((directory / "eval").glob("*.json")) if (found := _evaluation(path))],
        _text(directory / "config.yaml"),
        _text(directory / "overrides.yaml"),
    )


def _evaluation(path: Path) -> Evaluation | None:
    content = _json(path)
    samples = [content[key].get("samples") for key in ("support", "queries") if isinstance(content.get(key), dict)]
    results = [(name, top1) for name, top1 in figures(content.get("top1", {})) if 0 <= top1 <= 1]
    described = " / ".join(f"{n:,}" if isinstance(n, int) else "?" for n in samples)
    return Evaluation(path.stem, str(content.get("checkpoint", "")), described, results) if results else None


def _json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _text(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError:
        return ""
