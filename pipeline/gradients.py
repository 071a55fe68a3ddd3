"""Norms of the reduced gradient: of each tensor, to clip it, and of each group, to look at."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from pipeline.optimizer_state import fragments, members, offloaded, sharded
from pipeline.shards import is_cut, local


class TensorNorms:
    """The gradient norm of every tensor of an engine's optimizer, equal on all processes.

    Measure and clip between backward and step, when gradients are averaged over the processes. At ZeRO stages 1 and 2
    each process holds the pieces in its own partition, which may cut a tensor, at stage 3 and under FSDP2 a shard of
    every tensor; at stage 0, and at stage 1 in bf16, each holds the whole. Nothing here waits for the device, but with
    offload: then pieces and norms are on the host.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        groups = members(optimizer)
        # At ZeRO 3 of each tensor a shard, at 1 and 2 of each group a stretch; by the number of the group.
        self._in_part: list[list[Tensor]] | None = getattr(optimizer, "params_in_partition", None)
        if sharded(optimizer):
            self._in_part = [[*parameters] for _, parameters in groups]
        self._names = [name for name, parameters in groups for _ in parameters]
        self._members: list[Tensor] = [p for _, parameters in groups for p in parameters]
        self._in_shards = self._in_part is not None or is_cut(self._members[0])
        mine = self._members if self._in_part is None else [p for part in self._in_part for p in part]
        # With offload each master keeps its gradient beside it.
        self._on_host = list(fragments(optimizer, dist.get_rank())) if offloaded(optimizer) else None
        if self._on_host is not None:
            mine = [each.parameter for each in self._on_host]
        # Squares are where the gradients are: both backends of the process group add them up.
        self._device = self._members[0].device if self._on_host is None else torch.device("cpu")
        number = {id(p): i for i, p in enumerate(self._members)}
        # Which tensor each piece belongs to, where every step has the same pieces.
        self._tensor_of = torch.tensor([number[id(p)] for p in mine], device=self._device)
        self.squares = torch.zeros(len(self._names), device=self._device)

    @torch.no_grad()
    def measure(self) -> None:
        """Set `squares`, fp32 [tensors], to the squared norms before any clipping."""
        self.squares.zero_()
        if self._on_host is not None and torch.cuda.is_available():
            # Gradients are copied to the host by streams of DeepSpeed's own.
            torch.cuda.synchronize()
        tensor_of, pieces = self._pieces()
        if pieces:
            norms = torch._foreach_norm(pieces, 2, dtype=torch.float32)
            self.squares[tensor_of] = torch.stack(norms).square()
        if self._in_shards and dist.get_world_size() > 1:
            dist.all_reduce(self.squares)

    @torch.no_grad()
    def clip(self, limit: float) -> None:
        """Scale the gradient of each tensor down to a norm of `limit`, as measured.

        A norm beyond fp32 turns into nan, not into a gradient of zero: such a step has to be skipped.
        """
        norms = self.squares.sqrt()
        # The small number is that of torch.nn.utils.clip_grad_norm_.
        scales = (limit / (norms + 1e-6)).clamp(max=1).where(norms.isfinite(), torch.nan)
        tensor_of, pieces = self._pieces()
        if pieces:
            torch._foreach_mul_(pieces, [s.to(p.dtype) for s, p in zip(scales[tensor_of], pieces, strict=True)])

    @torch.no_grad()
    def clip_total(self, limit: float) -> None:
        """Scale all gradients down to a global norm of `limit`, as measured."""
        _, pieces = self._pieces()
        torch._foreach_mul_(pieces, (limit / (self.squares.sum().sqrt() + 1e-6)).clamp(max=1))

    def total(self) -> float:
        """Return the global norm as measured."""
        return float(self.squares.sum().sqrt())

    def by_group(self) -> dict[str, float]:
        """Return the norm of each parameter group as measured, by name."""
        sums = dict.fromkeys(self._names, 0.0)
        for name, square in zip(self._names, self.squares.tolist(), strict=True):
            sums[name] += square
        return {name: total**0.5 for name, total in sums.items()}

    def _pieces(self) -> tuple[Tensor, list[Tensor]]:
        """Return the tensor that each of this process's pieces of gradients belongs to, and the pieces."""
        optimizer = self._optimizer
        if self._on_host is not None:
            return self._tensor_of, [each.of_gradient() for each in self._on_host]
        if self._in_part is not None:
            # A partition that its tensors do not fill ends in padding, which belongs to none.
            return self._tensor_of, [
                piece
                for group, part in enumerate(self._in_part)
                for _, piece in zip(part, optimizer.averaged_gradients[group], strict=False)
            ]
        if hasattr(optimizer, "fp32_groups_gradients"):
            return self._tensor_of, [each for group in optimizer.fp32_groups_gradients for each in group]
        pairs = [(i, local(p.grad)) for i, p in enumerate(self._members) if p.grad is not None]
        if len(pairs) == len(self._members):
            return self._tensor_of, [gradient for _, gradient in pairs]
        return torch.tensor([i for i, _ in pairs], device=self._device), [gradient for _, gradient in pairs]
