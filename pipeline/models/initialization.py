"""How weights start."""

from __future__ import annotations

import math

from torch import Tensor, nn

from pipeline.models.vit import ViT


def initialize_as_moco_v3(vit: ViT) -> None:
    """Initialize a backbone in place as Chen et al., 2021 do for ViTs.

    Xavier-uniform linear layers with Q, K and V counted as three matrices, zero biases, a class token of
    almost zero, and a uniform patch projection scaled for its fan-in and fan-out.
    """
    for name, module in vit.named_modules():
        if isinstance(module, nn.Linear):
            outputs = module.out_features // 3 if name.endswith("qkv") else module.out_features
            _uniform(module.weight, module.in_features + outputs)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.normal_(vit.class_token, std=1e-6)
    _uniform(vit.patch.weight, vit.patch.weight[0].numel() + vit.embed_dim)
    if vit.patch.bias is not None:
        nn.init.zeros_(vit.patch.bias)


def initialize_as_dino(vit: ViT) -> None:
    """Initialize a backbone in place as Caron et al., 2021 do.

    Truncated normal linear layers, class token and positions of standard deviation 0.02, zero biases, and PyTorch's
    own patch projection.
    """
    for module in vit.modules():
        if isinstance(module, nn.Linear):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
    nn.init.trunc_normal_(vit.class_token, std=0.02)
    if isinstance(vit.positions, nn.Parameter):
        nn.init.trunc_normal_(vit.positions, std=0.02)
    vit.patch.reset_parameters()


def initialize_as_localmim(vit: ViT) -> None:
    """Initialize a backbone in place as Wang et al., 2023 do, which is as He et al., 2022.

    Xavier-uniform linear layers and patch projection, zero biases but for the projection's, a class token of standard
    deviation 0.02.
    """
    xavier_uniform_linear(vit)
    nn.init.normal_(vit.class_token, std=0.02)
    nn.init.xavier_uniform_(vit.patch.weight.flatten(1))


def xavier_uniform_linear(network: nn.Module) -> None:
    """Initialize every linear layer in place: Xavier-uniform weights, zero biases."""
    for module in network.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            if module.bias is not None:
                nn.init.zeros_(module.bias)


def _uniform(weight: Tensor, fans: int) -> None:
    bound = math.sqrt(6 / fans)
    nn.init.uniform_(weight, -bound, bound)
