"""The loader: from a place in the run to batches of augmented views on the training device.

    order -> sample ids of this rank's share -> bytes, read ahead by threads -> DALI, ahead of the model -> Batch

Nothing forks, and nothing holds random state: `Loader.batches(start)` yields the same samples and pixels after a
restart, with other ranks, batch sizes or threads.
"""

import os
import time
from collections import deque
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.dali import Encoded, ViewPipeline
from data.manifest import Manifest, SampleIndex
from data.order import FixedOrder, Order, ShuffledOrder
from data.reader import Reader, Sample
from data.views import ViewSpec, draw

# Reading waits for the file system rather than the processor, so more threads than cores are of use.
_READ_THREADS = 8
_SAMPLES_PER_READ = 16


@dataclass
class LoaderConfig:
    """shards: directory that `coldpress shard` wrote. device: where views are made.

    device "auto" means the GPU if the model is on one. threads of DALI: 0 = this process's share of the cores.
    prefetch: batches made ahead of the model.
    """

    shards: str = ""
    device: str = "auto"
    threads: int = 0
    prefetch: int = 2

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "gpu"):
            raise ValueError(f"data.device: must be auto, cpu or gpu, not {self.device!r}; leave it at auto.")
        if self.threads < 0:
            raise ValueError(f"data.threads: must be at least 0, not {self.threads}; 0 divides the cores.")
        if self.prefetch < 1:
            raise ValueError(f"data.prefetch: must be at least 1, not {self.prefetch}; 2 is usual.")


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch, all on the training device.

    views: float32 [B, 3, S, S] each, normalized; labels: int64 [B], None for an unlabeled set;
    index: int64 [B], places in the run.
    """

    views: tuple[Tensor, ...]
    labels: Tensor | None
    index: Tensor


@dataclass(frozen=True)
class _Reading:
    """A share whose samples are being read: places in the run, epochs and sample ids, each int64 [B]."""

    index: NDArray[np.int64]
    epoch: NDArray[np.int64]
    sample: NDArray[np.int64]
    chunks: list[Future[list[Sample]]]

    def result(self) -> list[Sample]:
        return [sample for chunk in self.chunks for sample in chunk.result()]


class Loader:
    """Batches of a sharded set, from any place in the run on.

    ``batch_size`` is global: rank r of R takes places [r * b, (r + 1) * b) of each global batch, b = batch_size
    / R. Without an order the set is shuffled anew in every epoch, without end.
    Raises ValueError for a missing or damaged set and for a batch size that ranks cannot share.
    """

    def __init__(
        self,
        config: LoaderConfig,
        views: Sequence[ViewSpec],
        order: Order | None = None,
        *,
        seed: int,
        batch_size: int,
        rank: int = 0,
        world_size: int = 1,
        device: torch.device,
    ) -> None:
        _check_batch_size(batch_size, world_size)
        self._config, self._specs, self._seed, self._device = config, tuple(views), seed, device
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._pipeline_device = _pipeline_device(config.device, device)
        self.manifest, index = _load(config.shards)
        self.classes: tuple[str, ...] = self.manifest.classes
        self.num_samples: int = self.manifest.samples
        self.wait_seconds = 0.0
        """Seconds the consumer has waited for batches so far."""
        self._order: Order = ShuffledOrder(index.counts, seed) if order is None else order
        self._reader = Reader(index)
        self._pool = ThreadPoolExecutor(_READ_THREADS, thread_name_prefix="read")

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield batches from global sample index ``start`` on, endlessly or up to ``stop``, exclusive.

        A fixed order ends by itself. The last batch may be short; it is shared as evenly as possible, and a rank
        with nothing left ends. Raises ValueError, naming shard and member, for a sample that cannot be decoded.
        """
        began = time.perf_counter()
        in_flight: deque[NDArray[np.int64]] = deque()
        source = self._encoded(self._shares(start, stop), in_flight)
        pipeline = self._pipeline(source)
        try:
            while True:
                batch = self._next(pipeline, in_flight)
                self.wait_seconds += time.perf_counter() - began
                if batch is None:
                    return
                yield batch
                began = time.perf_counter()
        finally:
            pipeline.close()

    def close(self) -> None:
        """Stop the reading threads and close the tars."""
        self._pool.shutdown(cancel_futures=True)
        self._reader.close()

    def _next(self, pipeline: ViewPipeline, in_flight: deque[NDArray[np.int64]]) -> Batch | None:
        try:
            views, tags = next(pipeline)
        except StopIteration:
            return None
        except RuntimeError as error:
            suspects = [int(sample) for share in in_flight for sample in share]
            raise self._reader.first_undecodable(suspects) or error from error
        in_flight.popleft()
        index, labels = tags.to(self._device).unbind(1)
        views = tuple(view.to(self._device, non_blocking=True) for view in views)
        return Batch(views, labels if self.classes else None, index)

    def _pipeline(self, source: Iterator[Encoded]) -> ViewPipeline:
        return ViewPipeline(
            self._specs,
            source.__next__,
            batch_size=self._batch_size // self._world_size,
            device=self._pipeline_device,
            threads=self._config.threads or _share_of_cores(),
            prefetch=self._config.prefetch,
        )

    def _shares(self, start: int, stop: int | None) -> Iterator[NDArray[np.int64]]:
        """Yield this rank's places in each global batch."""
        if isinstance(self._order, FixedOrder):
            stop = min(len(self._order), len(self._order) if stop is None else stop)
        while stop is None or start < stop:
            size = self._batch_size if stop is None else min(self._batch_size, stop - start)
            low, high = (rank * size // self._world_size for rank in (self._rank, self._rank + 1))
            if low == high:
                return
            yield np.arange(start + low, start + high)
            start += size

    def _encoded(self, shares: Iterator[NDArray[np.int64]], in_flight: deque[NDArray[np.int64]]) -> Iterator[Encoded]:
        """Yield what DALI needs for each share, while the next ``prefetch`` shares are being read."""
        ahead: deque[_Reading] = deque()
        for share in shares:
            ahead.append(self._start_reading(share))
            if len(ahead) > self._config.prefetch:
                in_flight.append(ahead[0].sample)
                yield self._encode(ahead.popleft())
        for reading in ahead:
            in_flight.append(reading.sample)
            yield self._encode(reading)

    def _start_reading(self, index: NDArray[np.int64]) -> _Reading:
        epoch, sample = self._order.place(index)
        ids = sample.tolist()
        chunks = [ids[k : k + _SAMPLES_PER_READ] for k in range(0, len(ids), _SAMPLES_PER_READ)]
        return _Reading(index, epoch, sample, [self._pool.submit(self._reader.read, ids) for ids in chunks])

    def _encode(self, reading: _Reading) -> Encoded:
        samples = reading.result()
        heights, widths = np.array([(each.height, each.width) for each in samples]).T
        rows = tuple(
            draw(
                spec,
                seed=self._seed,
                epoch=reading.epoch,
                sample=reading.sample,
                view=view,
                heights=heights,
                widths=widths,
            )
            for view, spec in enumerate(self._specs)
        )
        labels = np.array([each.label for each in samples], np.int64)
        return Encoded([each.image for each in samples], rows, np.stack([reading.index, labels], axis=1))


def _load(shards: str) -> tuple[Manifest, SampleIndex]:
    if not shards:
        raise ValueError("data.shards: missing; give the directory that `coldpress shard` wrote.")
    directory = Path(shards)
    if not directory.is_dir():
        raise ValueError(f"data.shards: no directory {shards}; give the one that `coldpress shard` wrote.")
    manifest = Manifest.load(directory)
    if not manifest.samples:
        raise ValueError(f"data.shards: {shards} holds no samples; shard a source that has images.")
    return manifest, SampleIndex.load(directory, manifest)


def _check_batch_size(batch_size: int, world_size: int) -> None:
    if batch_size < 1 or batch_size % world_size:
        raise ValueError(
            f"batch_size: {batch_size} must be divisible by the number of processes, {world_size}; "
            f"try {max(1, round(batch_size / world_size)) * world_size}."
        )


def _pipeline_device(choice: str, device: torch.device) -> torch.device:
    if choice == "gpu" and device.type != "cuda":
        raise ValueError(f"data.device: gpu needs a GPU, but this process trains on {device}; use auto.")
    return torch.device("cpu") if choice == "cpu" else device


def _share_of_cores() -> int:
    """Return the cores for this process: those that Slurm bound it to, else its share of the node's."""
    cores = len(os.sched_getaffinity(0))
    if "SLURM_PROCID" in os.environ and cores < (os.cpu_count() or 1):
        return cores
    # torchrun sets the one, DeepSpeed's launcher the other.
    processes = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"
    return max(1, cores // int(processes))
