"""Every picture that the commands draw."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.methods import Method
from pipeline.schedules import Schedules

DPI = 110
POINTS = 1001


def schedule_picture(schedules: Schedules, method: Method, path: Path) -> None:
    """Draw what changes over a run: sequence lengths, cost of a sample, layers' learning rates."""
    progress = np.linspace(0, 1, POINTS)[:-1]
    plans = [schedules.at(float(p)) for p in progress]
    figure, (tokens, cost, rates) = plt.subplots(3, 1, figsize=(8, 8), sharex=True, layout="constrained")
    queries, keys = zip(*(method.lengths(p) for p in plans), strict=True)
    _steps(tokens, progress, queries, "query")
    if any(keys):
        _steps(tokens, progress, keys, "key", linestyle="--")
    tokens.set_ylabel("tokens")
    tokens.legend()
    _steps(cost, progress, [method.sample_cost(p) for p in plans], "real tokens, frozen prefix counted")
    _steps(cost, progress, [method.nominal_sample_cost(p) for p in plans], "paper's formula", linestyle="--")
    cost.set_ylabel("cost of a sample\n(forwards of the reference)")
    cost.legend()
    _layer_rates(rates, progress, np.array([p.layer_rates for p in plans]))
    rates.set_xlabel("progress (budget spent / budget)")
    save(figure, path)


def training_picture(metrics: Path, path: Path) -> None:
    """Draw a run from its metrics.jsonl: loss, k-NN, tokens a second and data wait over the budget."""
    rows = [json.loads(line) for line in metrics.read_text().splitlines()]
    training = [r for r in rows if "loss" in r]
    spent = [r["budget_spent"] for r in training]
    figure, axes = plt.subplots(2, 2, figsize=(10, 6.5), layout="constrained")
    _curve(axes[0, 0], spent, [r["loss"] for r in training], "loss")
    _curve(axes[0, 1], spent, [r["samples_per_second"] for r in training], "images / s")
    _curve(axes[1, 0], spent, [100 * r["data_wait_ratio"] for r in training], "waiting for data (%)")
    shape = axes[1, 1]
    _steps(shape, spent, [r["query_tokens"] for r in training], "query tokens")
    _steps(shape, spent, [r["frozen_layers"] for r in training], "frozen layers", linestyle="--")
    shape.legend()
    for axis in axes[1]:
        axis.set_xlabel("budget spent")
    save(figure, path)


def _layer_rates(axis: Axes, progress: np.ndarray, rates: np.ndarray) -> None:
    colors = plt.get_cmap("viridis")(np.linspace(0, 0.9, rates.shape[1]))
    for layer, color in enumerate(colors):
        label = f"layer {layer}" if layer in (0, rates.shape[1] - 1) else None
        axis.plot(progress, np.where(rates[:, layer] > 0, rates[:, layer], np.nan), color=color, label=label)
    axis.set_ylabel("learning rate of a layer")
    axis.legend(loc="upper right")


def _steps(axis: Axes, x: Sequence[float] | np.ndarray, y: Sequence[float], label: str, linestyle: str = "-") -> None:
    axis.step(x, y, where="post", label=label, linestyle=linestyle)
    axis.set_ylim(0, 1.08 * max(float(np.max(line.get_ydata())) for line in axis.lines) or 1)
    axis.grid(alpha=0.3)


def _curve(axis: Axes, x: Sequence[float], y: Sequence[float], label: str) -> None:
    axis.plot(x, y)
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def save(figure: Figure, path: Path) -> None:
    """Write a picture in the format of its suffix, and let go of it."""
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=DPI)
    plt.close(figure)
