"""What is known of a run that an export is made of, as tables of words; no paths, only their last names."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any

from data.manifest import Manifest
from pipeline.checkpoint_files import content_of
from pipeline.compression import FittedAdaptive
from pipeline.config import GROUPS, TrainConfig
from pipeline.methods import FineTuneDeiTConfig
from pipeline.schedules import Schedules

Row = tuple[str, str]


def data(training: TrainConfig) -> list[Row]:
    """Return which images a run learned from, with their number while the shards are where they were."""
    name = Path(training.data.shards).name
    try:
        manifest = Manifest.load(Path(training.data.shards))
    except (ValueError, OSError):
        return [("data", f"{name} (not there any more when this was exported)")]
    used = "" if isinstance(training.method, FineTuneDeiTConfig) else ", whose labels were not used"
    classes = f", {len(manifest.classes):,} classes{used}" if manifest.classes else ", no labels"
    return [("data", f"{name}: {manifest.samples:,} images{classes}")]


def training(config: TrainConfig) -> list[Row]:
    """Return method, backbone and budget of a run."""
    model = config.model
    sizes = "".join(f", {name} {value}" for name, value in model.changes.items())
    start = "random weights" if not model.weights else f"weights {Path(model.weights).name}"
    return [
        ("method", next(name for name, kind in GROUPS["method"].items() if type(config.method) is kind)),
        ("backbone", f"{model.name}{sizes}, {model.positions.value} positions, from {start}"),
        ("trained on", f"images of {model.image_size} pixels in patches of {model.patch_size}"),
        ("budget", f"{config.budget.value:,.10g} {config.budget.unit.value}, batches of {config.batch_size:,}"),
        ("rate", f"{config.rate.base:g} per 256 samples, warm-up {config.rate.warmup:g}, {config.rate.shape.value}"),
        ("precision", config.engine.precision.value),
        ("seed", str(config.seed)),
    ]


def checkpoint(path: Path | None) -> list[Row]:
    """Return how far a run had come; None is before its first step."""
    if path is None:
        return [("checkpoint", "none: untrained")]
    content = content_of(path)
    state = content.get("state", {})
    return [
        ("checkpoint", f"step {state.get('step', 0):,}, {content.get('progress', 0.0):.1%} of the budget"),
        ("spent", f"{state.get('samples', 0):,} samples, {state.get('cost', 0.0):,.0f} units of cost"),
    ]


def schedule(schedules: Schedules, image_size: int, patch_size: int) -> list[tuple[str, ...]]:
    """Return a row for each stretch of a run: progress, patches, dropout, frozen layers."""
    rows: list[tuple[str, ...]] = []
    for begin, end in pairwise([0.0, *schedules.changes(), 1.0]):
        plan = schedules.at((begin + end) / 2)
        count = plan.query.num_patches(image_size, patch_size)
        rows.append(
            (
                f"{begin:.1%} to {end:.1%}",
                str(plan.query.patch_size(patch_size)),
                f"{1 - plan.query.keep(count) / count:.3g}",
                f"{plan.frozen_layers} of {len(plan.layer_rates)}",
            )
        )
    return rows


def is_adaptive(schedules: Schedules) -> bool:
    """Return whether a run chose its compression while it trained, so that no plan knows it."""
    return isinstance(schedules.compression, FittedAdaptive)


def results(directory: Path, checkpoint: str) -> list[tuple[str, ...]]:
    """Return what evaluations of a checkpoint found: how, of which queries, top-1 accuracy with its interval."""
    rows: list[tuple[str, ...]] = []
    for path in sorted((directory / "eval").glob(f"*-{checkpoint}.json")):
        found = json.loads(path.read_text())
        queries = f"{found['queries']['samples']:,} of {Path(found['queries']['shards']).name}"
        # Evaluations of earlier versions were all k-NN, and had no intervals.
        protocol, intervals = found.get("protocol", "knn"), found.get("interval", {})
        for which, top1 in found["top1"].items():
            how = f"k-NN, k = {which}" if protocol == "knn" else f"{protocol}, {which}"
            rows.append((how, queries, _accuracy(top1, intervals.get(which))))
    return rows


def versions(directory: Path) -> list[Row]:
    """Return the packages that a run was last trained with."""
    try:
        environment: dict[str, Any] = json.loads((directory / "environment.json").read_text())
    except (OSError, ValueError):
        return []
    return sorted(environment.get("packages", {}).items())


def _accuracy(top1: float, interval: list[float] | None) -> str:
    return f"{top1:.2%}" + (f" ({interval[0]:.2%} to {interval[1]:.2%})" if interval else "")
