"""A timm Vision Transformer that takes a Compression and a frozen prefix."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import timm
import torch
from torch import Tensor, nn

from pipeline.compression import Compression
from pipeline.models.patches import random_subset, resize_kernel, sincos_positions, take_patches


@dataclass
class ViTConfig:
    """Which Vision Transformer, at which size."""

    name: str = "vit_base_patch16_224"
    image_size: int = 224
    patch_size: int = 16
    # Other than the named model's own: for small experiments.
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    # The sequence whose forward costs one unit of budget: 197 = 224 pixels in patches of 16, plus class token.
    reference_length: int = 197

    def __post_init__(self) -> None:
        sizes = ("image_size", "patch_size", "embed_dim", "depth", "num_heads", "reference_length")
        for name in sizes:
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"model.{name} must be at least 1, got {value}.")
        if self.image_size % self.patch_size:
            raise ValueError(
                f"model.patch_size must divide model.image_size={self.image_size}, got {self.patch_size}; "
                f"try {self.image_size // self.patch_size * self.patch_size} pixels."
            )

    @property
    def length(self) -> int:
        """Return the uncompressed sequence length, class token included."""
        return Compression().sequence_length(self.image_size, self.patch_size)


class ViT(nn.Module):
    """Images [B, 3, S, S] -> the class token after the last norm, [B, D].

    Layers in freezing order: 0 is the patch projection with class token and positions, then the blocks. The
    master patch kernel keeps its own size; other sizes are resized from it at each use.
    """

    def __init__(self, config: ViTConfig, seed: int) -> None:
        """Build the backbone by its timm name.

        Raises:
            ValueError: timm does not know the name or cannot build the sizes, or the model is not a plain ViT.
        """
        super().__init__()
        self.config = config
        self.seed = seed
        backbone = _create(config)
        self.patch = backbone.patch_embed.proj
        self.class_token = backbone.cls_token
        self.blocks = backbone.blocks
        self.norm = backbone.norm
        self.embed_dim: int = backbone.embed_dim
        if self.embed_dim % 4:
            raise ValueError(f"model.name={config.name}: sine-cosine positions need a width divisible by 4.")

    @property
    def num_layers(self) -> int:
        """Return the number of layers that can freeze: the embedding and every block."""
        return len(self.blocks) + 1

    def layers(self) -> list[list[nn.Parameter]]:
        """Return the parameters of each layer in freezing order."""
        embedding = [*self.patch.parameters(), self.class_token]
        return [embedding, *(list(block.parameters()) for block in self.blocks)]

    def forward(
        self,
        images: Tensor,
        compression: Compression,
        index: Tensor,
        stream: int | Tensor = 0,
        frozen_layers: int = 0,
        stochastic: bool = False,
    ) -> Tensor:
        """Encode images [B, 3, S, S] of global sample indices [B]; the frozen prefix records no graph."""
        with torch.set_grad_enabled(torch.is_grad_enabled() and frozen_layers == 0):
            tokens = self.embed(images, compression, index, stream)
        for i, block in enumerate(self.blocks, start=1):
            with torch.set_grad_enabled(torch.is_grad_enabled() and frozen_layers <= i):
                tokens = block(tokens)
        features: Tensor = self.norm(tokens[:, 0])
        return features

    def embed(self, images: Tensor, compression: Compression, index: Tensor, stream: int | Tensor) -> Tensor:
        """Return the blocks' input [B, 1 + kept, D]. Dropped tokens are never projected."""
        size = compression.patch_size(self.config.patch_size)
        count = compression.num_patches(images.shape[-1], self.config.patch_size)
        keep = compression.keep(count)
        chosen = random_subset(index, count, keep, self.seed, stream) if keep < count else None
        kernel = resize_kernel(self.patch.weight, size).flatten(1)
        patches = take_patches(images, size, chosen).to(kernel.dtype)
        tokens = nn.functional.linear(patches, kernel, self.patch.bias)
        positions = sincos_positions(
            math.isqrt(count),
            images.shape[-1] // self.config.patch_size,
            self.embed_dim,
            tokens.device,
            tokens.dtype,
        )
        tokens = tokens + (positions if chosen is None else positions[chosen])
        # The class token has position zero.
        return torch.cat([self.class_token.expand(len(images), -1, -1), tokens], 1)


def _create(config: ViTConfig) -> Any:
    asked = {"embed_dim": config.embed_dim, "depth": config.depth, "num_heads": config.num_heads}
    changes = {name: value for name, value in asked.items() if value is not None}
    try:
        backbone = timm.create_model(
            config.name,
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=0,
            global_pool="token",
            **changes,
        )
    except (RuntimeError, TypeError, AssertionError) as error:
        raise ValueError(
            f"model.name={config.name} with {changes or 'its own sizes'}: timm says {str(error) or 'no'}; "
            "take a name from timm.list_models('vit_*') and num_heads that divides embed_dim."
        ) from error
    plain = isinstance(backbone, timm.models.VisionTransformer) and backbone.cls_token is not None
    if not plain or not isinstance(backbone.norm_pre, nn.Identity) or backbone.reg_token is not None:
        raise ValueError(
            f"model.name={config.name} is not a plain ViT with a class token; take one like vit_base_patch16_224."
        )
    return backbone
