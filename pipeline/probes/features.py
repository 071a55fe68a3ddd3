"""Features of a frozen encoder over a labelled set, never compressed."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from data.loader import Batch, Loader, LoaderConfig
from data.order import FixedOrder
from data.views import center_view
from pipeline.compression import Compression
from pipeline.distributed import World, gather
from pipeline.models.vit import ViT

BATCH_SIZE = 128
# The label of what does not count: samples that broke after sharding, and what fills the last share.
NONE = -1

# Images [B, 3, S, S] and their places [B] to features [B, D].
Encode = Callable[[Tensor, Tensor], Tensor]


def class_token(encoder: ViT) -> Encode:
    """Return the class token after the last norm as the features of an encoder."""
    return lambda images, index: encoder(images, Compression(), index)


@contextmanager
def resting(encoder: ViT) -> Iterator[None]:
    """Take an encoder out of training for a while."""
    training = encoder.training
    encoder.eval()
    try:
        yield
    finally:
        encoder.train(training)


def extract(
    encoder: ViT, config: LoaderConfig, ids: np.ndarray, world: World, *, title: str = ""
) -> tuple[Tensor, Tensor]:
    """Return fp32 features [N, D] and labels [N] of the given samples, on every process, in the order of the samples.

    Samples that broke after sharding, which the log names, are left out. Images are resized and cropped at the center.

    Raises:
        ValueError: the shards carry no labels.
    """
    return gathered(*extract_share(encoder, config, ids, world, title=title))


def gathered(features: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Return features [N, D] and labels [N] of all processes' shares, in the order of the samples, that count."""
    features, labels = _in_order(features), _in_order(labels)
    return features[labels != NONE], labels[labels != NONE]


def extract_share(
    encoder: ViT,
    config: LoaderConfig,
    ids: np.ndarray,
    world: World,
    encode: Encode | None = None,
    interpolation: str = "bicubic",
    *,
    title: str = "",
) -> tuple[Tensor, Tensor]:
    """Return fp32 features [n, D] and labels [n] of every `world.size`-th sample, with n alike on every process.

    What does not count has the label `NONE`. The features are the class token unless `encode` has others. With a title
    the main process shows on its terminal how far it is.

    Raises:
        ValueError: the shards carry no labels.
    """
    share = -(-len(ids) // world.size)
    mine = np.resize(ids, share * world.size)[world.rank :: world.size]
    view = replace(center_view(encoder.config.image_size), interpolation=interpolation)
    loader = Loader(config, [view], FixedOrder(mine), seed=0, batch_size=BATCH_SIZE, device=world.device)
    try:
        with resting(encoder):
            batches = _watched(loader.batches(stop=share), -(-share // BATCH_SIZE), title if world.is_main else "")
            features, labels = _encode(encode or class_token(encoder), batches, config.shards)
        # Replaced by others, which would count twice.
        labels[[loader.is_bad(int(sample)) for sample in mine]] = NONE
    finally:
        loader.close()
    filled = torch.arange(share, device=world.device) * world.size + world.rank >= len(ids)
    return features, labels.masked_fill(filled, NONE)


def _in_order(share: Tensor) -> Tensor:
    """Return what all processes have [W * n, ...], from every `W`-th of it [n, ...]."""
    everything = gather(share)
    return everything.view(-1, *share.shape).transpose(0, 1).flatten(0, 1)


def _watched(batches: Iterator[Batch], total: int, title: str) -> Iterator[Batch]:
    # On a terminal, if it has a name.
    return iter(tqdm(batches, desc=title, total=total, unit=" batches", disable=None if title else True))


@torch.no_grad()
def _encode(encode: Encode, batches: Iterable[Batch], shards: str) -> tuple[Tensor, Tensor]:
    features, labels = [], []
    for batch in batches:
        if batch.labels is None:
            raise ValueError(f"data.shards={shards} has no labels; give shards that were made from class folders.")
        features.append(encode(batch.views[0], batch.index).float())
        labels.append(batch.labels)
    return torch.cat(features), torch.cat(labels)
