"""Collectives seen from outside: a context around each of them, whoever calls it, with the bytes that it is about."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch.distributed as dist
from torch import Tensor

Around = Callable[[str, int], AbstractContextManager[object]]
"""Takes the name of a collective and the bytes of the whole: of what is added up, or of what all get."""

# Of all releases of PyTorch that we run on. Below torch.distributed, since DeepSpeed keeps functions of it for itself.
NAMES = (
    "allreduce",
    "allreduce_coalesced",
    "reduce",
    "broadcast",
    "allgather",
    "_allgather_base",
    "all_gather_single",
    "allgather_into_tensor_coalesced",
    "reduce_scatter",
    "_reduce_scatter_base",
    "reduce_scatter_single",
    "reduce_scatter_tensor_coalesced",
)


@contextmanager
def around_collectives(around: Around) -> Iterator[None]:
    """Put a context around every collective of this process, which ends when the collective has; restore all after."""
    with ExitStack() as stack:
        for name in NAMES:
            original = getattr(dist.ProcessGroup, name, None)
            if original is not None:
                stack.enter_context(replaced(dist.ProcessGroup, name, _surrounded(name, original, around)))
        yield


@contextmanager
def replaced(owner: Any, name: str, substitute: Callable[..., Any]) -> Iterator[None]:
    """Put a function in the place of an attribute for a while; what a class has stays with the class."""
    own = vars(owner).get(name)
    setattr(owner, name, substitute)
    try:
        yield
    finally:
        if own is None:
            delattr(owner, name)
        else:
            setattr(owner, name, own)


def whole_bytes(argument: object) -> int:
    """Return the bytes of a tensor, or of all tensors of a list."""
    if isinstance(argument, Tensor):
        return argument.numel() * argument.element_size()
    return sum(map(whole_bytes, argument)) if isinstance(argument, list | tuple) else 0


def _surrounded(name: str, original: Callable[..., Any], around: Around) -> Callable[..., Any]:
    def call(*arguments: Any, **named: Any) -> Any:
        # Inputs and outputs are among the arguments, and the larger ones are the whole.
        sizes = map(whole_bytes, (*arguments[1:], *named.values()))
        with around(name, max(sizes, default=0)):
            work = original(*arguments, **named)
            if hasattr(work, "wait"):
                work.wait()
        return work

    return call
