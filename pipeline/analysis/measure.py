"""One panel of the analysis: the gradients of a method at one checkpoint, cell by cell, over the same sub-batches."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace

import torch

from pipeline.analysis.estimators import Moments, PairedGradients
from pipeline.analysis.gradients import loss_gradient, slice_length, trainable
from pipeline.analysis.results import CellError
from pipeline.compression.schedule import Cell
from pipeline.methods import Method
from pipeline.methods.base import Batch
from pipeline.models.vit import ViTConfig
from pipeline.schedules import StepPlan

# Running sums may take this share of a GPU's free memory; the rest is for activations.
SHARE_OF_MEMORY = 0.3


@dataclass(frozen=True)
class PanelErrors:
    """What one pass over the sub-batches found."""

    parameters: int
    reference: Moments
    cells: list[CellError]


def grid(patch_sizes: list[int], dropouts: list[float], model: ViTConfig) -> list[Cell]:
    """Return the cells to measure; without patch sizes all from the model's own to three times it that divide.

    At 240 pixels and patches of 16 these are the six of Figure 3 of Lin et al., 2024.

    Raises:
        ValueError: a patch size does not divide the image, or a dropout is none.
    """
    fitting = [size for size in range(model.patch_size, 3 * model.patch_size + 1) if model.image_size % size == 0]
    for size in patch_sizes:
        if size < 1 or model.image_size % size:
            raise ValueError(
                f"patch_sizes must divide the run's image_size={model.image_size}, got {size}; "
                f"sizes that do: {', '.join(map(str, fitting))}."
            )
    if not dropouts or not all(0 <= dropout < 1 for dropout in dropouts):
        raise ValueError(f"dropouts must be shares of the tokens in [0, 1), got {dropouts}; 0 keeps every token.")
    return [Cell(size, dropout) for size in sorted(patch_sizes or fitting) for dropout in sorted(dropouts)]


def compressed(plan: StepPlan, method: Method, cell: Cell) -> StepPlan:
    """Return a plan with the compression of a cell; the key follows the method's rule."""
    query = cell.query()
    return replace(plan, query=query, key=method.key_compression(query))


def is_uncompressed(cell: Cell, model: ViTConfig) -> bool:
    """Return whether a cell leaves every token in place."""
    return cell.patch_size == model.patch_size and not cell.dropout


def measure(method: Method, batches: Iterable[Batch], plan: StepPlan, cells: list[Cell], sub_batch: int) -> PanelErrors:
    """Compare each cell's gradients with the uncompressed ones of the same sub-batches of `sub_batch` samples.

    `plan` is uncompressed. The same images, views, positives, negatives and batch statistics enter both: a sub-batch
    of K samples has the gradient of a K-sample objective. Every process must call this, with its part of each
    sub-batch. The method is left as it was.
    """
    method.train()
    model = method.encoder.config
    parameters = trainable(method, plan)
    plans = [compressed(plan, method, cell) for cell in cells]
    moving = [i for i, cell in enumerate(cells) if not is_uncompressed(cell, model)]
    device = next(method.parameters()).device
    length = slice_length(parameters)
    storage = _storage(len(moving) + 1, length, device)
    pairs = PairedGradients(len(moving), length, seed=0, device=device, storage=storage)
    for batch in batches:
        pairs.start(loss_gradient(method, batch, plan, parameters))
        for place, i in enumerate(moving):
            pairs.add(place, loss_gradient(method, batch, plans[i], parameters))

    reference = pairs.reference()
    zeros = torch.zeros_like(reference.along)
    none = Moments(0.0, 0.0, zeros, zeros)
    found = [(none, reference)] * len(cells)
    for place, i in enumerate(moving):
        found[i] = (pairs.differences(place), pairs.gradients(place))
    errors = [_error(*each, method, plans[i], cells[i], sub_batch) for i, each in enumerate(found)]
    return PanelErrors(sum(p.numel() for p in parameters), reference, errors)


def _error(
    difference: Moments, gradient: Moments, method: Method, plan: StepPlan, cell: Cell, sub_batch: int
) -> CellError:
    vit = method.encoder.config
    assert cell.patch_size is not None
    return CellError(
        patch_size=cell.patch_size,
        dropout=cell.dropout,
        query_tokens=plan.query.sequence_length(vit.image_size, vit.patch_size),
        key_tokens=plan.key.sequence_length(vit.image_size, vit.patch_size),
        cost=method.sample_cost(plan),
        nominal_cost=method.nominal_sample_cost(plan),
        squared_bias=difference.squared_expectation(),
        squared_bias_plugin=difference.squared_mean(),
        # That of a mean of K samples is K times smaller than that of one.
        variance=sub_batch * gradient.variance(),
        squared_bias_without=difference.squared_expectation_without().tolist(),
        variance_without=(sub_batch * gradient.variance_without()).tolist(),
    )


def _storage(vectors: int, length: int, device: torch.device) -> torch.device:
    """Return where the running sums go: beside the model where they fit, else into the host's memory."""
    if device.type != "cuda":
        return device
    free, _ = torch.cuda.mem_get_info(device)
    return device if 4 * vectors * length < SHARE_OF_MEMORY * free else torch.device("cpu")
