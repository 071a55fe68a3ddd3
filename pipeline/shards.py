"""What this process has of a parameter that is cut over the processes: ZeRO 3's shards, and FSDP2's."""

from __future__ import annotations

from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor


def is_cut(parameter: Tensor | None) -> TypeGuard[nn.Parameter]:
    """Return whether each process has a part of it only."""
    return isinstance(parameter, DTensor) or hasattr(parameter, "ds_tensor")


def local(parameter: Tensor) -> Tensor:
    """Return what this process has: ZeRO 3's shard, flat, FSDP2's rows, or all of it where nothing is cut."""
    if isinstance(parameter, DTensor):
        # Without a graph this is the shard itself, in which optimizer and momentum encoder write.
        with torch.no_grad():
            return parameter.to_local().detach()
    shard: Tensor = getattr(parameter, "ds_tensor", parameter)
    return shard.detach()


def whole_shape(parameter: Tensor) -> tuple[int, ...]:
    """Return the shape of all of it; under ZeRO 3 a parameter that is not gathered is empty."""
    return tuple(getattr(parameter, "ds_shape", parameter.shape))


def place_of_shard(parameter: Any, rank: int) -> tuple[int, int]:
    """Return where a shard starts in its flattened parameter, and how much of it is no padding; or 0 and all."""
    if isinstance(parameter, DTensor):
        # As torch.chunk cuts rows: the last processes may have fewer, or none.
        rows, processes = parameter.shape[0], parameter.device_mesh.size()
        first = min(rank * -(-rows // processes), rows)
        return first * (parameter.numel() // rows), local(parameter).numel()
    if not is_cut(parameter):
        return 0, parameter.numel()
    whole: Any = parameter
    total, shard = whole.ds_numel, whole.ds_tensor.numel()
    start = min(rank * shard, total)
    # The last shards of a parameter that the processes cannot share evenly end in padding, or are nothing else.
    return start, min(shard, total - start)
