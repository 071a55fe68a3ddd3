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


def _uniform(weight: Tensor, fans: int) -> None:
    bound = math.sqrt(6 / fans)
    nn.init.uniform_(weight, -bound, bound)
