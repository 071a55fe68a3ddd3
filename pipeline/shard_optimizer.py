"""AdamW over the shards that FSDP2 leaves to this process: they are the fp32 master weights themselves."""

from __future__ import annotations

from collections.abc import Container
from typing import Any

from torch import Tensor, nn

from pipeline.optim import OptimConfig, adamw
from pipeline.shards import local


class ShardOptimizer:
    """AdamW over plain tensors that share their memory with the shards.

    Plain, since a step over DTensors costs Python for each of them, and so that `optimizer_state` finds what it finds
    in DeepSpeed's: `optimizer` is PyTorch's own, `shard_groups` has the method's parameters as it has the masters.
    """

    def __init__(self, groups: list[dict[str, Any]], config: OptimConfig) -> None:
        self.shard_groups: list[list[nn.Parameter]] = [group["params"] for group in groups]
        masters = [{**group, "params": [local(parameter) for parameter in group["params"]]} for group in groups]
        self.optimizer = adamw(masters, config)

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """Return PyTorch's groups, whose rates are written at every step."""
        return self.optimizer.param_groups

    @property
    def parameters(self) -> list[nn.Parameter]:
        """Return the method's parameters that are optimized."""
        return [parameter for group in self.shard_groups for parameter in group]

    def step(self) -> None:
        """Take a step with the gradients of the parameters; those without are left alone, and not counted."""
        masters: list[Tensor] = [master for group in self.param_groups for master in group["params"]]
        for parameter, master in zip(self.parameters, masters, strict=True):
            master.grad = None if parameter.grad is None else local(parameter.grad)
        self.optimizer.step()
        # It belongs to the parameter, which lets go of it.
        self.optimizer.zero_grad()

    def keep(self, names: Container[str]) -> None:
        """Let go of all parameter groups but those of these names."""
        kept = [group["name"] in names for group in self.param_groups]
        for group, stays in zip(self.param_groups, kept, strict=True):
            for master in () if stays else group["params"]:
                self.optimizer.state.pop(master, None)
        self.shard_groups = [group for group, stays in zip(self.shard_groups, kept, strict=True) if stays]
        self.param_groups[:] = [group for group, stays in zip(self.param_groups, kept, strict=True) if stays]
