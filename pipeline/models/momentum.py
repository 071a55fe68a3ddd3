"""The momentum encoder: an exponential moving average of a network, with a forward of its own."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from itertools import takewhile
from typing import TypeVar, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distributed import at_least_fp32
from pipeline.shards import local, place_of_shard

T = TypeVar("T")
# Of its gap when a parameter stopped learning: what is left is below bf16's rounding by far.
CLOSED = 1e-4
GAPS = "gaps"


class Root(nn.Module):
    """A network, and a forward that is any function of it."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, function: Callable[[nn.Module], T]) -> tuple[T]:
        """Return the function of the network, in a tuple: ZeRO 3 takes anything else apart."""
        return (function(self.network),)


class MomentumEncoder:
    """A copy of an online network that follows it (Eq. 2 of He et al., 2020).

    Not an nn.Module on purpose: the engine must neither cast, nor shard, nor optimize it. The average is kept in
    fp32 whatever the network computes in, since bf16 loses the update at momenta near 1.
    """

    def __init__(self, online: nn.Module) -> None:
        self._followed = online
        # Parameters keep their identity through moves, casts and sharding of the optimizer.
        self._online = list(online.parameters())
        self.network = copy.deepcopy(online).requires_grad_(False).train()
        self._parameters: list[Tensor] = list(self.network.parameters())
        self._average = [at_least_fp32(p.detach()).clone() for p in self._parameters]
        # What runs it: the root that ZeRO 3 and FSDP2 need around everything they gather.
        self.root = Root(self.network)
        # Since whoever wants to know has set it to False.
        self.ran = False
        self._forwards_in: torch.dtype | None = None
        # What is left of the gap that there was when a parameter stopped learning: every update takes its share.
        self._gaps = [1.0] * len(self._average)

    def to(self, device: torch.device, dtype: torch.dtype) -> None:
        """Move to a device and compute in `dtype`; the average stays fp32."""
        self._average = [a.to(device) for a in self._average]
        self.network.to(device, dtype)
        self._parameters = list(self.network.parameters())
        self._average_in_place()

    def shard(self, rank: int, forwards_in: torch.dtype | None = None) -> None:
        """Keep this process's part of the average only, now that the network and what it follows are cut alike.

        `forwards_in` is what FSDP2 casts weights to when it gathers them, where they are kept in another dtype.
        """
        self._forwards_in = forwards_in
        cut, wholes = list(self.network.parameters()), [a.reshape(-1) for a in self._average]
        # FSDP2 puts parameters of its own in the place of those that were there.
        self._online, self._parameters = list(self._followed.parameters()), [local(p) for p in cut]
        self._average = []
        for whole, parameter, mine in zip(wholes, cut, self._parameters, strict=True):
            start, count = place_of_shard(parameter, rank)
            # The last part ends in padding if the network's does; on the host if shards are there.
            part = F.pad(whole[start : start + count], (0, mine.numel() - count)).to(mine.device)
            self._average.append(part.view_as(mine))
        self._average_in_place()

    @torch.no_grad()
    def update(self, momentum: float) -> None:
        """Move the average by 1 - momentum towards the online parameters.

        The average of a parameter that no longer learns goes on until its gap is closed, then takes the parameter over
        and rests. (Not at once: late in a run, where 1 - momentum is small, that would be a leap.)
        """
        before = self._gaps
        self._gaps = [1.0 if p.requires_grad else gap * momentum for p, gap in zip(self._online, before, strict=True)]
        moving = [i for i, gap in enumerate(before) if gap > CLOSED or self._gaps[i] > CLOSED]
        target = [at_least_fp32(local(self._online[i]).to(self._forwards_in)) for i in moving]
        averages = [self._average[i] for i in moving]
        torch._foreach_lerp_(averages, target, 1 - momentum)
        for i, average, online in zip(moving, averages, target, strict=True):
            if self._gaps[i] <= CLOSED:
                average.copy_(online)
        self._publish(moving)

    def shared_layers(self, layers: Sequence[Sequence[Tensor]]) -> int:
        """Return how many of these first layers of the online network are this one's, too, and will stay so."""
        # As they are now: while they are gathered, FSDP2 has other parameters in their places.
        online = self._followed.parameters()
        resting = {id(p) for p, gap in zip(online, self._gaps, strict=True) if gap <= CLOSED}
        shared = (all(id(p) in resting for p in layer) for layer in layers)
        return sum(1 for _ in takewhile(bool, shared))

    @torch.no_grad()
    def __call__(self, forward: Callable[[nn.Module], T]) -> T:
        """Run a forward through the network without recording a graph."""
        (result,) = self.root(forward)
        self.ran = True
        return cast(T, result)

    @property
    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the network's parameters by the names that `state` gives to their averages."""
        return dict(self.network.named_parameters())

    def state(self) -> dict[str, Tensor]:
        """Return the fp32 average, the network's buffers by name, and how far each gap is closed."""
        names = [name for name, _ in self.network.named_parameters()]
        gaps = torch.tensor(self._gaps, dtype=torch.float64)
        return {**dict(zip(names, self._average, strict=True)), **dict(self.network.named_buffers()), GAPS: gaps}

    @torch.no_grad()
    def load(self, state: dict[str, Tensor]) -> None:
        """Restore what `state` returned; where it came without gaps, before there were any, all are open."""
        mine = self.state()
        state = {GAPS: torch.ones(len(self._average), dtype=torch.float64)} | state
        assert mine.keys() == state.keys(), mine.keys() ^ state.keys()
        for name, tensor in mine.items():
            tensor.copy_(state[name])
        self._gaps = mine[GAPS].tolist()
        self._publish(range(len(self._average)))

    def _average_in_place(self) -> None:
        if all(at_least_fp32(p) is p for p in self._parameters):
            # One copy is enough: the network's own parameters are the average.
            self._average = [p.detach() for p in self._parameters]

    def _publish(self, which: Sequence[int]) -> None:
        if which and self._average[0].data_ptr() != self._parameters[0].data_ptr():
            torch._foreach_copy_([self._parameters[i] for i in which], [self._average[i] for i in which])
