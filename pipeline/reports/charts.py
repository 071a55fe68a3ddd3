"""Small pictures for a page: each an <svg> of its own, dark on light, readable in grey, legend below the curves."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import matplotlib as mpl

mpl.use("Agg")

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator, NullFormatter

from pipeline.reports.numbers import amount

# In inches of 72 points. A phone shows a picture in its full width: letters must be readable at 358 pixels.
SIZE = (4.6, 2.9)
# Okabe and Ito's colors that are told apart on white, each with its dashes.
STYLES = (
    ("#0072B2", "-"),
    ("#D55E00", (0, (5, 2))),
    ("#009E73", (0, (1, 1.2))),
    ("#000000", (0, (6, 1.5, 1, 1.5))),
    ("#CC79A7", (0, (3, 1, 1, 1, 1, 1))),
)
STYLE: dict[Any, Any] = {
    "svg.hashsalt": "coldpress",
    # Letters stay letters: small files, and a browser's own font.
    "svg.fonttype": "none",
    # A dollar in the name of a run is no formula.
    "text.parse_math": False,
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.color": "#e4e4e4",
    "grid.linewidth": 0.7,
    "axes.edgecolor": "#555555",
    "axes.formatter.useoffset": False,
}
_NUMBERS = FuncFormatter(lambda number, _: amount(number))
# More points than this are drawn as means of neighbors.
POINTS = 600
# Names that matplotlib gives its groups and that nothing refers to: on one page they would be there many times.
_IDS = re.compile(r' id="[a-zA-Z.]+_\d+"')


@dataclass(frozen=True)
class Line:
    """A curve: its name in the legend, and numbers of which some may be nan."""

    name: str
    x: Sequence[float]
    y: Sequence[float]


@dataclass(frozen=True)
class Look:
    """How a picture's axes are to be read."""

    x: str
    y: str
    # Values that hold until the next one, as of schedules.
    steps: bool = False
    log: bool = False
    from_zero: bool = False
    marks: bool = False
    # Where the axis ends; 0: with the curves.
    end: float = 0.0
    # Where something began: thin lines behind the curves.
    begins: Sequence[float] = ()


def curves(lines: Sequence[Line], look: Look) -> str:
    """Return a picture of curves over one axis."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=SIZE, layout="constrained")
        axis = figure.add_subplot()
        for begin in look.begins:
            axis.axvline(begin, color="#888888", linewidth=0.8, linestyle=":", zorder=0)
        for i, line in enumerate(lines):
            _draw(axis, line, look, *STYLES[i % len(STYLES)])
        _finish(axis, look)
        if len(lines) > 1:
            columns = 2 if max(len(line.name) for line in lines) < 28 else 1
            figure.legend(loc="outside lower left", ncols=columns, frameon=False, handlelength=3)
        return _svg(figure)


def shares(names: Sequence[str], values: Sequence[float], labels: Sequence[str]) -> str:
    """Return a picture of bars, the first on top, each with its label behind it."""
    with mpl.rc_context(STYLE):
        figure = Figure(figsize=(SIZE[0], 0.5 + 0.27 * len(names)), layout="constrained")
        axis = figure.add_subplot()
        bars = axis.barh(range(len(names)), values, color="#0072B2", height=0.7)
        axis.bar_label(bars, labels, padding=3)
        axis.set_yticks(range(len(names)), names)
        axis.invert_yaxis()
        axis.set_xlim(0, 1.5 * max(values, default=1.0) or 1)
        axis.set_xticks([])
        axis.grid(False)
        axis.spines[["bottom"]].set_visible(False)
        axis.tick_params(length=0)
        return _svg(figure)


def _draw(axis: Axes, line: Line, look: Look, color: str, dashes: Any) -> None:
    x, y = (turns if look.steps else thinned)(line.x, line.y)
    kwargs = {"label": line.name, "color": color, "linestyle": dashes, "linewidth": 1.4}
    # A single number between gaps would be invisible as a line.
    marked = list(range(len(y))) if look.marks else lonely(y)
    kwargs |= {"marker": "o", "markersize": 3.5, "markevery": marked} if marked else {}
    if look.steps:
        axis.step(x, y, where="post", **kwargs)
    else:
        axis.plot(x, y, **kwargs)


def _finish(axis: Axes, look: Look) -> None:
    axis.set_xlabel(look.x)
    axis.set_ylabel(look.y)
    axis.xaxis.set_major_locator(MaxNLocator(6))
    axis.xaxis.set_major_formatter(_NUMBERS)
    axis.yaxis.set_major_formatter(_NUMBERS)
    axis.set_xlim(0, 1.02 * look.end if look.end else None)
    positive = [v for line in axis.lines for v in np.asarray(line.get_ydata(), dtype=float) if v > 0]
    if look.log and positive and max(positive) > 20 * min(positive):
        axis.set_yscale("log")
        axis.yaxis.set_major_formatter(_NUMBERS)
        axis.yaxis.set_minor_formatter(NullFormatter())
    elif look.from_zero:
        axis.set_ylim(0, 1.08 * max((v for v in positive if math.isfinite(v)), default=1.0))


def thinned(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return a curve of at most `POINTS` points: means of neighbors, of those that are numbers."""
    size = -(-len(x) // POINTS)
    if size < 2:
        return x, y
    blocks = range(0, len(x), size)
    return [_mean(x[i : i + size]) for i in blocks], [_mean(y[i : i + size]) for i in blocks]


def lonely(y: Sequence[float]) -> list[int]:
    """Return the places of numbers that no line leads to or from."""
    known = [False, *map(math.isfinite, y), False]
    return [i for i in range(len(y)) if known[i + 1] and not known[i] and not known[i + 2]]


def turns(x: Sequence[float], y: Sequence[float]) -> tuple[Sequence[float], Sequence[float]]:
    """Return a curve of values that hold with both its ends and the points at which a value changes."""
    kept = [i for i, value in enumerate(y) if i in (0, len(y) - 1) or value != y[i - 1]]
    return [x[i] for i in kept], [y[i] for i in kept]


def _mean(values: Sequence[float]) -> float:
    numbers = [value for value in values if math.isfinite(value)]
    return sum(numbers) / len(numbers) if numbers else math.nan


def _svg(figure: Figure) -> str:
    """Return the <svg> element alone; its size follows the page."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    element = _IDS.sub("", text[text.index("<svg") :])
    head, rest = element.split(">", 1)
    box = re.search(r'viewBox="[^"]+"', head)
    assert box is not None
    body = re.sub(r"<metadata>.*?</metadata>", "", rest, flags=re.DOTALL)
    return (
        f'<svg {box[0]} role="img" xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink">{body}'
    )
