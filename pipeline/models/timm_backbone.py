"""Which Vision Transformer: its config, timm's model of that name, its weights, and what cannot be run."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import timm
import torch
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from timm.layers import PatchEmbed
from timm.models import load_state_dict
from timm.models.vision_transformer import Block, VisionTransformer, checkpoint_filter_fn
from torch import nn

from pipeline.compression import Compression
from pipeline.models.positions import Positions

# ViTConfig.weights that are no path.
TIMM_WEIGHTS = "timm"
# What a file may have beside a backbone, or lack: classifiers, and the norm that timm moves in front of some.
HEAD_KEYS = ("head", "fc_norm")
# timm's own where a name does not say.
USUAL_PATCH_SIZE = 16


@dataclass
class ViTConfig:
    """Which Vision Transformer, at which size."""

    name: str = "vit_base_patch16_224"
    image_size: int = 224
    # 0 is what the name says.
    patch_size: int = 0
    # Other than the named model's own: for small experiments.
    embed_dim: int | None = None
    depth: int | None = None
    num_heads: int | None = None
    positions: Positions = Positions.sincos
    # The share of samples that skip a branch of the last block while it learns; 0 at the first block, linear between.
    stochastic_depth: float = 0.0
    # Where training starts: "" is random, "timm" are timm's own weights of this name, else the path of a timm state
    # dict, .safetensors or .pth, which expects ImageNet's mean and deviation. Positions and kernels of other sizes are
    # resized as timm does.
    weights: str = ""
    # Compile the blocks, one graph for each shape, before the first step.
    compile: bool = False
    # The sequence whose forward costs one unit of budget: 197 = 224 pixels in patches of 16, plus class token.
    reference_length: int = 197

    def __post_init__(self) -> None:
        named = re.search(r"patch(\d+)", self.name)
        self.patch_size = self.patch_size or (int(named[1]) if named else USUAL_PATCH_SIZE)
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
        if not 0 <= self.stochastic_depth < 1:
            raise ValueError(
                f"model.stochastic_depth must be a rate in [0, 1), got {self.stochastic_depth:g}; DINO uses 0.1."
            )
        if self.weights and self.positions is not Positions.learned:
            raise ValueError(
                f"model.weights={self.weights} come with learned positions; "
                "say model.positions=learned, or leave out model.weights."
            )
        if self.weights == TIMM_WEIGHTS and self.changes:
            raise ValueError(
                f"model.weights={TIMM_WEIGHTS} are those of the named model, of its own sizes, "
                f"got {self.changes}; leave the sizes out, or model.weights."
            )

    @property
    def changes(self) -> dict[str, int]:
        """Return the sizes that are other than the named model's own."""
        asked = {"embed_dim": self.embed_dim, "depth": self.depth, "num_heads": self.num_heads}
        return {name: value for name, value in asked.items() if value is not None}

    @property
    def length(self) -> int:
        """Return the uncompressed sequence length, class token included."""
        return Compression().sequence_length(self.image_size, self.patch_size)

    @property
    def grid(self) -> int:
        """Return the patches on a side of the uncompressed image: the base grid of positions."""
        return self.image_size // self.patch_size


def create(config: ViTConfig) -> Any:
    """Return timm's model of that name and size, with the weights asked for and without a classifier.

    Raises:
        ValueError: timm does not know the name, cannot build the sizes or load the weights, or the model has
            parts that a compressed forward has no place for.
    """
    if config.weights not in ("", TIMM_WEIGHTS) and not Path(config.weights).is_file():
        raise ValueError(f"model.weights={config.weights} is no file; give a .safetensors, a .pth, or {TIMM_WEIGHTS}.")
    backbone = _build(config, pretrained=False)
    misfit = find_misfit(backbone)
    if not misfit and config.stochastic_depth and not all(type(block) is Block for block in backbone.blocks):
        misfit = f"has blocks that model.stochastic_depth={config.stochastic_depth:g} knows no branches of"
    if misfit:
        raise ValueError(
            f"model.name={config.name} {misfit}; take a plain ViT with a class token like vit_base_patch16_224."
        )
    if config.weights == TIMM_WEIGHTS:
        backbone = _build(config, pretrained=True)
        fold_normalization(backbone.patch_embed.proj, backbone.pretrained_cfg["mean"], backbone.pretrained_cfg["std"])
    elif config.weights:
        _load(backbone, config)
    return backbone


@torch.no_grad()
def fold_normalization(patch: nn.Conv2d, mean: Sequence[float], std: Sequence[float]) -> None:
    """Let a patch projection that expects pixels of another mean and deviation take those of ImageNet's, exactly.

    With x = (p - m) / s for pixels p: W x' + b = W (x s / s' + (m - m') / s') + b.
    """
    ours, theirs = ((IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD), (mean, std))
    (m, s), (other_m, other_s) = ((torch.tensor(each, dtype=torch.float64) for each in pair) for pair in (ours, theirs))
    weight = patch.weight.double()
    shift = (weight * ((m - other_m) / other_s)[:, None, None]).sum((1, 2, 3))
    if patch.bias is None and shift.any():
        patch.bias = nn.Parameter(torch.zeros_like(patch.weight[:, 0, 0, 0]))
    if patch.bias is not None:
        patch.bias += shift
    patch.weight.copy_(weight * (s / other_s)[:, None, None])


def find_misfit(backbone: Any) -> str:
    """Return what a compressed forward has no place for in a timm model, or nothing."""
    # Not isinstance: subclasses have other forwards (distillation tokens, for one).
    if type(backbone) is not VisionTransformer:
        return f"is timm's {type(backbone).__name__}, not its VisionTransformer"
    patch = backbone.patch_embed
    height, width = patch.patch_size
    findings = {
        "has no class token": backbone.cls_token is None,
        "has registers": backbone.reg_token is not None,
        "has no absolute positions": backbone.pos_embed is None,
        "has a patch embedding that is not one convolution": type(patch) is not PatchEmbed
        or not isinstance(patch.norm, nn.Identity),
        f"has patches of {height} x {width} pixels, which are not square": height != width,
    }
    return next((finding for finding, found in findings.items() if found), "")


def _build(config: ViTConfig, *, pretrained: bool) -> Any:
    try:
        return timm.create_model(
            config.name,
            pretrained=pretrained,
            img_size=config.image_size,
            patch_size=config.patch_size,
            num_classes=0,
            global_pool="token",
            **config.changes,
        )
    # Reading and downloading weights fails in more ways than timm, torch, safetensors and the hub list.
    except Exception as error:
        remedy = "take a name from timm.list_models('vit_*') and num_heads that divides embed_dim"
        raise _refusal(config, error, _other_weights(config) if pretrained else remedy) from error


def _load(backbone: Any, config: ViTConfig) -> None:
    """Load a file's weights, all of them: without a classifier timm itself passes over what it does not find."""
    try:
        weights = checkpoint_filter_fn(load_state_dict(config.weights), backbone, adapt_layer_scale=True)
        differences = _differences(backbone.state_dict(), weights)
        if not differences:
            backbone.load_state_dict(weights, strict=False)
    except Exception as error:
        raise _refusal(config, error, _other_weights(config)) from error
    if differences:
        raise ValueError(
            f"model.weights={config.weights} does not fit model.name={config.name} with "
            f"{config.changes or 'its own sizes'}: it {' and '.join(differences)}; {_other_weights(config)}."
        )


def _differences(wanted: dict[str, torch.Tensor], given: dict[str, Any]) -> list[str]:
    """Return in words what a file lacks, has too much or has in another shape, heads aside."""
    differing = {
        "lacks {}": [key for key in wanted if key not in given],
        "has {} too many": [key for key in given if key not in wanted],
        "has {} of another shape": [
            key for key in wanted if key in given and getattr(given[key], "shape", None) != wanted[key].shape
        ],
    }
    found = {how: [key for key in keys if not key.startswith(HEAD_KEYS)] for how, keys in differing.items()}
    return [how.format(_few(keys)) for how, keys in found.items() if keys]


def _few(keys: list[str]) -> str:
    return f"{len(keys)} keys ({', '.join(keys[:3])}{', ...' if len(keys) > 3 else ''})"


def _other_weights(config: ViTConfig) -> str:
    return f"take model.weights={config.weights} out, or weights of this very model"


def _refusal(config: ViTConfig, reason: object, remedy: str) -> ValueError:
    said = (str(reason).splitlines() or ["no"])[0].rstrip(".:")
    return ValueError(f"model.name={config.name} with {config.changes or 'its own sizes'}: timm says {said}; {remedy}.")
