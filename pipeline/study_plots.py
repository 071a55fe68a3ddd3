"""The picture of a study: what each way to compress did over its budget."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from pipeline.plots import save

# Told apart in grey as well.
STYLES = {"none": ("black", "-"), "constant": ("C0", "--"), "staged": ("C1", "-."), "adaptive": ("C2", ":")}
KNN = "knn_"


def study_picture(rows: Sequence[dict[str, Any]], metrics: dict[str, list[dict[str, float]]], path: Path) -> None:
    """Draw tokens, loss and k-NN over the share of the budget, and k-NN over the clock."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7.5), layout="constrained")
    for row in rows:
        training = [each for each in metrics[row["run"]] if "loss" in each]
        progress = [each["progress_ratio"] for each in training]
        _line(axes[0, 0], row, progress, [each["query_tokens"] for each in training], drawstyle="steps-post")
        _line(axes[0, 1], row, progress, [each["loss"] for each in training])
        points = sorted(float(key.removeprefix(KNN).rstrip("%")) / 100 for key in row if key.startswith(KNN))
        accuracies = [100 * row[f"{KNN}{point:.0%}"] for point in points]
        _line(axes[1, 0], row, points, accuracies, marker="o")
        _line(axes[1, 1], row, [point * row["wall_seconds"] for point in points], accuracies, marker="o")
    _name(axes[0, 0], "share of the budget", "query tokens")
    _name(axes[0, 1], "share of the budget", "loss of the run's own task")
    _name(axes[1, 0], "share of the budget", "k-NN top-1, uncompressed (%)")
    _name(axes[1, 1], "seconds, start and saves included", "k-NN top-1, uncompressed (%)")
    axes[0, 0].set_ylim(bottom=0)
    handles, labels = axes[0, 0].get_legend_handles_labels()
    named = dict(zip(labels, handles, strict=True))
    axes[0, 0].legend(named.values(), named.keys(), title="compression")
    save(figure, path)


def _line(axis: Axes, row: dict[str, Any], x: Sequence[float], y: Sequence[float], **style: Any) -> None:
    color, dashes = STYLES[row["schedule"]]
    axis.plot(x, y, color=color, linestyle=dashes, label=row["schedule"], **style)


def _name(axis: Axes, x: str, y: str) -> None:
    axis.set_xlabel(x)
    axis.set_ylabel(y)
    axis.grid(alpha=0.3)
