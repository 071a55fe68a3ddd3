"""Where optimizers keep the state of each parameter, DeepSpeed's above all; out of one engine, into the next.

Each process moves its own part; nothing is sent or rounded. What is kept must have the same name and members in
both engines.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from pipeline.shards import place_of_shard

_COUNTERS = ("global_steps", "global_samples", "micro_steps", "skipped_steps")
_HOOKS = ("module_forward_pre_hook", "module_forward_post_hook", "first_dataloader_check")
# What ZeRO 3 leaves in modules when it goes: they hold the old coordinator of its gathers, and call it.
_CLOSURES = ("pre_bwd_fn", "post_bwd_fn", "applied_pre_backward_ref_cnt")


@dataclass(frozen=True)
class OptimizerState:
    """By group and number within it: master weights and what the optimizer knows of them; and the engine's counters."""

    parts: dict[tuple[str, int], tuple[Tensor, dict[str, Any]]]
    counters: dict[str, int]


@dataclass(frozen=True)
class Fragment:
    """The stretch of a flattened parameter that this process optimizes, and where it stands in a master tensor."""

    group: str
    parameter: nn.Parameter
    start: int
    count: int
    master: Tensor
    offset: int

    def of(self, tensor: Tensor) -> Tensor:
        """Return the stretch of a tensor that is laid out as the master."""
        return tensor.detach().reshape(-1)[self.offset : self.offset + self.count]

    def of_gradient(self) -> Tensor:
        """Return the stretch of the master's own gradient, which with offload it has at all times."""
        assert self.master.grad is not None
        return self.of(self.master.grad)


def take(engine: Any, names: Container[str]) -> OptimizerState:
    """Return the state of the parameter groups of these names."""
    inner = inner_optimizer(engine.optimizer)
    parts = {key: (master, inner.state.get(master, {})) for key, master in masters(engine.optimizer) if key[0] in names}
    return OptimizerState(parts, {name: getattr(engine, name) for name in _COUNTERS})


@torch.no_grad()
def put(engine: Any, state: OptimizerState) -> None:
    """Give an engine the state taken from another; it must have exactly those groups."""
    inner = inner_optimizer(engine.optimizer)
    new = dict(masters(engine.optimizer))
    assert new.keys() == state.parts.keys(), new.keys() ^ state.parts.keys()
    for key, master in new.items():
        old, moments = state.parts[key]
        # In bf16 the weights that the new engine started from are rounded, so its masters are, too.
        master.data.copy_(old)
        if moments:
            inner.state[master] = moments
    for name, value in state.counters.items():
        setattr(engine, name, value)


def num_bytes(engine: Any) -> int:
    """Return the size of the tensors that `take` would return of all groups."""
    inner = inner_optimizer(engine.optimizer)
    tensors = [t for _, master in masters(engine.optimizer) for t in (master, *inner.state.get(master, {}).values())]
    return sum(t.numel() * t.element_size() for t in tensors if isinstance(t, Tensor))


def forget_gradients(optimizer: Any) -> None:
    """Zero what DeepSpeed keeps of a step's gradients: one that does not come in the next would stay what it was."""
    if sharded(optimizer):
        optimizer.grad_partitions_flat_buffer.zero_()
    if offloaded(optimizer):
        for _, master in masters(optimizer):
            master.grad.zero_()
        # At ZeRO 2 in fp32 the parts of a batch add up in these.
        for gradient in getattr(optimizer, "accumulated_grads_in_cpu", {}).values():
            gradient.zero_()
        # In bf16 they add up here, which DeepSpeed forgets to clear when it skips a step: all others would be nan, too.
        optimizer.averaged_gradients.clear()


def retire(engine: Any) -> None:
    """Let go of an engine: without this its hooks on the module would keep all its memory, and go on running."""
    for name in _HOOKS:
        hook: Any = getattr(engine, name, None)
        if hasattr(hook, "remove"):
            hook.remove()
    if hasattr(engine.optimizer, "unregister_grad_acc_post_hooks"):
        engine.optimizer.unregister_grad_acc_post_hooks()
    engine.destroy()
    # It destroys once more when it is collected, and would take from its successor where parameters stand.
    engine.optimizer = None
    for module in engine.module.modules():
        for name in _CLOSURES:
            module.__dict__.pop(name, None)
    for parameter in engine.module.parameters():
        # In bf16 each is a view of its group's gradients, which it would keep alive; no public call lets go of it.
        parameter.__dict__.pop("_hp_grad", None)
        # With offload each knows its optimizer, whose memory those that are frozen would keep.
        parameter.__dict__.pop("_zero_optimizer", None)


def inner_optimizer(optimizer: Any) -> Any:
    """Return PyTorch's optimizer inside DeepSpeed's."""
    return getattr(optimizer, "optimizer", optimizer)


def members(optimizer: Any) -> list[tuple[str, list[nn.Parameter]]]:
    """Return the method's own parameters with their group's name, by group; at ZeRO 3 by part of a group."""
    groups = inner_optimizer(optimizer).param_groups
    names = [group["name"] for group in groups]
    if sharded(optimizer):
        numbers = [optimizer.sub_group_to_group_id[i] for i in range(len(optimizer.fp16_groups))]
        return [(names[k], list(each)) for k, each in zip(numbers, optimizer.fp16_groups, strict=True)]
    for attribute in ("bit16_groups", "bf16_groups", "fp16_groups", "shard_groups"):
        if hasattr(optimizer, attribute):
            return list(zip(names, map(list, getattr(optimizer, attribute)), strict=True))
    return [(group["name"], list(group["params"])) for group in groups]


def masters(optimizer: Any) -> Iterator[tuple[tuple[str, int], Any]]:
    """Yield the tensors that this process optimizes, each with its group's name and its number there."""
    if sharded(optimizer):
        flats: dict[str, list[Tensor]] = {}
        for (name, _), flat in zip(members(optimizer), optimizer.fp32_partitioned_groups_flat, strict=True):
            flats.setdefault(name, []).append(flat)
    else:
        flats = {group["name"]: group["params"] for group in inner_optimizer(optimizer).param_groups}
    for name, group in flats.items():
        for number, master in enumerate(group):
            yield (name, number), master


def fragments(optimizer: Any, rank: int) -> Iterator[Fragment]:
    """Yield what this process optimizes, stretch by stretch."""
    flats = [master for _, master in masters(optimizer)]
    if sharded(optimizer):
        for (name, parameters), flat in zip(members(optimizer), flats, strict=True):
            yield from _fragments_of_shards(name, parameters, flat, rank)
    elif _partitioned(optimizer):
        for (name, parameters), flat in zip(members(optimizer), flats, strict=True):
            yield from _fragments_of_partition(name, parameters, flat)
    else:
        owned = [(name, p) for name, parameters in members(optimizer) for p in parameters]
        for (name, parameter), master in zip(owned, flats, strict=True):
            yield Fragment(name, parameter, *place_of_shard(parameter, rank), master, 0)


def replicated(optimizer: Any) -> bool:
    """Return whether all processes optimize the same, as at ZeRO 0."""
    return not (sharded(optimizer) or _partitioned(optimizer) or hasattr(optimizer, "shard_groups"))


def sharded(optimizer: Any) -> bool:
    """Return whether this is ZeRO 3's."""
    return hasattr(optimizer, "fp32_partitioned_groups_flat")


def offloaded(optimizer: Any) -> bool:
    """Return whether the optimizer steps on the host, where each master then has its gradient between steps, too."""
    return bool(getattr(optimizer, "cpu_offload", False) or getattr(optimizer, "offload_optimizer", False))


def _partitioned(optimizer: Any) -> bool:
    """Return whether each process has a stretch of every group, as at ZeRO 1 and 2."""
    return hasattr(optimizer, "partition_size") or hasattr(optimizer, "bf16_groups")


def _fragments_of_shards(name: str, parameters: list[Any], flat: Tensor, rank: int) -> Iterator[Fragment]:
    offset = 0
    for parameter in parameters:
        start, count = place_of_shard(parameter, rank)
        yield Fragment(name, parameter, start, count, flat, offset)
        offset += parameter.ds_tensor.numel()


def _fragments_of_partition(name: str, parameters: list[nn.Parameter], flat: Tensor) -> Iterator[Fragment]:
    for parameter in parameters:
        mapping: Any = getattr(parameter, "_hp_mapping", None)
        if mapping is not None:
            whole, part = mapping.lp_fragment_address, mapping.hp_fragment_address
            yield Fragment(name, parameter, whole.start, whole.numel, flat, part.start)
