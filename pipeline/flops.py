"""Model FLOPs of a step: what its method and its plan ask for, forward and backward, whatever computes it.

A backward is two forwards: gradients of inputs, gradients of weights. What is frozen has none, images take no gradient,
and a momentum encoder has a forward only. What an engine computes again for lack of memory is not counted. Left out:
what `torch.utils.flop_counter` leaves out (norms, softmax, activations, optimizer, momentum update), and the losses'
inner products.
"""

from __future__ import annotations

from pipeline.methods.base import Forward, Method
from pipeline.models.flops import block_flops, projection_flops, resizing_flops
from pipeline.schedules import StepPlan

FORWARD, LEARNING = 1, 3
# Counting takes a fraction of a millisecond.
COUNT_EVERY = 100


def step_flops(method: Method, plan: StepPlan, samples: int) -> int:
    """Return the FLOPs of a process's part of a step."""
    passes, shared = method.forwards(plan), method.shared_layers(plan)
    # Equal passes go through a backbone together.
    once = sum(_resizing(method, each, plan.frozen_layers, shared) for each in set(passes))
    each_sample = sum(_pass(method, each, plan.frozen_layers, shared) for each in passes)
    return once + samples * (each_sample + method.head_flops(plan))


class StepFlops:
    """Counts each shape of a step once, and anew after some steps: as momentum encoders close in, they share layers."""

    def __init__(self, method: Method, samples: int) -> None:
        """Count steps of `samples` on a process."""
        self._method, self._samples = method, samples
        self._known: dict[tuple[object, ...], int] = {}
        self._steps = 0

    def __call__(self, plan: StepPlan) -> int:
        """Return the FLOPs of a process's part of the step of this plan."""
        self._steps += 1
        if self._steps % COUNT_EVERY == 0:
            self._known.clear()
        shape = (plan.query, plan.key, plan.frozen_layers, plan.last_layer_rate > 0)
        if shape not in self._known:
            self._known[shape] = step_flops(self._method, plan, self._samples)
        return self._known[shape]


def _pass(method: Method, each: Forward, frozen: int, shared: int) -> int:
    """Return the FLOPs of one image's pass; of a momentum encoder's, without the layers that were computed before."""
    vit = method.encoder
    length = each.compression.sequence_length(each.image_size, vit.config.patch_size)
    block = block_flops(vit.blocks[0], length)
    if not each.learns:
        projection = 0 if shared else projection_flops(vit, each.image_size, each.compression)
        return projection + block * (len(vit.blocks) - max(0, shared - 1))
    resting = max(0, frozen - 1)
    projections = projection_flops(vit, each.image_size, each.compression) * (1 + _kernel_learns(method, frozen))
    return projections + block * (FORWARD * resting + LEARNING * (len(vit.blocks) - resting))


def _resizing(method: Method, each: Forward, frozen: int, shared: int) -> int:
    kernel, positions = resizing_flops(method.encoder, each.image_size, each.compression)
    if not each.learns:
        return 0 if shared else kernel + positions
    return kernel * (1 + _kernel_learns(method, frozen)) + positions * (1 + (frozen == 0))


def _kernel_learns(method: Method, frozen: int) -> bool:
    return frozen == 0 and method.encoder.patch.weight.requires_grad
