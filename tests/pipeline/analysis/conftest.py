"""Analyses that nobody had to measure."""

import math
from collections.abc import Callable, Sequence

import pytest
import torch

from pipeline.analysis.results import Analysis, CellError, Panel

SUB_BATCHES = 8
Table = Sequence[Sequence[float]]


def analysis_of(panels: list[Panel]) -> Analysis:
    origin = {"command": "coldpress analyze run=first", "date": "2026-01-01"}
    return Analysis("first", "moco", 240, 16, 32 * SUB_BATCHES, 32, origin, panels)


def panel_of(progress: float, cells: list[CellError], squared_gradient: float = 1.0, budget: float = 1.0) -> Panel:
    without = [squared_gradient * (1 + 0.02 * math.sin(j)) for j in range(SUB_BATCHES)]
    return Panel(
        progress,
        progress,
        "step",
        0,
        86_000_000,
        budget,
        squared_gradient,
        squared_gradient,
        without,
        cells,
    )


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


@pytest.fixture(scope="session")
def make_papers() -> Callable[..., Analysis]:
    """Return an analysis in the spirit of Figure 4: compression costs bias, most of all late, and saves variance."""

    def make(patch_sizes: Sequence[int], dropouts: Sequence[float], points: Sequence[float]) -> Analysis:
        generator = torch.Generator().manual_seed(0)

        def noisy(value: float, share: float) -> list[float]:
            return [value * (1 + share * z) for z in torch.randn(SUB_BATCHES, generator=generator).tolist()]

        panels = []
        for progress in points:
            gradient = 4.0 * math.exp(-3 * progress)
            cells = []
            for q in patch_sizes:
                for d in dropouts:
                    tokens = 240 // q * (240 // q)
                    query = int(tokens * (1 - d) + 1e-9) + 1
                    cost = (3 * query + tokens + 1) / 197
                    missing = 1 - query / 226
                    bias = gradient * (0.02 + 0.6 * progress) * missing**3 - (2e-4 if missing else 0.0)
                    variance = 1024 * 3 * (1 + 0.5 * missing)
                    cells.append(
                        CellError(
                            q,
                            d,
                            query,
                            tokens + 1,
                            cost,
                            cost,
                            bias,
                            bias + 0.01 * missing,
                            variance,
                            noisy(bias, 0.02),
                            noisy(variance, 0.005),
                        )
                    )
            panels.append(panel_of(progress, cells, gradient, 1024 * 4 * 226 / 197))
        return analysis_of(panels)

    return make
