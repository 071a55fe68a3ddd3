"""Everything that a run must keep of its networks and optimizer, by name, whatever the engine and the processes.

Names: `master/`, `exp_avg/` and `exp_avg_sq/` of what is optimized, `weight/` of what is not (frozen layers among it),
`buffer/`, and `state/` of what the method keeps for itself, its momentum encoder first. A test holds this inventory
against all tensors there are.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from pipeline import optimizer_state
from pipeline.methods.base import Method
from pipeline.optimizer_state import Fragment
from pipeline.pieces import Piece, Reader
from pipeline.shards import is_cut, local, place_of_shard, whole_shape

MASTER, WEIGHT, BUFFER, STATE = "master/", "weight/", "buffer/", "state/"
STEPS = "steps"


def pieces(method: Method, optimizer: Any, rank: int) -> Iterator[Piece]:
    """Yield all state as this process has it."""
    names = {parameter: name for name, parameter in method.named_parameters()}
    moments = optimizer_state.inner_optimizer(optimizer).state
    everywhere = optimizer_state.replicated(optimizer)
    for each in optimizer_state.fragments(optimizer, rank):
        name, shape = names[each.parameter], whole_shape(each.parameter)
        kept = {MASTER: each.master} | {f"{key}/": value for key, value in _tensors(moments.get(each.master, {}))}
        for kind, tensor in kept.items():
            yield Piece(kind + name, shape, each.start, each.of(tensor), everywhere)
    optimized = {p for _, parameters in optimizer_state.members(optimizer) for p in parameters}
    for name, parameter in method.named_parameters():
        if parameter not in optimized:
            yield _piece(WEIGHT + name, local(parameter), parameter, rank)
    for name, buffer in _buffers(method):
        yield Piece.whole(BUFFER + name, buffer)
    followers = _followers(method)
    for name, tensor in method.state().items():
        yield _piece(STATE + name, tensor, followers.get(name), rank)


def steps(optimizer: Any) -> dict[str, float]:
    """Return how often the optimizer has stepped each parameter group that it has stepped."""
    moments = optimizer_state.inner_optimizer(optimizer).state
    counted: dict[str, float] = {}
    for (name, _), master in optimizer_state.masters(optimizer):
        if master in moments:
            counted[name] = max(counted.get(name, 0.0), float(moments[master]["step"]))
    return counted


@torch.no_grad()
def load(method: Method, optimizer: Any, reader: Reader, rank: int) -> None:
    """Restore what `pieces` and `steps` returned, wherever and whichever engine did.

    The optimizer must have the groups that it had then.

    Raises:
        ValueError: the files lack something.
    """
    _load_optimizer(method, optimizer, reader, rank)
    for name, parameter in method.named_parameters():
        _fill(local(parameter), parameter, reader, _saved_name(reader, name), rank)
    for name, buffer in _buffers(method):
        buffer.copy_(reader.whole(BUFFER + name))
    followers, state = _followers(method), {}
    for name, tensor in method.state().items():
        state[name] = torch.zeros_like(tensor)
        _fill(state[name], followers.get(name), reader, STATE + name, rank)
    method.load(state)


def load_networks(method: Method, reader: Reader) -> None:
    """Load the networks alone, without an optimizer, on one process.

    Raises:
        ValueError: the files lack something.
    """
    # One by one: what two modules share has one name here and two in a state dict.
    for name, parameter in method.named_parameters():
        _fill(parameter.detach(), None, reader, _saved_name(reader, name), rank=0)
    for name, buffer in _buffers(method):
        buffer.copy_(reader.whole(BUFFER + name))
    method.load({name: reader.whole(STATE + name) for name in method.state()})


def saved_names(method: Method, reader: Reader) -> dict[nn.Parameter, str]:
    """Return under which name each parameter is saved, those of momentum encoders among them."""
    own = {parameter: _saved_name(reader, name) for name, parameter in method.named_parameters()}
    return own | {parameter: STATE + name for name, parameter in _followers(method).items()}


def is_saved(name: str, reader: Reader) -> bool:
    """Return whether there are weights of a parameter of this name."""
    return _saved_name(reader, name) in reader.names


def _saved_name(reader: Reader, name: str) -> str:
    """Return under which name the weights of a parameter are saved."""
    return WEIGHT + name if WEIGHT + name in reader.names else MASTER + name


def _load_optimizer(method: Method, optimizer: Any, reader: Reader, rank: int) -> None:
    names = {parameter: name for name, parameter in method.named_parameters()}
    moments, saved_steps = optimizer_state.inner_optimizer(optimizer).state, reader.facts[STEPS]
    moments.clear()
    for each in optimizer_state.fragments(optimizer, rank):
        name = names[each.parameter]
        reader.check(MASTER + name, whole_shape(each.parameter))
        each.of(each.master).copy_(_stretch(reader, MASTER + name, each))
        for key in _moment_keys(reader, name) if each.group in saved_steps else ():
            state = moments[each.master]
            # A step of its own for each master: a shared one would be counted once for every group.
            if "step" not in state:
                state["step"] = torch.tensor(saved_steps[each.group], dtype=torch.float32)
            if key not in state:
                state[key] = torch.zeros_like(each.master)
            each.of(state[key]).copy_(_stretch(reader, f"{key}/{name}", each))


def _moment_keys(reader: Reader, name: str) -> list[str]:
    return [key for key in ("exp_avg", "exp_avg_sq") if f"{key}/{name}" in reader.names]


def _stretch(reader: Reader, name: str, fragment: Fragment) -> Tensor:
    return reader.read(name, fragment.start, fragment.start + fragment.count)


def _fill(target: Tensor, parameter: nn.Parameter | None, reader: Reader, name: str, rank: int) -> None:
    """Restore a tensor that is cut as a parameter is, or not cut without one."""
    reader.check(name, tuple(target.shape) if not is_cut(parameter) else whole_shape(parameter))
    start, count = place_of_shard(parameter, rank) if is_cut(parameter) else (0, target.numel())
    target.reshape(-1)[:count].copy_(reader.read(name, start, start + count))


def _piece(name: str, tensor: Tensor, parameter: nn.Parameter | None, rank: int) -> Piece:
    """Return what there is of a tensor that is cut as a parameter is, or not cut without one."""
    if not is_cut(parameter):
        return Piece.whole(name, tensor)
    start, count = place_of_shard(parameter, rank)
    return Piece(name, whole_shape(parameter), start, tensor.detach().reshape(-1)[:count])


def _followers(method: Method) -> dict[str, nn.Parameter]:
    """Return the momentum encoders' parameters by their names in the method's state."""
    return {name: each for encoder in method.momentum_encoders() for name, each in encoder.parameters.items()}


def _buffers(method: Method) -> Iterator[tuple[str, Tensor]]:
    persistent = method.state_dict().keys()
    yield from ((name, buffer) for name, buffer in method.named_buffers() if name in persistent)


def _tensors(moments: dict[str, Any]) -> list[tuple[str, Tensor]]:
    return [(key, value) for key, value in moments.items() if key != "step"]
