"""What supervised training does to whole batches: rectangles erased, images and their labels mixed.

Which samples are mixed depends on their places in the run only: any number of processes and any parts of a batch mix
the same ones.
"""

from __future__ import annotations

import math
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
import torch
from timm.data.mixup import Mixup, mixup_target
from torch import Tensor

from pipeline.models.stateless_random import normals, uniforms

# Of the erased rectangle: share of the image, and height over width; how often one is drawn that does not fit.
AREA, LEAST_ASPECT, TRIES = (0.02, 1 / 3), 0.3, 10
# Tell the random numbers apart from those of tokens and blocks, and from each other.
_RECTANGLES, _NOISE = 1 << 20, 1 << 21
# Noise of so many images at a time: eight bytes for every two of its numbers, several times over.
_CHUNK = 64


@dataclass(frozen=True)
class Mixing:
    """How images and labels are mixed: timm's mixup and cutmix, one of them for a whole batch, and label smoothing."""

    mixup: float
    cutmix: float
    smoothing: float
    classes: int

    @property
    def mixes(self) -> bool:
        """Return whether images are mixed at all."""
        return self.mixup > 0 or self.cutmix > 0

    def __call__(self, images: Tensor, labels: Tensor, seed: int, progress: float) -> tuple[Tensor, Tensor]:
        """Return mixed images [B, 3, S, S] and targets [B, classes]; each sample is mixed with that half a batch away.

        What is drawn is a pure function of seed and progress, and so the same on every process.
        """
        if not self.mixes:
            return images, mixup_target(labels, self.classes, smoothing=self.smoothing)
        mixup = Mixup(self.mixup, self.cutmix, label_smoothing=self.smoothing, num_classes=self.classes)
        # timm mixes the first with the last, the second with the last but one, and so on.
        first, second = torch.arange(len(labels), device=labels.device).chunk(2)
        ours = torch.cat([first, second.flip(0)])
        with _numpy_seeded(seed, progress):
            mixed, targets = mixup(images[ours], labels[ours])
        # The order is its own inverse.
        return mixed[ours], targets[ours]


@contextmanager
def _numpy_seeded(seed: int, progress: float) -> Iterator[None]:
    """Let numpy's global generator, from which timm draws, start anew for a while."""
    state = np.random.get_state()
    low, high = struct.unpack("<II", struct.pack("<d", progress))
    np.random.seed([seed & 0xFFFFFFFF, low, high])
    try:
        yield
    finally:
        np.random.set_state(state)


def erased(images: Tensor, index: Tensor, seed: int, probability: float) -> Tensor:
    """Return normalized images [B, 3, S, S], of some a rectangle replaced by normal noise (Zhong et al., 2020).

    A pure function of (seed, index) and, of an image that is not erased, nothing.
    """
    parts = zip(torch.split(images, _CHUNK), torch.split(index, _CHUNK), strict=True)
    return torch.cat([_erased(some, places, seed, probability) for some, places in parts])


def _erased(images: Tensor, index: Tensor, seed: int, probability: float) -> Tensor:
    size = images.shape[-1]
    top, left, height, width = rectangles(index, size, seed, probability).T[:, :, None]
    place = torch.arange(size, device=images.device)
    rows, columns = (place >= top) & (place < top + height), (place >= left) & (place < left + width)
    inside = rows[:, None, :, None] & columns[:, None, None, :]
    noise = normals(index, images[0].numel(), seed, _NOISE).view_as(images)
    return torch.where(inside, noise.to(images.dtype), images)


def rectangles(index: Tensor, size: int, seed: int, probability: float) -> Tensor:
    """Draw what is erased of each image: top, left, height, width in pixels, [B, 4]; a height of 0 is nothing.

    The law is timm's: the first of ten draws that is smaller than the image on both sides.
    """
    numbers = uniforms(index, torch.arange(1 + 4 * TRIES, device=index.device), seed, _RECTANGLES)
    area, aspect, top, left = numbers[:, 1:].view(-1, TRIES, 4).unbind(2)
    area = size**2 * (AREA[0] + (AREA[1] - AREA[0]) * area)
    aspect = torch.exp(math.log(LEAST_ASPECT) * (1 - 2 * aspect))
    height, width = torch.round((area * aspect).sqrt()), torch.round((area / aspect).sqrt())
    fits = (height < size) & (width < size)
    drawn = torch.stack([top * (size - height + 1), left * (size - width + 1), height, width], 2).floor()
    chosen = drawn[torch.arange(len(index), device=index.device), fits.int().argmax(1)]
    return chosen * ((numbers[:, 0] < probability) & fits.any(1))[:, None]
