"""What a step needs of memory."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from pipeline.methods import Method
from pipeline.methods.base import Batch
from pipeline.schedules import StepPlan

MIB = 2**20


def kept_for_backward(method: Method, batch: Batch, plan: StepPlan) -> int:
    """Return the bytes that a forward keeps for its backward, parameters aside."""
    own = {p.untyped_storage().data_ptr() for p in method.parameters()}
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = method(batch, plan)
    del output
    return sum(kept.values())


def peak_of(work: Callable[[], object], device: torch.device) -> float | None:
    """Return the most device memory, in MiB, that is taken while some work goes on; None on CPU, which does not count.

    (Nor does the resident set say it: a process keeps the memory of its largest step, see `pipeline.allocator`.)
    """
    if device.type != "cuda":
        return None
    torch.cuda.reset_peak_memory_stats(device)
    work()
    torch.cuda.synchronize(device)
    return torch.cuda.max_memory_allocated(device) / MIB
