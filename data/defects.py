"""What to do about samples that broke after sharding: name them, count them, end the run when they are too many."""

import io
import logging
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image

from data.dali import Encoded, ViewPipeline
from data.reader import Damage

log = logging.getLogger(__name__)


class Defects:
    """The broken samples that this process has met. More than ``limit`` end the run."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._samples: set[int] = set()

    def __len__(self) -> int:
        return len(self._samples)

    def __contains__(self, sample: int) -> bool:
        return sample in self._samples

    def add(self, damage: Damage) -> None:
        """Remember a broken sample and say so. Raises ValueError when it is one too many."""
        if damage.sample in self._samples:
            return
        self._samples.add(damage.sample)
        if len(self) > self._limit:
            raise ValueError(
                f"data.max_bad_samples: {len(self)} samples are broken, {self._limit} may be; "
                f"the last: {damage.message}."
            )
        log.warning("%s; the next good one takes its place (%d of at most %d)", damage.message, len(self), self._limit)


def find_undecodable(images: Sequence[NDArray[np.uint8]], device: torch.device) -> Iterator[int]:
    """Yield the positions of the images that DALI cannot decode, trying one at a time.

    Yields nothing when it cannot decode a sound image either: then the images are not to blame.
    """
    if _first_undecodable([_sound_image()], 0, device) is not None:
        return
    position = _first_undecodable(images, 0, device)
    while position is not None:
        yield position
        position = _first_undecodable(images, position + 1, device)


def _sound_image() -> NDArray[np.uint8]:
    encoded = io.BytesIO()
    Image.new("RGB", (16, 16), (90, 120, 200)).save(encoded, "JPEG")
    return np.frombuffer(encoded.getvalue(), np.uint8)


def _first_undecodable(images: Sequence[NDArray[np.uint8]], start: int, device: torch.device) -> int | None:
    encoded = (Encoded([image], (), np.zeros((1, 1), np.int64)) for image in images[start:])
    pipeline = ViewPipeline((), encoded.__next__, batch_size=1, device=device, threads=1, prefetch=1)
    try:
        for position in range(start, len(images)):
            try:
                next(pipeline)
            except RuntimeError:
                return position
    finally:
        pipeline.close()
    return None
