"""The optimizer state of a DeepSpeed engine, by parameter group: taken out of one engine and put into the next.

Each process moves its own part; nothing is sent or rounded. What is kept must have the same name and members in
both engines.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_HOOKS = ("module_forward_pre_hook", "module_forward_post_hook", "first_dataloader_check")


@dataclass(frozen=True)
class OptimizerState:
    """By group and number within it: master weights and what the optimizer knows of them; and the engine's counters."""

    parts: dict[tuple[str, int], tuple[Tensor, dict[str, Any]]]
    counters: dict[str, int]


def take(engine: Any, names: Container[str]) -> OptimizerState:
    """Return the state of the parameter groups of these names."""
    inner = _inner(engine.optimizer)
    parts = {
        key: (master, inner.state.get(master, {})) for key, master in _masters(engine.optimizer) if key[0] in names
    }
    return OptimizerState(parts, {name: getattr(engine, name) for name in _COUNTERS})


@torch.no_grad()
def put(engine: Any, state: OptimizerState) -> None:
    """Give an engine the state taken from another; it must have exactly those groups."""
    inner = _inner(engine.optimizer)
    masters = dict(_masters(engine.optimizer))
    assert masters.keys() == state.parts.keys(), masters.keys() ^ state.parts.keys()
    for key, master in masters.items():
        old, moments = state.parts[key]
        # In bf16 the weights that the new engine started from are rounded, so its masters are, too.
        master.data.copy_(old)
        if moments:
            inner.state[master] = moments
    for name, value in state.counters.items():
        setattr(engine, name, value)


def num_bytes(engine: Any) -> int:
    """Return the size of the tensors that `take` would return of all groups."""
    inner = _inner(engine.optimizer)
    tensors = [t for _, master in _masters(engine.optimizer) for t in (master, *inner.state.get(master, {}).values())]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def retire(engine: Any) -> None:
    """Let go of an engine: without this its hooks on the module would keep all its memory, and go on running."""
    for name in _HOOKS:
        hook: Any = getattr(engine, name, None)
        if hasattr(hook, "remove"):
            hook.remove()
    if hasattr(engine.optimizer, "unregister_grad_acc_post_hooks"):
        engine.optimizer.unregister_grad_acc_post_hooks()
    engine.destroy()
    for parameter in engine.module.parameters():
        # In bf16 each is a view of its group's gradients, which it would keep alive; no public call lets go of it.
        parameter.__dict__.pop("_hp_grad", None)


def _inner(optimizer: Any) -> Any:
    """Return PyTorch's optimizer inside DeepSpeed's."""
    return getattr(optimizer, "optimizer", optimizer)


def _masters(optimizer: Any) -> Iterator[tuple[tuple[str, int], Tensor]]:
    """Yield the tensors that this process optimizes, each with its group's name and its number there."""
    for group in _inner(optimizer).param_groups:
        for number, master in enumerate(group["params"]):
            yield (group["name"], number), master
