"""Analyses that nobody had to measure."""

from collections.abc import Callable, Sequence

import pytest

from pipeline.analysis.results import Analysis, CellError, Panel

SUB_BATCHES = 8
Table = Sequence[Sequence[float]]


def analysis_of(panels: list[Panel]) -> Analysis:
    return Analysis("first", "moco", 240, 16, 32 * SUB_BATCHES, 32, {}, panels)


def panel_of(progress: float, cells: list[CellError], squared_gradient: float) -> Panel:
    without = [squared_gradient] * SUB_BATCHES
    return Panel(progress, progress, "step", 0, 1, 1.0, squared_gradient, squared_gradient, without, cells)


@pytest.fixture(scope="session")
def make_table() -> Callable[..., Analysis]:
    """Return an analysis whose CA-MSE is given by panel and cell, with cells of patch sizes 1, 2, ...

    Each cell's estimates without a sub-batch alternate around it by `wobble`, a standard error of sqrt(7) wobbles.
    """

    def make(
        values: Table, costs: Table | None = None, wobbles: Sequence[float] = (), magnitudes: Sequence[float] = ()
    ) -> Analysis:
        panels = []
        for i, row in enumerate(values):
            cells = []
            for j, value in enumerate(row):
                wobble = wobbles[j] if wobbles else 0.0
                around = [value + wobble * (-1) ** k for k in range(SUB_BATCHES)]
                cost = costs[min(i, len(costs) - 1)][j] if costs else float(len(row) - j)
                cell = CellError(
                    j + 1, 0.0, 100 + j, 200, cost, cost, value, value + 1.0, 0.0, around, [0.0] * SUB_BATCHES
                )
                cells.append(cell)
            progress = i / max(1, len(values) - 1)
            panels.append(panel_of(progress, cells, magnitudes[i] if magnitudes else 1.0))
        return analysis_of(panels)

    return make
