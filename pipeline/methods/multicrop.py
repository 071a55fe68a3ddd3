"""Views through a backbone with as few calls as there are shapes."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from pipeline.compression import Compression
from pipeline.methods.base import Batch
from pipeline.models.vit import Known, ViT

Group = tuple[tuple[int, ...], Compression]
"""Views that go through a backbone together, and the compression that they have in common."""


def encode(
    encoder: ViT,
    batch: Batch,
    compressions: Mapping[int, Compression],
    *,
    frozen_layers: int = 0,
    stochastic: bool = False,
    prefix: Mapping[Group, Known] | None = None,
) -> dict[int, Tensor]:
    """Return the features [B, D] of the given views, by their number in the batch.

    Views of equal resolution and compression, hence of equal patches and lengths, go through the backbone together;
    what is dropped at random still depends on the sample and the number of its view only. `prefix` is what
    `encode_prefix` returned for the same views.
    """
    features: dict[int, Tensor] = {}
    for group in _groups(batch, compressions):
        views, _ = group
        known = prefix.get(group) if prefix else None
        together = encoder(*_inputs(batch, group), frozen_layers, stochastic, known)
        features |= dict(zip(views, together.chunk(len(views)), strict=True))
    return features


def encode_prefix(
    encoder: ViT, batch: Batch, compressions: Mapping[int, Compression], layers: int
) -> dict[Group, Known]:
    """Return what comes out of the first layers of the backbone, for each group of views; nothing for no layers."""
    groups = _groups(batch, compressions) if layers else ()
    return {group: encoder.prefix(*_inputs(batch, group), layers) for group in groups}


def _inputs(batch: Batch, group: Group) -> tuple[Tensor, Compression, Tensor, Tensor]:
    views, compression = group
    images = torch.cat([batch.views[view] for view in views])
    streams = torch.cat([torch.full_like(batch.index, view) for view in views])
    return images, compression, batch.index.repeat(len(views)), streams


def _groups(batch: Batch, compressions: Mapping[int, Compression]) -> list[Group]:
    groups: dict[tuple[int, Compression], list[int]] = {}
    for view, compression in sorted(compressions.items(), key=lambda item: item[0]):
        groups.setdefault((batch.views[view].shape[-1], compression), []).append(view)
    return [(tuple(views), compression) for (_, compression), views in groups.items()]
