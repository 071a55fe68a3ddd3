"""Light decoders that predict what lies under masked patches, at a scale of their own."""

from __future__ import annotations

import math
from functools import partial

import torch
from timm.layers import LayerNorm2d
from timm.models.vision_transformer import Block
from torch import Tensor, nn

from pipeline.models.initialization import xavier_uniform_linear
from pipeline.models.positions import sincos_positions

# As masked image models have it.
_LayerNorm = partial(nn.LayerNorm, eps=1e-6)


class PatchDecoder(nn.Module):
    """Visible tokens -> a prediction for every cell of the image: one block of width `dim`, then a convolutional head.

    Section 3.2 and Table 8 of Wang et al., 2023: the tokens between the patches' own are one learned mask token, told
    apart by fixed positions; 2^doublings cells lie along the side of a patch.
    """

    def __init__(self, in_dim: int, dim: int, heads: int, doublings: int, out_dim: int) -> None:
        super().__init__()
        self.dim = dim
        self.embed = nn.Linear(in_dim, dim)
        self.mask_token = nn.Parameter(torch.empty(1, 1, dim))
        self.block = Block(dim, heads, mlp_ratio=4.0, qkv_bias=True, norm_layer=_LayerNorm)
        self.norm = _LayerNorm(dim)
        self.predict = _prediction_head(dim, doublings, out_dim)
        nn.init.normal_(self.mask_token, std=0.02)
        xavier_uniform_linear(self)

    def forward(self, tokens: Tensor, visible: Tensor, grid: int) -> Tensor:
        """Return predictions [B, cells, out_dim] from tokens [B, 1 + V, D] of the visible patches [B, V] of a grid."""
        tokens = self.embed(tokens)
        class_token, patches = tokens[:, :1], tokens[:, 1:]
        place = visible[:, :, None].expand_as(patches)
        whole = self.mask_token.to(patches.dtype).expand(len(tokens), grid**2, -1).scatter(1, place, patches)
        whole = whole + sincos_positions(grid, grid, self.dim, tokens.device, tokens.dtype)
        decoded = self.norm(self.block(torch.cat([class_token, whole], 1)))[:, 1:]
        image = decoded.transpose(1, 2).unflatten(2, (grid, grid))
        predicted: Tensor = self.predict(image).flatten(2).transpose(1, 2)
        return predicted

    def weights_per_image(self, visible: int, grid: int) -> int:
        """Return the multiplications of one image by weights; attention's inner products are not counted."""
        linear = sum(p.numel() for p in self.block.parameters() if p.dim() == 2)
        total: int = (visible + 1) * self.embed.weight.numel() + (grid**2 + 1) * linear
        places = grid**2
        for module in self.predict:
            if isinstance(module, nn.AvgPool2d):
                assert isinstance(module.kernel_size, int)
                places //= module.kernel_size**2
            if isinstance(module, nn.Conv2d | nn.ConvTranspose2d):
                # A transposed convolution by two multiplies each input by all of its weights.
                total += places * module.weight.numel()
                places *= math.prod(module.stride)
        return total


def _prediction_head(dim: int, doublings: int, out_dim: int) -> nn.Sequential:
    """Return the layers that bring a grid of patches to the cells of a scale."""
    if doublings < 0:
        return nn.Sequential(nn.AvgPool2d(2**-doublings), nn.Conv2d(dim, out_dim, 1))
    modules: list[nn.Module] = []
    for number in range(doublings):
        if number:
            modules += [LayerNorm2d(dim, eps=1e-6), nn.GELU()]
        modules.append(nn.ConvTranspose2d(dim, dim // 2, 2, stride=2))
        dim //= 2
    return nn.Sequential(*modules, nn.Conv2d(dim, out_dim, 1))
