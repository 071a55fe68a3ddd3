"""The peer: the webdataset library, torchvision's transforms, PyTorch's DataLoader with one thread per worker."""

from __future__ import annotations

import io
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import webdataset
from PIL import Image
from torch import Tensor
from torch.utils.data import DataLoader
from torchvision.io import ImageReadMode, decode_jpeg

from data.views import ViewSpec
from pipeline.benchmarks.peers.transforms import Transform, v1_pil, v2_pil, v2_tensor
from pipeline.benchmarks.timing import Stream

# Samples that each worker holds back to mix them, as usual in the library's examples.
_SHUFFLE = 1000
# Batches that each worker makes ahead: PyTorch's default.
AHEAD_OF_WORKERS = 2


def _pil(content: bytes) -> Image.Image:
    return Image.open(io.BytesIO(content)).convert("RGB")


def _tensor(content: bytes) -> Tensor:
    image: Tensor = decode_jpeg(torch.frombuffer(bytearray(content), dtype=torch.uint8), mode=ImageReadMode.RGB)
    return image


# What published training scripts have.
V1_ON_PIL = "webdataset + torchvision v1 on PIL"
# The ways in use, none of which is the fastest everywhere: name -> decoder and transforms.
VARIANTS: dict[str, tuple[Callable[[bytes], Any], Callable[[ViewSpec], Transform]]] = {
    V1_ON_PIL: (_pil, v1_pil),
    "webdataset + torchvision v2 on PIL": (_pil, v2_pil),
    "webdataset + torchvision v2 on tensors": (_tensor, v2_tensor),
}


class _Views:
    """Decode an image once and make all its views."""

    def __init__(self, variant: str, specs: Sequence[ViewSpec]) -> None:
        self.decode, transform = VARIANTS[variant]
        self.transforms = [transform(spec) for spec in specs]

    def __call__(self, sample: dict[str, Any]) -> tuple[Tensor, ...]:
        image = self.decode(sample["jpg"])
        return tuple(transform(image) for transform in self.transforms)


def webdataset_batches(
    variant: str,
    tars: Sequence[Path],
    specs: Sequence[ViewSpec],
    *,
    batch_size: int,
    workers: int,
    pin_memory: bool = False,
) -> Stream:
    """Yield batches of views, float32 [B, 3, S, S] per spec, for ever; every epoch in an order of its own.

    Needs as many tars as workers, since the library deals out whole tars.
    """
    assert len(tars) >= workers, (len(tars), workers)
    dataset = (
        webdataset.WebDataset([str(tar) for tar in tars], shardshuffle=len(tars))
        .shuffle(_SHUFFLE)
        .map(_Views(variant, specs))
        .repeat()
    )
    loader: DataLoader[tuple[Tensor, ...]] = DataLoader(
        dataset,
        batch_size,
        num_workers=workers,
        prefetch_factor=AHEAD_OF_WORKERS,
        pin_memory=pin_memory,
        worker_init_fn=_one_thread,
        multiprocessing_context="fork",
    )
    yield from loader


def _one_thread(worker: int) -> None:
    torch.set_num_threads(1)
