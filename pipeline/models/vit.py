"""A timm Vision Transformer that takes a Compression and a frozen prefix."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from pipeline.compression import Compression
from pipeline.models.blocks import CompiledBlocks, EagerBlocks
from pipeline.models.patches import resize_kernel, take_patches
from pipeline.models.positions import Positions, resize_positions, sincos_positions
from pipeline.models.stateless_random import random_subset, residual_scales
from pipeline.models.timm_backbone import ViTConfig, create

__all__ = ["Positions", "ViT", "ViTConfig"]


@dataclass(frozen=True)
class Known:
    """The tokens [B, 1 + kept, D] after so many layers, of which the embedding is the first."""

    layers: int
    tokens: Tensor


class ViT(nn.Module):
    """Images [B, 3, S, S] -> the class token after the last norm, [B, D].

    Layers in freezing order: 0 is everything before the blocks (patch projection, class token, positions, CLIP's first
    norm), then the blocks. The master patch kernel keeps its own size; other sizes are resized from it at
    each use, and learned positions likewise. Fixed positions are no parameter: then `positions` is empty.
    """

    def __init__(self, config: ViTConfig, seed: int) -> None:
        """Build the backbone by its timm name.

        Raises:
            ValueError: timm does not know the name, cannot build the sizes or load the weights, or the model is not a
                plain ViT.
        """
        super().__init__()
        self.config = config
        self.seed = seed
        backbone = create(config)
        self.embed_dim: int = backbone.embed_dim
        self.patch = backbone.patch_embed.proj
        self.class_token = backbone.cls_token
        self.positions: Tensor = torch.empty(0, self.embed_dim)
        if config.positions is Positions.learned:
            self.positions = nn.Parameter(backbone.pos_embed.detach()[0])
        elif self.embed_dim % 4:
            raise ValueError(
                f"model.name={config.name}: sine-cosine positions need a width divisible by 4, "
                f"got {self.embed_dim}; say model.positions=learned."
            )
        self.norm_pre = backbone.norm_pre
        self.blocks = backbone.blocks
        self.norm = backbone.norm
        self.run_block = CompiledBlocks() if config.compile else EagerBlocks()

    @property
    def num_layers(self) -> int:
        """Return the number of layers that can freeze: the embedding and every block."""
        return len(self.blocks) + 1

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each layer in freezing order."""
        embedding = [*self.patch.parameters(), self.class_token, *self.norm_pre.parameters()]
        if isinstance(self.positions, nn.Parameter):
            embedding.append(self.positions)
        return [embedding, *(list(block.parameters()) for block in self.blocks)]

    def forward(
        self,
        images: Tensor,
        compression: Compression,
        index: Tensor,
        stream: int | Tensor = 0,
        frozen_layers: int = 0,
        stochastic: bool = False,
        known: Known | None = None,
    ) -> Tensor:
        """Encode images [B, 3, S, S] of global sample indices [B]; the frozen prefix records no graph.

        `stream` tells the views of a sample apart: one number, or one for each image [B] where views come together.
        `stochastic` turns stochastic depth on in blocks that learn. It has nothing to do with training mode, in which a
        momentum encoder stays, too. `known` is what `prefix` returned: the first layers, computed before.

        Raises:
            ValueError: the patch size does not divide S.
        """
        last = len(self.blocks)
        tokens = self.tapped(images, compression, index, [last], stream, frozen_layers, stochastic, known)[last]
        features: Tensor = self.norm(tokens[:, 0])
        return features

    def tapped(
        self,
        images: Tensor,
        compression: Compression,
        index: Tensor,
        blocks: Sequence[int],
        stream: int | Tensor = 0,
        frozen_layers: int = 0,
        stochastic: bool = False,
        known: Known | None = None,
    ) -> dict[int, Tensor]:
        """Return the tokens [B, 1 + kept, D] after some blocks, counted from 1; the rest is as in `forward`."""
        scales: list[Tensor | None] = [None] * len(self.blocks)
        if stochastic and self.config.stochastic_depth:
            scales = [*residual_scales(index, self.config.stochastic_depth, len(self.blocks), self.seed, stream)]
        if known is None:
            with torch.set_grad_enabled(torch.is_grad_enabled() and frozen_layers == 0):
                known = Known(1, self.embed(images, compression, index, stream))
        tokens, found = known.tokens, {}
        for i in range(known.layers, len(self.blocks) + 1):
            # A frozen block is as in evaluation: it does not skip branches.
            learns = i >= frozen_layers
            with torch.set_grad_enabled(torch.is_grad_enabled() and learns):
                tokens = self.run_block(self.blocks[i - 1], tokens, scales[i - 1] if learns else None)
            if i in blocks:
                found[i] = tokens
        return found

    @torch.no_grad()
    def prefix(
        self, images: Tensor, compression: Compression, index: Tensor, stream: int | Tensor, layers: int
    ) -> Known:
        """Return what comes out of the first layers, at least the embedding, as they are in evaluation."""
        tokens = self.embed(images, compression, index, stream)
        for block in self.blocks[: layers - 1]:
            tokens = self.run_block(block, tokens, None)
        return Known(layers, tokens)

    def chosen(
        self, index: Tensor, compression: Compression, image_size: int, stream: int | Tensor = 0
    ) -> Tensor | None:
        """Return which patches [B, kept] of the samples enter the blocks, in rising order; None for all."""
        count = compression.num_patches(image_size, self.config.patch_size)
        keep = compression.keep(count)
        return random_subset(index, count, keep, self.seed, stream) if keep < count else None

    def embed(self, images: Tensor, compression: Compression, index: Tensor, stream: int | Tensor) -> Tensor:
        """Return the blocks' input [B, 1 + kept, D]. Dropped tokens are never projected."""
        size = compression.patch_size(self.config.patch_size)
        count = compression.num_patches(images.shape[-1], self.config.patch_size)
        chosen = self.chosen(index, compression, images.shape[-1], stream)
        kernel = resize_kernel(self.patch.weight, size).flatten(1)
        patches = take_patches(images, size, chosen).to(kernel.dtype)
        tokens = F.linear(patches, kernel, self.patch.bias)
        tokens = tokens + self._patch_positions(math.isqrt(count), chosen, tokens)
        tokens = torch.cat([self._placed_class_token().expand(len(images), -1, -1), tokens], 1)
        embedded: Tensor = self.norm_pre(tokens)
        return embedded

    def _patch_positions(self, grid: int, chosen: Tensor | None, tokens: Tensor) -> Tensor:
        """Return the positions of all patches of a grid, [grid^2, D], or of the chosen ones, [B, kept, D]."""
        if isinstance(self.positions, nn.Parameter):
            table = resize_positions(self.positions[-(self.config.grid**2) :], grid)
        else:
            table = sincos_positions(grid, self.config.grid, self.embed_dim, tokens.device, tokens.dtype)
        # F.embedding, since the backward of table[chosen] adds up in no fixed order on several CPU threads.
        return (table if chosen is None else F.embedding(chosen, table)).to(tokens.dtype)

    def _placed_class_token(self) -> Tensor:
        """Return the class token [1, 1, D], with its position if it has one: none in DeiT-3, zero if fixed."""
        position = self.positions[: -(self.config.grid**2)]
        token: Tensor = self.class_token
        return token + position if len(position) else token
