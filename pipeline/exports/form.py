"""The patches and the images that an export is for, and what they make of an encoder's first layer."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from pipeline.exports.encoder import Encoder
from pipeline.models.patches import resize_kernel
from pipeline.models.positions import Positions, resize_positions, sincos_positions
from pipeline.models.vit import ViTConfig


@dataclass(frozen=True)
class Form:
    """Pixels along the side of a patch, and of an image."""

    patch_size: int
    image_size: int

    @property
    def grid(self) -> int:
        """Return the patches along the side of an image."""
        return self.image_size // self.patch_size

    def is_own(self, config: ViTConfig) -> bool:
        """Return whether the encoder was trained in this form."""
        return (self.patch_size, self.image_size) == (config.patch_size, config.image_size)


def form_of(config: ViTConfig, patch_size: int, image_size: int) -> Form:
    """Return the form that was asked for; 0 is the encoder's own.

    Raises:
        ValueError: the patches leave pixels over.
    """
    form = Form(patch_size or config.patch_size, image_size or config.image_size)
    if form.image_size % form.patch_size:
        whole = max(1, round(form.image_size / form.patch_size)) * form.patch_size
        fitting = [s for s in range(config.patch_size, form.image_size + 1) if form.image_size % s == 0]
        raise ValueError(
            f"patch_size must divide image_size={form.image_size}, got {form.patch_size}; say image_size={whole}, "
            f"or one of patch_size={', '.join(map(str, fitting))}."
        )
    return form


def kernel(encoder: Encoder, form: Form) -> Tensor:
    """Return the patch kernel [D, 3, p, p], resized from the master as at each use in training."""
    return resize_kernel(encoder.tensor("patch.weight"), form.patch_size)


def positions(encoder: Encoder, form: Form, rows: int, *, with_bias: bool) -> Tensor:
    """Return the positions [rows, D] of the patches, after one of the class token where there is room for it.

    `with_bias` adds the bias of the patch projection, for models whose projection has none.
    """
    vit, base, count = encoder.vit, encoder.config.grid, form.grid**2
    if encoder.config.positions is Positions.learned:
        own = encoder.tensor("positions")
        before, table = own[: -(base**2)], resize_positions(own[-(base**2) :], form.grid)
    else:
        # The class token has none, which is to say zero.
        before = torch.zeros(rows - count, vit.embed_dim)
        table = sincos_positions(form.grid, base, vit.embed_dim, torch.device("cpu"), torch.float32)
    if with_bias and "patch.bias" in encoder.shapes():
        table = table + encoder.tensor("patch.bias")
    together = torch.cat([before, table])
    assert len(together) == rows
    return together
