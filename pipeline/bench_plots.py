"""The pictures of benchmarks: shares of promises, parts of steps, ratios with their spread."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from pipeline.plots import save

Row = Mapping[str, Any]
# From left to right, data last: no promise is about it. Hatched, to be told apart in grey as well.
PARTS = {
    "forward": "",
    "gathers": "//",
    "backward": "",
    "reduction": "\\\\",
    "optimizer": "..",
    "engine": "--",
    "momentum": "xx",
    "data": "",
}


def draw(what: str, rows: Sequence[Row], path: Path) -> bool:
    """Draw the picture of a benchmark, if it has one; return whether."""
    if what not in PICTURES:
        return False
    save(PICTURES[what](rows), path)
    return True


def step_picture(rows: Sequence[Row]) -> Figure:
    """Draw the share of the promise that each cell realizes, and the parts of its step."""
    figure, (cells, parts) = plt.subplots(
        1, 2, figsize=(13, 1.8 + 0.45 * max(6, len(rows))), layout="constrained", width_ratios=(1, 1.4)
    )
    _heat_map(cells, rows)
    _stacked(parts, rows)
    for place, row in enumerate(rows):
        label = "promised, data aside" if place == 0 else None
        # By the uncompressed steps of the same rounds.
        promised = row["uncompressed_ms"] / row["promised"]
        parts.plot([promised] * 2, [place - 0.45, place + 0.45], color="black", linewidth=2, label=label)
    _explain(parts)
    return figure


def loop_picture(rows: Sequence[Row]) -> Figure:
    """Draw the parts of both steps."""
    figure, axis = plt.subplots(figsize=(9, 3), layout="constrained")
    _stacked(axis, rows)
    _explain(axis)
    return figure


def scale_picture(rows: Sequence[Row]) -> Figure:
    """Draw the parts of steps and the efficiency over processes."""
    figure, (parts, efficiency) = plt.subplots(1, 2, figsize=(13, 1.5 + 0.5 * len(rows)), layout="constrained")
    _stacked(parts, rows)
    _explain(parts)
    _bars(efficiency, rows, "case", "efficiency", "samples/s of a process, of the first row's")
    return figure


def freezing_picture(rows: Sequence[Row]) -> Figure:
    """Draw the time of a step over frozen layers, and what multiplications promise."""
    figure, axis = plt.subplots(figsize=(8, 4.5), layout="constrained")
    frozen, middle = [row["frozen"] for row in rows], [row["ratio"] for row in rows]
    axis.errorbar(frozen, middle, yerr=_whiskers(rows, "ratio"), color="black", marker="o", capsize=3, label="measured")
    axis.plot(frozen, [row["ideal"] for row in rows], color="C0", linestyle="--", label="promised")
    axis.set_xlabel("frozen layers")
    axis.set_ylabel("time of the unfrozen step")
    axis.set_ylim(bottom=0)
    axis.grid(alpha=0.3)
    axis.legend()
    return figure


def loader_picture(rows: Sequence[Row]) -> Figure:
    """Draw what an image costs in each case."""
    figure, axis = plt.subplots(figsize=(9, 1 + 0.35 * len(rows)), layout="constrained")
    named = [{**row, "name": f"{row['views']}: {row['case']}"} for row in rows]
    _bars(axis, named, "name", "cpu_ms", "CPU ms / image")
    return figure


def _heat_map(axis: Axes, rows: Sequence[Row]) -> None:
    sizes, dropouts = (sorted({row[key] for row in rows}) for key in ("patch_size", "dropout"))
    shares = np.full((len(sizes), len(dropouts)), np.nan)
    for row in rows:
        shares[sizes.index(row["patch_size"]), dropouts.index(row["dropout"])] = row["realized"]
    highest = max(1.0, float(np.nanmax(shares)))
    axis.imshow(shares, vmin=0, vmax=highest, cmap="viridis", aspect="auto")
    for (i, j), share in np.ndenumerate(shares):
        if not np.isnan(share):
            axis.text(
                j, i, f"{share:.2f}", ha="center", va="center", color="white" if share < 0.6 * highest else "black"
            )
    axis.set_xticks(range(len(dropouts)), [f"{dropout:g}" for dropout in dropouts])
    axis.set_yticks(range(len(sizes)), [f"{size}" for size in sizes])
    axis.set_xlabel("dropout")
    axis.set_ylabel("patch size")
    axis.set_title("realized: measured speed-up over promised")


def _stacked(axis: Axes, rows: Sequence[Row]) -> None:
    """Draw the parts of each row from left to right."""
    ends = np.zeros(len(rows))
    colors = plt.get_cmap("viridis")(np.linspace(0.05, 0.95, len(PARTS)))
    for (part, hatch), color in zip(PARTS.items(), colors, strict=True):
        widths = np.array([row.get(f"{part}_ms") or 0.0 for row in rows])
        if widths.any():
            axis.barh(range(len(rows)), widths, left=ends, color=color, hatch=hatch, edgecolor="white", label=part)
        ends += widths
    axis.set_yticks(range(len(rows)), [str(row["case"]) for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel("ms / step")


def _explain(axis: Axes) -> None:
    """Put the legend where no bar is."""
    axis.legend(loc="upper left", bbox_to_anchor=(1.0, 1.0))


def _bars(axis: Axes, rows: Sequence[Row], name: str, key: str, label: str) -> None:
    middle = [row[key] for row in rows]
    axis.barh(range(len(rows)), middle, xerr=_whiskers(rows, key), color="C0", capsize=3)
    axis.set_yticks(range(len(rows)), [str(row[name]) for row in rows])
    axis.invert_yaxis()
    axis.set_xlabel(label)
    axis.grid(axis="x", alpha=0.3)


def _whiskers(rows: Sequence[Row], key: str) -> list[list[float]]:
    """Return how far the smallest and the largest value are from the median, which rows of few rounds may equal."""
    return [
        [max(0.0, row[key] - row[f"{key}_low"]) for row in rows],
        [max(0.0, row[f"{key}_high"] - row[key]) for row in rows],
    ]


PICTURES: dict[str, Callable[[Sequence[Row]], Figure]] = {
    "step": step_picture,
    "loop": loop_picture,
    "scale": scale_picture,
    "freezing": freezing_picture,
    "loader": loader_picture,
}
