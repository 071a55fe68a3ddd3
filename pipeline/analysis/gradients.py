"""The gradient of a method's loss as one vector, without a trace in the method."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from pipeline.distributed import at_least_fp32, mean_over_ranks, rank, world_size
from pipeline.methods import Method
from pipeline.methods.base import Batch
from pipeline.schedules import StepPlan


def trainable(method: Method, plan: StepPlan) -> list[nn.Parameter]:
    """Return the parameters that a step of this plan changes."""
    still = {id(p) for layer in method.layers()[: plan.frozen_layers] for p in layer}
    if plan.last_layer_rate == 0:
        still |= {id(p) for p in method.last_layer()}
    return [p for p in method.parameters() if p.requires_grad and id(p) not in still]


def loss_gradient(method: Method, batch: Batch, plan: StepPlan, parameters: Sequence[nn.Parameter]) -> Tensor:
    """Return this process's slice of the gradient of the global batch's loss.

    Gradients are returned, not accumulated: neither `grad` fields nor an engine's hooks notice. Every process must
    call this together; each holds an equal part of the batch and gets an equal part of the vector, zeros at its end.
    """
    loss = method(batch, plan).loss
    parts = torch.autograd.grad(loss, parameters, allow_unused=True, materialize_grads=True)
    whole = torch.cat([at_least_fp32(part).flatten() for part in parts])
    if world_size() == 1:
        return whole
    length = slice_length(parameters)
    padded = torch.nn.functional.pad(whole, (0, length * world_size() - len(whole)))
    return mean_over_ranks(padded)[rank() * length :][:length].clone()


def slice_length(parameters: Sequence[nn.Parameter]) -> int:
    """Return the length of each process's slice of the gradient."""
    return -(-sum(p.numel() for p in parameters) // world_size())
