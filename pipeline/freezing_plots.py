"""The picture of runs with and without freezing: time of a step and memory of the optimizer, freezes marked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from pipeline.plots import save

Metrics = Sequence[Mapping[str, float]]
# Told apart in grey as well.
STYLES = (("black", "-"), ("C0", "--"), ("C1", "-."), ("C2", ":"))


def freezing_picture(runs: Mapping[str, Metrics], path: Path) -> None:
    """Draw time per step, optimizer memory, frozen layers and loss over the steps of each run, freezes marked."""
    figure, axes = plt.subplots(2, 2, figsize=(11, 7), layout="constrained", sharex=True)
    logged = {name: [row for row in metrics if "loss" in row] for name, metrics in runs.items()}
    for (name, training), (color, dashes) in zip(logged.items(), STYLES, strict=False):
        steps = [row["step"] for row in training]
        curves = {
            axes[0, 0]: [1e3 * row["step_seconds"] for row in training],
            axes[0, 1]: [row["optimizer_bytes"] / 2**20 for row in training],
            axes[1, 0]: [row["frozen_layers"] for row in training],
            axes[1, 1]: [row["loss"] for row in training],
        }
        for axis, values in curves.items():
            axis.plot(steps, values, color=color, linestyle=dashes, label=name)
    events = next((found for found in map(freezes, logged.values()) if found), [])
    for axis, what in zip(
        axes.flat, ("ms / step", "optimizer, MiB", "frozen layers", "loss, terms that are left"), strict=True
    ):
        _finish(axis, what, events)
    axes[0, 0].legend()
    save(figure, path)


def freezes(training: Metrics) -> list[float]:
    """Return the steps at which more layers were frozen than at the one logged before."""
    return [after["step"] for before, after in pairwise(training) if after["frozen_layers"] > before["frozen_layers"]]


def _finish(axis: Axes, what: str, events: Sequence[float]) -> None:
    for step in events:
        axis.axvline(step, color="0.8", linewidth=0.8, zorder=0)
    axis.set_xlabel("step")
    axis.set_ylabel(what)
    axis.set_ylim(bottom=0)
