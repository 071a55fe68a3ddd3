"""FLOPs of parts of networks, by their shapes: a multiplication and its addition are two, and nothing else counts."""

from __future__ import annotations

from typing import Any

from torch import nn

from pipeline.compression import Compression
from pipeline.models.positions import Positions
from pipeline.models.vit import ViT


def linear_flops(module: nn.Module) -> int:
    """Return the FLOPs of one row through all linear layers of a module, each once."""
    # By their own account: at ZeRO 3 and under FSDP2 weights are elsewhere.
    return sum(2 * each.in_features * each.out_features for each in module.modules() if isinstance(each, nn.Linear))


def block_flops(block: nn.Module, length: int) -> int:
    """Return the FLOPs of a sequence through a transformer block."""
    return length * linear_flops(block) + attention_flops(block, length)


def attention_flops(block: nn.Module, length: int) -> int:
    """Return the FLOPs of queries by keys and of the result by values, in all attentions of a block."""
    attentions: list[Any] = [each for each in block.modules() if hasattr(each, "head_dim")]
    return sum(2 * 2 * length**2 * each.num_heads * each.head_dim for each in attentions)


def projection_flops(vit: ViT, image_size: int, compression: Compression) -> int:
    """Return the FLOPs of projecting the patches of one image that are kept."""
    config = vit.config
    kept = compression.keep(compression.num_patches(image_size, config.patch_size))
    channels: int = vit.patch.in_channels
    return 2 * kept * channels * compression.patch_size(config.patch_size) ** 2 * vit.embed_dim


def resizing_flops(vit: ViT, image_size: int, compression: Compression) -> tuple[int, int]:
    """Return the FLOPs of resizing the patch kernel and learned positions, which a call does once for all images."""
    config = vit.config
    base, size = config.patch_size, compression.patch_size(config.patch_size)
    kernel = 2 * vit.embed_dim * vit.patch.in_channels * base**2 * size**2 if size != base else 0
    places, own = compression.num_patches(image_size, base), config.grid**2
    resized = config.positions is Positions.learned and places != own
    return kernel, 2 * places * own * vit.embed_dim if resized else 0
