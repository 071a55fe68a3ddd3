"""The momentum encoder: an exponential moving average of a network, with a forward of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn

from pipeline.distributed import at_least_fp32

T = TypeVar("T")


class MomentumEncoder:
    """A copy of an online network that follows it (Eq. 2 of He et al., 2020).

    Not an nn.Module on purpose: the engine must neither cast, nor shard, nor optimize it. The average is kept in
    fp32 whatever the network computes in, since bf16 loses the update at momenta near 1.
    """

    def __init__(self, online: nn.Module) -> None:
        # Parameters keep their identity through moves, casts and sharding of the optimizer.
        self._online = list(online.parameters())
        self.network = copy.deepcopy(online).requires_grad_(False).train()
        self._parameters: list[Tensor] = list(self.network.parameters())
        self._average = [at_least_fp32(p.detach()).clone() for p in self._parameters]

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device and compute in `dtype`; the average stays fp32."""
        self._average = [a.to(device) for a in self._average]
        self.network.to(device, dtype)
        self._parameters = list(self.network.parameters())
        if torch.promote_types(dtype, torch.float32) == dtype:
            # One copy is enough: the network's own parameters are the average.
            self._average = [p.detach() for p in self._parameters]

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the average by 1 - momentum towards the online parameters."""
        target = [at_least_fp32(p.detach()) for p in self._online]
        torch._foreach_lerp_(self._average, target, 1 - momentum)
        self._publish()

    @torch.no_grad()
    def __call__(self, forward: Callable[[nn.Module], T]) -> T:
        """Run a forward through the network without recording a graph."""
        return forward(self.network)

    def state(self) -> dict[str, Tensor]:
        """Return the fp32 average and the network's buffers by name."""
        names = [name for name, _ in self.network.named_parameters()]
        return {**dict(zip(names, self._average, strict=True)), **dict(self.network.named_buffers())}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned."""
        mine = self.state()
        assert mine.keys() == state.keys(), mine.keys() ^ state.keys()
        for name, tensor in mine.items():
            tensor.copy_(state[name])
        self._publish()

    def _publish(self) -> None:
        if self._parameters and self._average[0].data_ptr() != self._parameters[0].data_ptr():
            torch._foreach_copy_(self._parameters, self._average)
