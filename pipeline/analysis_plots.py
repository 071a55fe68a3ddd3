"""Pictures of a gradient-error analysis and of what was chosen from it."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.cm import ScalarMappable
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle

from pipeline.analysis.estimators import standard_error
from pipeline.analysis.results import Analysis, CellError, Panel
from pipeline.analysis.selection import Choice, Shape, best_constant, ends, find, shape
from pipeline.analysis.student import two_sided

# Brightness rises with the value, the same for every kind of color vision and in grey.
COLORS = mpl.colormaps["cividis"]
# Values further below a row's largest are drawn as its darkest: estimates near zero are noise over many decades.
DECADES = 4
# Okabe and Ito's colors; lines differ by marker, too.
BLUE, VERMILION, GREEN, LIGHT = "#0072B2", "#D55E00", "#009E73", "#B8B8B8"
DPI = 100
# One font: its name stands at each of hundreds of numbers.
STYLE: dict[Any, Any] = {"svg.hashsalt": "coldpress", "svg.fonttype": "none", "font.sans-serif": ["DejaVu Sans"]}
PROGRESS = "progress (% of the budget)"

Value = Callable[[Panel, CellError], float]
# What the rows of `error_grids` show, as in Figure 4 of Lin et al., 2024.
ROWS: dict[str, Value] = {
    "CA-MSE": Panel.ca_mse,
    "squared bias": lambda panel, cell: cell.squared_bias,
    "cost-adjusted variance": lambda panel, cell: cell.cost / panel.budget * cell.variance,
}


def draw(analysis: Analysis, choices: Sequence[Choice], confidence: float, directory: Path) -> list[Path]:
    """Draw every picture of an analysis, as PNG and as SVG, and return the files."""
    analysis = replace(analysis, panels=[choice.panel for choice in choices])
    figures = {
        "cost": cost_grid(analysis),
        "error": error_grids(analysis, choices),
        "path": path_through_grid(analysis, choices),
        "progress": curves(analysis, choices, confidence),
    }
    return [path for name, figure in figures.items() for path in _save(figure, directory / name)]


def cost_grid(analysis: Analysis) -> Figure:
    """Return the cost of a sample in each cell at the first panel (Figure 3 of Lin et al., 2024)."""
    panel = analysis.panels[0]
    rows, columns = _sizes(panel)
    figure = Figure(figsize=(1.6 + 0.9 * len(columns), 1.3 + 0.6 * len(rows)), layout="constrained")
    axis = figure.subplots()
    norm = Normalize(0, max(cell.cost for cell in panel.cells))
    _heat(axis, panel, lambda panel, cell: cell.cost, norm, "{:.2f}".format, 10)
    axis.set_xlabel("dropout of query tokens")
    axis.set_ylabel("patch size (pixels)")
    frozen = f", {panel.frozen_layers} layers frozen" if panel.frozen_layers else ""
    axis.set_title(f"{analysis.method}, {analysis.image_size} pixels{frozen}", fontsize=10)
    figure.colorbar(ScalarMappable(norm, COLORS), ax=axis, label="cost of a sample\n(forwards of the reference)")
    return figure


def error_grids(analysis: Analysis, choices: Sequence[Choice]) -> Figure:
    """Return CA-MSE, squared bias and cost-adjusted variance by cell and panel (Figure 4 of Lin et al., 2024)."""
    sizes, dropouts = _sizes(analysis.panels[0])
    width = 1.8 + len(choices) * (0.3 + 0.48 * len(dropouts))
    figure = Figure(figsize=(width, 1.0 + 3 * (0.35 + 0.36 * len(sizes))), layout="constrained")
    grid = figure.subplots(len(ROWS), len(choices), sharex=True, sharey=True, squeeze=False)
    for axes, (name, value) in zip(grid, ROWS.items(), strict=True):
        _error_row(figure, axes, choices, name, value)
    for axis, choice in zip(grid[0], choices, strict=True):
        axis.set_title(_percent(choice.panel.progress))
    figure.supxlabel("dropout of query tokens", fontsize=10)
    figure.supylabel("patch size (pixels)", fontsize=10)
    figure.suptitle(f"Error of a compressed gradient of {analysis.method} by progress; framed: chosen", fontsize=11)
    return figure


def path_through_grid(analysis: Analysis, choices: Sequence[Choice]) -> Figure:
    """Return the chosen patch size, dropout and cost over progress, with what else would have been right."""
    sizes, dropouts = _sizes(analysis.panels[0])
    figure = Figure(figsize=(7.5, 7), layout="constrained")
    axes = figure.subplots(3, 1, sharex=True)
    _path(axes[0], choices, lambda cell: sizes.index(cell.patch_size), "patch size (pixels)")
    _path(axes[1], choices, lambda cell: dropouts.index(cell.dropout), "dropout of query tokens")
    _path(axes[2], choices, lambda cell: cell.cost, "cost of a sample\n(forwards of the reference)")
    for axis, names in ((axes[0], sizes), (axes[1], dropouts)):
        axis.set_yticks(range(len(names)), [f"{name:g}" for name in names])
        axis.set_ylim(-0.5, len(names) - 0.5)
    axes[1].invert_yaxis()
    axes[2].set_ylim(bottom=0)
    axes[2].set_xlabel(PROGRESS)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    return figure


def curves(analysis: Analysis, choices: Sequence[Choice], confidence: float) -> Figure:
    """Return the norm of the gradient and the CA-MSE of three ways to train over progress, with intervals."""
    z = two_sided(confidence, analysis.sub_batches - 1)
    figure = Figure(figsize=(7.5, 6.5), layout="constrained")
    norms, errors = figure.subplots(2, 1, sharex=True, height_ratios=(1, 2))
    _norms(norms, analysis.panels, z)
    best = best_constant(analysis)
    every = [shape(cell) for cell in analysis.panels[0].cells]
    plain = (analysis.patch_size, 0.0)
    if plain in every:
        _errors(errors, analysis.panels, [plain] * len(choices), z, ("uncompressed", VERMILION, "s", ":"), -1)
    label = f"best constant: patches of {best[0]}, dropout {best[1]:g}"
    _errors(errors, analysis.panels, [best] * len(choices), z, (label, GREEN, "^", "--"), 0)
    _errors(errors, analysis.panels, [shape(c.chosen) for c in choices], z, ("chosen", BLUE, "o", "-"), 1)
    errors.set_yscale("log", nonpositive="clip")
    errors.set_ylabel("CA-MSE / squared norm of the mean gradient")
    errors.set_xlabel(PROGRESS)
    errors.grid(alpha=0.3)
    figure.legend(*errors.get_legend_handles_labels(), loc="outside upper center", ncols=3, frameon=False)
    norms.set_title(f"bars: {_percent(confidence)} confidence", fontsize=9, loc="right")
    return figure


def _sizes(panel: Panel) -> tuple[list[int], list[float]]:
    """Return the patch sizes from top to bottom and the dropouts from left to right."""
    sizes = sorted({cell.patch_size for cell in panel.cells}, reverse=True)
    return sizes, sorted({cell.dropout for cell in panel.cells})


def _percent(share: float) -> str:
    return f"{100 * share:.4g} %"


def _heat(axis: Axes, panel: Panel, value: Value, norm: Normalize, text: Callable[[float], str], size: float) -> None:
    """Draw a panel's cells as a grid of colors with their values; cells that were not measured stay white."""
    rows, columns = _sizes(panel)
    colors = np.full((len(rows), len(columns)), np.nan)
    for cell in panel.cells:
        y, x = rows.index(cell.patch_size), columns.index(cell.dropout)
        number = value(panel, cell)
        colors[y, x] = number if norm.vmin is None else max(number, norm.vmin)
        dark = np.dot(COLORS(norm(colors[y, x]))[:3], (0.299, 0.587, 0.114)) < 0.5
        axis.text(x, y, text(number), ha="center", va="center", fontsize=size, color="white" if dark else "black")
    axis.pcolormesh(range(len(columns)), range(len(rows)), colors, norm=norm, cmap=COLORS, edgecolors="white", lw=0.5)
    axis.set_xticks(range(len(columns)), [f"{column:g}" for column in columns])
    axis.set_yticks(range(len(rows)), [str(row) for row in rows])
    axis.set_ylim(len(rows) - 0.5, -0.5)
    axis.tick_params(length=0)


def _error_row(figure: Figure, axes: Sequence[Axes], choices: Sequence[Choice], name: str, value: Value) -> None:
    def normalized(panel: Panel, cell: CellError) -> float:
        return value(panel, cell) / panel.magnitude

    values = [normalized(choice.panel, cell) for choice in choices for cell in choice.panel.cells]
    norm = _logarithmic(values)
    for axis, choice in zip(axes, choices, strict=True):
        _heat(axis, choice.panel, normalized, norm, _short, 6.5)
        rows, columns = _sizes(choice.panel)
        corner = columns.index(choice.chosen.dropout) - 0.5, rows.index(choice.chosen.patch_size) - 0.5
        for color, width in (("white", 4.5), ("black", 2.0)):
            axis.add_patch(Rectangle(corner, 1, 1, fill=False, edgecolor=color, linewidth=width, clip_on=False))
    label = f"{name}\n/ squared gradient"
    assert norm.vmin is not None
    extend = "min" if min(values) < norm.vmin else "neither"
    figure.colorbar(ScalarMappable(norm, COLORS), ax=list(axes), label=label, extend=extend, pad=0.015)


def _logarithmic(values: Sequence[float]) -> LogNorm:
    positive = [value for value in values if value > 0] or [1.0]
    low = max(min(positive), max(positive) / 10**DECADES)
    return LogNorm(low, max(max(positive), 2 * low))


def _short(value: float) -> str:
    """Return a number with two digits in at most six characters; negative estimates of a square are noise."""
    if value <= 0:
        return "< 0" if value < 0 else "0"
    if value < 1e-3:
        mantissa, exponent = f"{value:.0e}".split("e")
        return f"{mantissa}e{int(exponent)}"
    return f"{value:.0f}" if value >= 9.95 else f"{value:#.2g}"


def _path(axis: Axes, choices: Sequence[Choice], value: Callable[[CellError], float], label: str) -> None:
    def dots(pairs: list[tuple[float, float]], **style: object) -> None:
        axis.plot(*zip(*sorted(set(pairs)), strict=True), linestyle="none", clip_on=False, **style)  # type: ignore[arg-type]

    def at(choice: Choice, cell: CellError) -> tuple[float, float]:
        return 100 * choice.panel.progress, value(cell)

    edges = [0.0, *(100 * end for end in ends([choice.panel for choice in choices]))]
    heights = [value(choice.chosen) for choice in choices]
    axis.stairs(heights, edges, baseline=None, color=BLUE, linewidth=2.5, label="chosen")
    best = [at(choice, choice.best) for choice in choices]
    dots(best, marker="o", fillstyle="none", color="black", markersize=11, zorder=4, label="smallest CA-MSE")
    ties = [at(choice, cell) for choice in choices for cell in choice.ties]
    dots(ties, marker="o", color=LIGHT, markeredgecolor="white", markersize=7, label="ties with it")
    axis.set_ylabel(label)
    axis.grid(alpha=0.3)


def _norms(axis: Axes, panels: Sequence[Panel], z: float) -> None:
    """Draw the norm of the true gradient; an interval of its square that reaches below zero ends at zero."""
    squares = np.array([panel.squared_gradient for panel in panels])
    errors = z * np.array([standard_error(torch.tensor(p.squared_gradient_without)) for p in panels])
    low, middle, high = (np.sqrt(np.maximum(squares + sign * errors, 0)) for sign in (-1, 0, 1))
    points = [100 * panel.progress for panel in panels]
    axis.errorbar(points, middle, (middle - low, high - middle), color="black", marker="o", capsize=3)
    axis.set_ylim(bottom=0)
    axis.set_ylabel("norm of the gradient")
    axis.grid(alpha=0.3)


def _errors(
    axis: Axes,
    panels: Sequence[Panel],
    shapes: Sequence[Shape],
    z: float,
    look: tuple[str, str, str, str],
    shift: int,
) -> None:
    """Draw the normalized CA-MSE of one cell for each panel, moved sideways a little so that bars can be told apart."""
    cells = [find(panel, wanted) for panel, wanted in zip(panels, shapes, strict=True)]
    values = [panel.ca_mse(cell) / panel.magnitude for panel, cell in zip(panels, cells, strict=True)]
    errors = [z * panel.ca_mse_error(cell) / panel.magnitude for panel, cell in zip(panels, cells, strict=True)]
    label, color, marker, line = look
    values = [value if value > 0 else math.nan for value in values]
    points = [100 * panel.progress + 0.8 * shift for panel in panels]
    axis.errorbar(points, values, errors, label=label, color=color, marker=marker, linestyle=line, capsize=3)


def _save(figure: Figure, path: Path) -> list[Path]:
    """Write PNG and SVG; the same picture is the same file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    png, svg = path.with_suffix(".png"), path.with_suffix(".svg")
    with mpl.rc_context(STYLE):
        figure.savefig(png, dpi=DPI, pil_kwargs={"optimize": True})
        figure.savefig(svg, metadata={"Date": None})
    return [png, svg]
