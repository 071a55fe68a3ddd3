"""Projection and prediction heads."""

from __future__ import annotations

from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.distributed import GlobalBatchNorm, at_least_fp32


def mlp_head(num_layers: int, in_dim: int, hidden_dim: int, out_dim: int, *, last_scale: bool = False) -> nn.Sequential:
    """Return the head of MoCo-v3 and SimCLR: linear layers without bias, batch norm after each, ReLU between.

    The last batch norm has no shift, and a scale only if asked for. (A bias in front of a batch norm would do nothing.)
    Linear layers keep PyTorch's default initialization.
    """
    widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
    modules: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        modules.append(nn.Linear(fan_in, fan_out, bias=False))
        if i < num_layers:
            modules += [GlobalBatchNorm(fan_out), nn.ReLU()]
    last = GlobalBatchNorm(out_dim, affine=last_scale)
    if last_scale:
        last.bias.requires_grad_(False)
    return nn.Sequential(*modules, last)


def batch_statistics(head: nn.Module) -> list[int]:
    """Return how many numbers a process brings to each batch norm of a head: means and variances."""
    return [2 * module.num_features for module in head.modules() if isinstance(module, GlobalBatchNorm)]


class PrototypeHead(nn.Module):
    """DINO's head: three layers with GELU, a normalized bottleneck, its similarity to prototypes. [B, D] -> [B, K]."""

    def __init__(
        self,
        in_dim: int,
        hidden_dim: int,
        bottleneck_dim: int,
        num_prototypes: int,
        *,
        unit_norm: bool,
        batch_norm: bool = False,
    ) -> None:
        super().__init__()
        modules: list[nn.Module] = []
        for fan_in in (in_dim, hidden_dim):
            modules.append(nn.Linear(fan_in, hidden_dim))
            modules += [GlobalBatchNorm(hidden_dim), nn.GELU()] if batch_norm else [nn.GELU()]
        self.mlp = nn.Sequential(*modules, nn.Linear(hidden_dim, bottleneck_dim))
        for module in self.mlp:
            if isinstance(module, nn.Linear):
                nn.init.trunc_normal_(module.weight, std=0.02)
                nn.init.zeros_(module.bias)
        self.prototypes = Prototypes(bottleneck_dim, num_prototypes, unit_norm=unit_norm)

    def forward(self, features: Tensor) -> Tensor:
        """Return a logit for each prototype."""
        # From here on in fp32: at a temperature of 0.04 bf16's rounding of cosines would grow to percents.
        logits: Tensor = self.prototypes(F.normalize(at_least_fp32(self.mlp(features)), dim=1))
        return logits


class Prototypes(nn.Module):
    """A weight-normalized linear layer without bias: directions [K, D], and lengths [K, 1] unless they are 1."""

    def __init__(self, dim: int, num_prototypes: int, *, unit_norm: bool) -> None:
        super().__init__()
        self.direction = nn.Parameter(nn.Linear(dim, num_prototypes, bias=False).weight.detach().clone())
        self.length = None if unit_norm else nn.Parameter(torch.ones(num_prototypes, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Return the inner products [B, K] of fp32 rows [B, D] with the prototypes."""
        weight = F.normalize(at_least_fp32(self.direction), dim=1)
        if self.length is not None:
            weight = weight * self.length
        return F.linear(x, weight)
