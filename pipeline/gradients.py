"""Norms of the reduced gradient under ZeRO stage 1: of each tensor, to clip it, and of each group, to look at."""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class TensorNorms:
    """The gradient norm of every tensor of DeepSpeed's optimizer, equal on all processes.

    Measure and clip between backward and step, when gradients are averaged over the processes. In fp32 each
    process holds the pieces in its own partition, which may cut a tensor; in bf16 each holds the whole. Nothing
    here waits for the device.
    """

    def __init__(self, optimizer: Any) -> None:
        self._optimizer = optimizer
        self._whole = hasattr(optimizer, "fp32_groups_gradients")
        groups = optimizer.bf16_groups if self._whole else optimizer.bit16_groups
        self._names = [
            group["name"] for group, members in zip(optimizer.param_groups, groups, strict=True) for _ in members
        ]
        number = {id(p): i for i, p in enumerate(p for members in groups for p in members)}
        mine = groups if self._whole else optimizer.params_in_partition
        numbers = [number[id(p)] for members in mine for p in members]
        # Which tensor a piece belongs to.
        self._tensor_of = torch.tensor(numbers, device=groups[0][0].device)
        self.squares = torch.zeros(len(self._names), device=groups[0][0].device)

    @torch.no_grad()
    def measure(self) -> None:
        """Set `squares`, fp32 [tensors], to the squared norms before any clipping."""
        self.squares.zero_()
        self.squares[self._tensor_of] = torch.stack(torch._foreach_norm(self._pieces())).square()
        if not self._whole and dist.get_world_size() > 1:
            dist.all_reduce(self.squares)

    @torch.no_grad()
    def clip(self, limit: float) -> None:
        """Scale the gradient of each tensor down to a norm of `limit`, as measured.

        A norm beyond fp32 turns into nan, not into a gradient of zero: such a step has to be skipped.
        """
        norms = self.squares.sqrt()
        # The small number is that of torch.nn.utils.clip_grad_norm_.
        scales = (limit / (norms + 1e-6)).clamp(max=1).where(norms.isfinite(), torch.nan)
        torch._foreach_mul_(self._pieces(), list(scales[self._tensor_of].unbind()))

    def total(self) -> float:
        """Return the global norm as measured."""
        return float(self.squares.sum().sqrt())

    def by_group(self) -> dict[str, float]:
        """Return the norm of each parameter group as measured, by name."""
        sums = dict.fromkeys(self._names, 0.0)
        for name, square in zip(self._names, self.squares.tolist(), strict=True):
            sums[name] += square
        return {name: total**0.5 for name, total in sums.items()}

    def _pieces(self) -> list[Tensor]:
        if self._whole:
            return [gradient for group in self._optimizer.fp32_groups_gradients for gradient in group]
        # A partition that its tensors do not fill ends in padding, which belongs to none.
        return [
            piece
            for group, members in enumerate(self._optimizer.params_in_partition)
            for _, piece in zip(members, self._optimizer.averaged_gradients[group], strict=False)
        ]
