"""Projection and prediction heads."""

from __future__ import annotations

from itertools import pairwise

from torch import nn

from pipeline.distributed import GlobalBatchNorm


def mlp_head(num_layers: int, in_dim: int, hidden_dim: int, out_dim: int) -> nn.Sequential:
    """Return MoCo-v3's head: linear layers without bias, batch norm after each, ReLU between.

    The last batch norm has neither scale nor shift. Linear layers keep PyTorch's default initialization.
    """
    widths = [in_dim, *[hidden_dim] * (num_layers - 1), out_dim]
    modules: list[nn.Module] = []
    for i, (fan_in, fan_out) in enumerate(pairwise(widths), start=1):
        modules.append(nn.Linear(fan_in, fan_out, bias=False))
        if i < num_layers:
            modules += [GlobalBatchNorm(fan_out), nn.ReLU()]
    return nn.Sequential(*modules, GlobalBatchNorm(out_dim, affine=False))
