"""Views through a backbone with as few calls as there are shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping

import torch
from torch import Tensor

from pipeline.compression import Compression
from pipeline.methods.base import Batch
from pipeline.models.vit import ViT


def encode(
    encoder: ViT,
    batch: Batch,
    compressions: Mapping[int, Compression],
    *,
    frozen_layers: int = 0,
    stochastic: bool = False,
) -> dict[int, Tensor]:
    """Return the features [B, D] of the given views, by their number in the batch.

    Views of equal resolution and compression, hence of equal patches and lengths, go through the backbone together;
    what is dropped at random still depends on the sample and the number of its view only.
    """
    features: dict[int, Tensor] = {}
    for group, compression in _groups(batch, compressions):
        together = encoder(
            torch.cat([batch.views[view] for view in group]),
            compression,
            batch.index.repeat(len(group)),
            torch.cat([torch.full_like(batch.index, view) for view in group]),
            frozen_layers,
            stochastic,
        )
        features |= dict(zip(group, together.chunk(len(group)), strict=True))
    return features


def _groups(batch: Batch, compressions: Mapping[int, Compression]) -> Iterable[tuple[list[int], Compression]]:
    groups: dict[tuple[int, Compression], list[int]] = {}
    for view, compression in compressions.items():
        groups.setdefault((batch.views[view].shape[-1], compression), []).append(view)
    return ((views, compression) for (_, compression), views in groups.items())
