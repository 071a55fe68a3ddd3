"""Compiling what a run will need before its first step, and leaving no other trace."""

from __future__ import annotations

import logging
import time
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.methods.base import Method
from pipeline.models.blocks import CompiledBlocks
from pipeline.schedules import StepPlan

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class BlackBatch:
    """Black views of the shapes that a loader brings."""

    views: tuple[Tensor, ...]
    labels: Tensor
    index: Tensor


def prewarm(method: Method, plans: Iterable[StepPlan], local_batch: int, device: torch.device) -> None:
    """Run the method forward and backward once for each shape of the plans, if its blocks are compiled at all.

    Every process must call this: methods talk to each other. Parameters, buffers, gradients, random states and what the
    engine hooks into are left as they are.
    """
    blocks = method.encoder.run_block
    if not isinstance(blocks, CompiledBlocks):
        return
    begin = time.monotonic()
    shapes = {(plan.query, plan.key, plan.frozen_layers): plan for plan in plans}
    views = tuple(torch.zeros(local_batch, 3, view.size, view.size, device=device) for view in method.views())
    index = torch.arange(local_batch, device=device)
    batch = BlackBatch(views, torch.zeros_like(index), index)
    # A method draws nothing at random, a compiler may.
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        for plan in shapes.values():
            _forward_and_backward(method, batch, plan)
    blocks.seal()
    log.info("compiled %d graphs for %d shapes in %.0f s", blocks.graphs, len(shapes), time.monotonic() - begin)


def _forward_and_backward(method: Method, batch: BlackBatch, plan: StepPlan) -> None:
    frozen = [p for layer in method.layers()[: plan.frozen_layers] for p in layer if p.requires_grad]
    # As the engine will have it: graphs without gradient tell apart who could have one.
    for parameter in frozen:
        parameter.requires_grad_(False)
    loss = method(batch, plan).loss
    # Not backward(): it would accumulate gradients and set off the engine's hooks.
    torch.autograd.grad(loss, [p for p in method.parameters() if p.requires_grad], allow_unused=True)
    for parameter in frozen:
        parameter.requires_grad_(True)
