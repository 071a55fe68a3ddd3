"""What a gradient-error analysis found, as numbers and as a file."""

from __future__ import annotations

import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from pipeline.analysis.estimators import standard_error

VERSION = 1


@dataclass(frozen=True)
class CellError:
    """One cell of the (patch size, dropout) grid at one progress.

    Squared norms are of gradients, in the loss's own units. ``variance`` is that of a single sample. The lists hold the
    estimates without each sub-batch in turn, which intervals and comparisons between cells follow from.
    """

    patch_size: int
    dropout: float
    query_tokens: int
    key_tokens: int
    # Of a sample, in forwards of the reference, the frozen prefix taken into account.
    cost: float
    nominal_cost: float
    squared_bias: float
    # The paper's estimate, which is too high by the variance of the mean.
    squared_bias_plugin: float
    variance: float
    squared_bias_without: list[float] = field(repr=False)
    variance_without: list[float] = field(repr=False)


@dataclass(frozen=True)
class Panel:
    """All cells at one checkpoint."""

    # Asked for, and of the nearest checkpoint.
    asked: float
    progress: float
    checkpoint: str
    frozen_layers: int
    # Trainable parameters, over which all norms go.
    parameters: int
    # Of equation 10: the cost of one batch of the baseline.
    budget: float
    squared_gradient: float
    squared_gradient_plugin: float
    squared_gradient_without: list[float] = field(repr=False)
    cells: list[CellError]

    def ca_mse(self, cell: CellError) -> float:
        """Return the cost-adjusted mean squared error (Eq. 10 of Lin et al., 2024), from de-biased estimates."""
        return cell.squared_bias + cell.cost / self.budget * cell.variance

    def ca_mse_plugin(self, cell: CellError) -> float:
        """Return the same from the paper's estimates."""
        return cell.squared_bias_plugin + cell.cost / self.budget * cell.variance

    def ca_mse_without(self, cell: CellError) -> torch.Tensor:
        """Return `ca_mse` without each sub-batch in turn [n]."""
        bias = torch.tensor(cell.squared_bias_without, dtype=torch.float64)
        return bias + cell.cost / self.budget * torch.tensor(cell.variance_without, dtype=torch.float64)

    def ca_mse_error(self, cell: CellError) -> float:
        """Return the standard error of `ca_mse`."""
        return standard_error(self.ca_mse_without(cell))

    def difference_error(self, one: CellError, other: CellError) -> float:
        """Return the standard error of the difference of two cells' `ca_mse`, which the same samples make small."""
        return standard_error(self.ca_mse_without(one) - self.ca_mse_without(other))

    @property
    def magnitude(self) -> float:
        """Return what Figure 4 of Lin et al., 2024 divides by: the squared norm of the mean gradient."""
        return self.squared_gradient_plugin


@dataclass(frozen=True)
class Analysis:
    """All panels of a run, in order of progress, and what is needed to know what they are of."""

    run: str
    method: str
    image_size: int
    patch_size: int
    samples: int
    sub_batch: int
    # The run's command line, packages, date, shards and seed.
    origin: dict[str, Any]
    panels: list[Panel]

    @property
    def sub_batches(self) -> int:
        """Return how many sub-batches each estimate is made of."""
        return self.samples // self.sub_batch


def write(analysis: Analysis, path: Path) -> None:
    """Write an analysis as JSON; what was there before stays until the new one is whole."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_suffix(".tmp")
    temporary.write_text(json.dumps({"version": VERSION, **asdict(analysis)}))
    os.replace(temporary, path)


def read(path: Path) -> Analysis:
    """Read what `write` wrote.

    Raises:
        ValueError: there is no such file, or it is none of ours.
    """
    try:
        values = json.loads(path.read_text())
        assert values.pop("version") == VERSION
        panels = [panel_from(each) for each in values.pop("panels")]
        return Analysis(**values, panels=panels)
    except OSError as error:
        raise ValueError(f"no analysis in {path}; run `coldpress analyze` first.") from error
    except (AssertionError, KeyError, TypeError, AttributeError, json.JSONDecodeError) as error:
        raise ValueError(f"{path} is no analysis of this version; run `coldpress analyze` again.") from error


def panel_from(values: dict[str, Any]) -> Panel:
    """Return a panel from its JSON."""
    return Panel(**{**values, "cells": [CellError(**cell) for cell in values["cells"]]})
