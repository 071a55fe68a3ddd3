"""Networks as training scripts of the field have them: convolution, whole images, PyTorch's batch and weight norm."""

from __future__ import annotations

import copy
import math
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from timm.layers import DropPath
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from pipeline.distributed import GlobalBatchNorm
from pipeline.models.heads import PrototypeHead
from pipeline.models.positions import Positions, sincos_positions
from pipeline.models.timm_backbone import create
from pipeline.models.vit import ViT


class PlainViT(nn.Module):
    """Images [B, 3, S, S] -> class tokens [B, D], through timm's layers, with the weights of one of ours."""

    def __init__(self, ours: ViT) -> None:
        super().__init__()
        theirs = create(replace(ours.config, weights="", stochastic_depth=0.0))
        self.patch, self.class_token = theirs.patch_embed.proj, theirs.cls_token
        self.norm_pre, self.blocks, self.norm = theirs.norm_pre, theirs.blocks, theirs.norm
        for name in ("patch", "norm_pre", "blocks", "norm"):
            getattr(self, name).load_state_dict(getattr(ours, name).state_dict())
        self.class_token.data.copy_(ours.class_token)
        self.positions = nn.Parameter(_positions(ours), requires_grad=ours.config.positions is Positions.learned)
        self.patch.requires_grad_(ours.patch.weight.requires_grad)
        self.grid = ours.config.grid

    def forward(self, images: Tensor) -> Tensor:
        """Encode images of one size."""
        tokens = self.patch(images).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.class_token.expand(len(images), -1, -1), tokens], 1)
        tokens = self.norm_pre(tokens + self._positions_of(tokens.shape[1] - 1))
        for block in self.blocks:
            tokens = block(tokens)
        features: Tensor = self.norm(tokens)[:, 0]
        return features

    def skip_branches(self, rate: float) -> None:
        """Let samples skip branches at random, the more the deeper: stochastic depth."""
        for each, block in zip(torch.linspace(0, rate, len(self.blocks)).tolist(), self.blocks, strict=True):
            block.drop_path1, block.drop_path2 = DropPath(each), DropPath(each)

    def _positions_of(self, count: int) -> Tensor:
        """Return the positions [1, 1 + count, D]; small crops have them interpolated at every call."""
        if count == self.grid**2:
            return self.positions
        grid = math.isqrt(count)
        table = self.positions[:, 1:].reshape(1, self.grid, self.grid, -1).permute(0, 3, 1, 2)
        resized = F.interpolate(table, size=(grid, grid), mode="bicubic", align_corners=False)
        return torch.cat([self.positions[:, :1], resized.flatten(2).transpose(1, 2)], 1)


class PlainPrototypeHead(nn.Module):
    """DINO's head, with the weights of one of ours."""

    def __init__(self, ours: PrototypeHead) -> None:
        super().__init__()
        self.mlp = plain_head(ours.mlp)
        count, width = ours.prototypes.direction.shape
        self.last = weight_norm(nn.Linear(width, count, bias=False))
        norm: Any = self.last.parametrizations["weight"]
        norm.original1.data.copy_(ours.prototypes.direction)
        norm.original0.data.copy_(torch.ones(count, 1) if ours.prototypes.length is None else ours.prototypes.length)
        norm.original0.requires_grad_(ours.prototypes.length is not None)

    def forward(self, features: Tensor) -> Tensor:
        """Return a logit for each prototype."""
        logits: Tensor = self.last(F.normalize(self.mlp(features), dim=-1))
        return logits


def plain_head(ours: nn.Sequential) -> nn.Sequential:
    """Return a head with PyTorch's own batch norm, running statistics included, and the weights of one of ours."""
    return nn.Sequential(*(_plain_norm(each) if isinstance(each, GlobalBatchNorm) else each for each in _copied(ours)))


def _copied(head: nn.Sequential) -> nn.Sequential:
    return copy.deepcopy(head).float()


def _plain_norm(ours: GlobalBatchNorm) -> nn.BatchNorm1d:
    theirs = nn.BatchNorm1d(ours.num_features, eps=ours.eps, affine=ours.affine)
    if ours.affine:
        theirs.load_state_dict(ours.state_dict(), strict=False)
        theirs.bias.requires_grad_(ours.bias.requires_grad)
    return theirs


def _positions(ours: ViT) -> Tensor:
    """Return all positions [1, 1 + patches, D], zero for a class token that has none."""
    grid, width = ours.config.grid, ours.embed_dim
    if ours.config.positions is Positions.learned:
        table = ours.positions.detach().float()
    else:
        table = sincos_positions(grid, grid, width, torch.device("cpu"), torch.float32)
    return torch.cat([torch.zeros(1 + grid**2 - len(table), width), table])[None]
