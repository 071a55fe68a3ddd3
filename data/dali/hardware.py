"""How much of the decoding the GPU's JPEG engine should do: measured, since it depends on GPU, threads and images."""

import logging
import time
from collections.abc import Sequence
from itertools import cycle, islice

import numpy as np
import torch
from numpy.typing import NDArray

from data.dali.pipeline import Decoding, Encoded, ViewPipeline

# NVIDIA's own tests use 0.11 to 0.12 with some 70 threads a GPU; with few threads the engine should do most of it.
SHARES = (0.0, 0.15, 0.3, 0.5, 0.75, 1.0)
_WARM_BATCHES, _TIMED_BATCHES = 3, 8

log = logging.getLogger(__name__)


def probe_hardware_share(
    images: Sequence[NDArray[np.uint8]],
    *,
    batch_size: int,
    device: torch.device,
    threads: int,
    largest: tuple[int, int] = (0, 0),
    shares: Sequence[float] = SHARES,
) -> float:
    """Return the share of the images for the JPEG engine at which decoding is fastest.

    images: encoded samples of the set, some hundreds of them for a fair mix; they are repeated to fill the batches.
    largest: height and width to reserve memory for. Takes a few seconds: each share decodes 11 batches.
    """
    rates = {}
    for share in shares:
        rates[share] = _rate(images, batch_size, device, threads, Decoding(share, largest))
    fastest = max(rates, key=rates.__getitem__)
    measured = ", ".join(f"{share:g}: {rate:.0f}" for share, rate in rates.items())
    log.info("JPEG engine's share of the decoding: %g (images/s by share: %s)", fastest, measured)
    return fastest


def _rate(
    images: Sequence[NDArray[np.uint8]], batch_size: int, device: torch.device, threads: int, decoding: Decoding
) -> float:
    """Return how many images are decoded per second."""
    endless, tags = cycle(images), np.zeros((batch_size, 1), np.int64)

    def source() -> Encoded:
        return Encoded(list(islice(endless, batch_size)), (), tags)

    pipeline = ViewPipeline((), source, batch_size=batch_size, device=device, threads=threads, decoding=decoding)
    try:
        _take(pipeline, _WARM_BATCHES, device)
        began = time.perf_counter()
        _take(pipeline, _TIMED_BATCHES, device)
        return _TIMED_BATCHES * batch_size / (time.perf_counter() - began)
    finally:
        pipeline.close()


def _take(pipeline: ViewPipeline, batches: int, device: torch.device) -> None:
    for _ in range(batches):
        next(pipeline)
    if device.type == "cuda":
        torch.cuda.synchronize(device)
