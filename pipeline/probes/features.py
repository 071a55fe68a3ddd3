"""Features of a frozen encoder over a labelled set, never compressed."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import torch
from torch import Tensor

from data.loader import Batch, Loader, LoaderConfig
from data.order import FixedOrder
from data.views import center_view
from pipeline.compression import Compression
from pipeline.distributed import World, gather
from pipeline.models.vit import ViT

BATCH_SIZE = 128
BROKEN = -1


def extract(encoder: ViT, config: LoaderConfig, ids: np.ndarray, world: World) -> tuple[Tensor, Tensor]:
    """Return fp32 features [N, D] and labels [N] of the given samples, on every process.

    Each process encodes its share; up to `world.size - 1` trailing samples are left out so that all
    shares are equal, and samples that broke after sharding, which the log names. Images are resized and cropped
    at the center.

    Raises:
        ValueError: the shards carry no labels.
    """
    mine = ids[: len(ids) // world.size * world.size].reshape(-1, world.size)[:, world.rank]
    loader = Loader(
        config,
        [center_view(encoder.config.image_size)],
        FixedOrder(mine),
        seed=0,
        batch_size=BATCH_SIZE,
        device=world.device,
    )
    try:
        features, labels = _encode(encoder, loader.batches(stop=len(mine)), config.shards)
        # Replaced by others, which would count twice. Not left out before all processes have gathered equal shares.
        labels[[loader.is_bad(int(sample)) for sample in mine]] = BROKEN
    finally:
        loader.close()
    features, labels = gather(features), gather(labels)
    return features[labels != BROKEN], labels[labels != BROKEN]


@torch.no_grad()
def _encode(encoder: ViT, batches: Iterable[Batch], shards: str) -> tuple[Tensor, Tensor]:
    training = encoder.training
    encoder.eval()
    features, labels = [], []
    try:
        for batch in batches:
            if batch.labels is None:
                raise ValueError(f"data.shards={shards} has no labels; k-NN needs shards made from class folders.")
            features.append(encoder(batch.views[0], Compression(), batch.index).float())
            labels.append(batch.labels)
    finally:
        encoder.train(training)
    return torch.cat(features), torch.cat(labels)
