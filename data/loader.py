"""The loader: from a place in the run to batches of augmented views on the training device.

    order -> sample ids of this rank's share -> bytes, read ahead by threads -> DALI, ahead of the model -> Batch

Nothing forks, and nothing holds random state: `Loader.batches(start)` yields the same samples and pixels after a
restart, with other ranks, batch sizes or threads; only what stands for a broken sample depends on the batch size.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from data.dali import COLORS, Decoding, ViewPipeline, probe_hardware_share
from data.defects import Defects, find_undecodable
from data.feed import Feed, Share
from data.manifest import Manifest, SampleIndex
from data.order import FixedOrder, Order, ShuffledOrder, SubsetOrder, held_out
from data.reader import Reader, Sample
from data.resources import processes_here, share_of_cores, usual_prefetch
from data.staging import Originals, Stage, needs
from data.views import ViewSpec

_PROBED_IMAGES = 256

log = logging.getLogger(__name__)


@dataclass
class LoaderConfig:
    """shards: directory that `coldpress shard` wrote. device: where views are made.

    device "auto" means the GPU if the model is on one. color: how views change colors, "fused" (fast, the statistics
    of torchvision's) or "exact" (torchvision's pixels). threads of DALI: 0 = this process's share of the cores.
    prefetch: batches made ahead of the model, 0 = by their size. hardware_share: part of the images that a GPU's
    JPEG engine decodes, 0 to 1; -1 measures at each start what is fastest, so that lives of a run may differ in the
    last bit of a pixel. max_bad_samples: how many samples that broke after sharding each process may replace in one
    life before it gives up. staging: folder on a local disk for copies of the shards that are read next; the
    processes of a node share ``staging_gigabytes`` there. held_out: share of the samples, the same ones in every run,
    that a run does not learn from.
    """

    shards: str = ""
    device: str = "auto"
    color: str = "fused"
    threads: int = 0
    prefetch: int = 0
    hardware_share: float = -1.0
    max_bad_samples: int = 100
    staging: str = ""
    staging_gigabytes: float = 100.0
    held_out: float = 0.0

    def __post_init__(self) -> None:
        if self.device not in ("auto", "cpu", "gpu"):
            raise ValueError(f"data.device: must be auto, cpu or gpu, not {self.device!r}; leave it at auto.")
        if self.color not in COLORS:
            raise ValueError(f"data.color: must be {' or '.join(COLORS)}, not {self.color!r}; fused is fast.")
        if self.threads < 0:
            raise ValueError(f"data.threads: must be at least 0, not {self.threads}; 0 divides the cores.")
        if self.prefetch < 0:
            raise ValueError(f"data.prefetch: must be at least 0, not {self.prefetch}; 0 decides by the batch's size.")
        if not (self.hardware_share == -1 or 0 <= self.hardware_share <= 1):
            raise ValueError(f"data.hardware_share: must be 0 to 1, or -1 to measure, not {self.hardware_share:g}.")
        if self.max_bad_samples < 0:
            raise ValueError(f"data.max_bad_samples: must be at least 0, not {self.max_bad_samples}; 0 allows none.")
        if not 0 <= self.held_out < 1:
            raise ValueError(f"data.held_out: must be a share in [0, 1), not {self.held_out:g}; 0 holds nothing out.")
        if self.held_out and self.staging:
            raise ValueError("data.staging: must be empty with data.held_out, which leaves samples out of every shard.")
        if not self.staging_gigabytes > 0:
            raise ValueError(
                f"data.staging_gigabytes: must be above 0, not {self.staging_gigabytes:g}; leave data.staging empty "
                "for no copies."
            )


@dataclass(frozen=True)
class Batch:
    """This rank's share of a global batch, all on the training device.

    views: float32 [B, 3, S, S] each, normalized; labels: int64 [B], None for an unlabeled set;
    index: int64 [B], places in the run.
    """

    views: tuple[Tensor, ...]
    labels: Tensor | None
    index: Tensor


class Loader:
    """Batches of a sharded set, from any place in the run on.

    ``batch_size`` is global: rank r of R takes every R-th place of each global batch, from the r-th on. Without an
    order the set, without what is held out, is shuffled anew in every epoch, without end.
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
        self._config, self._specs, self._device = config, tuple(views), device
        self._batch_size, self._rank, self._world_size = batch_size, rank, world_size
        self._pipeline_device = _pipeline_device(config.device, device)
        self.manifest, index = _load(config.shards)
        self.classes: tuple[str, ...] = self.manifest.classes
        self.num_samples: int = self.manifest.samples
        self.wait_seconds = 0.0
        """Seconds the consumer has waited for batches so far."""
        self._order: Order = _order(config, index, seed) if order is None else order
        self._threads = config.threads or share_of_cores()
        self._prefetch = config.prefetch or usual_prefetch(batch_size // world_size, self._specs)
        self._defects = Defects(config.max_bad_samples)
        self._stage = _stage(config, index) if isinstance(self._order, ShuffledOrder) else Originals(index.paths)
        self._reader = Reader(index, self._stage.path)
        self._stage.on_eviction(self._reader.forget)
        self._feed = Feed(
            self._reader,
            self._order,
            self._specs,
            self._defects,
            seed=seed,
            batch_size=batch_size,
            ahead=self._prefetch,
        )

    @cached_property
    def _decoding(self) -> Decoding:
        """Say how the GPU decodes; a long run measures first what share of it the JPEG engine should do."""
        largest, share = (self.manifest.max_height, self.manifest.max_width), self._config.hardware_share
        if share < 0 and self._pipeline_device.type == "cuda" and not isinstance(self._order, FixedOrder):
            read = self._reader.read(range(min(self.num_samples, _PROBED_IMAGES)))
            images = [each.image for each in read if isinstance(each, Sample)]
            batch_size, threads = min(_PROBED_IMAGES, self._batch_size // self._world_size), self._threads
            share = probe_hardware_share(
                images, batch_size=batch_size, device=self._pipeline_device, threads=threads, largest=largest
            )
        return Decoding(share, largest) if share >= 0 else Decoding(largest=largest)

    @property
    def order(self) -> Order:
        """Return which sample is at which place."""
        return self._order

    @property
    def bad_samples(self) -> int:
        """Return how many samples this process found broken, and replaced, so far."""
        return len(self._defects)

    def is_bad(self, sample: int) -> bool:
        """Tell whether a sample was found broken, and replaced."""
        return sample in self._defects

    def batches(self, start: int = 0, stop: int | None = None) -> Iterator[Batch]:
        """Yield batches from global sample index ``start`` on, endlessly or up to ``stop``, exclusive.

        A fixed order ends by itself. The last batch may be short; it is shared as evenly as possible, and a rank
        with nothing left ends. Raises ValueError, naming shard and member, for one broken sample too many.
        """
        began = time.perf_counter()
        if isinstance(self._order, ShuffledOrder):
            self._stage.advance(start)
            self._stage.follow(needs(self._order, start, self._rank, self._world_size), horizon=self.num_samples)
        flow = self._open(start, stop)
        try:
            while True:
                try:
                    batch = self._next(flow)
                except RuntimeError as error:
                    flow.pipeline.close()
                    flow = self._open(self._restart(flow, error), stop)
                    continue
                self.wait_seconds += time.perf_counter() - began
                if batch is None:
                    return
                yield batch
                began = time.perf_counter()
        finally:
            flow.pipeline.close()

    def close(self) -> None:
        """Stop the reading threads and close the tars."""
        self._feed.close()
        self._reader.close()
        self._stage.close()

    def _open(self, start: int, stop: int | None) -> "_Flow":
        in_flight: deque[Share] = deque()
        source = self._feed.encoded(self._places(start, stop), in_flight)
        pipeline = ViewPipeline(
            self._specs,
            source.__next__,
            batch_size=self._batch_size // self._world_size,
            device=self._pipeline_device,
            threads=self._threads,
            prefetch=self._prefetch,
            color=self._config.color,
            decoding=self._decoding,
        )
        return _Flow(pipeline, in_flight)

    def _next(self, flow: "_Flow") -> Batch | None:
        try:
            views, tags = next(flow.pipeline)
        except StopIteration:
            return None
        self._stage.advance(int(flow.in_flight.popleft().places[0]))
        index, labels = tags.to(self._device).unbind(1)
        views = tuple(view.to(self._device, non_blocking=True) for view in views)
        return Batch(views, labels if self.classes else None, index)

    def _restart(self, flow: "_Flow", error: RuntimeError) -> int:
        """Find the images that broke a pipeline; return the place at which the next one starts.

        Raises the error again when no image is to blame.
        """
        known = len(self._defects)
        log.warning("decoding failed, looking for the image: %s", " ".join(str(error).split())[-200:])
        for share in flow.in_flight:
            samples = self._feed.samples(share)
            for position in find_undecodable([each.image for each in samples], self._pipeline_device):
                self._defects.add(self._reader.describe(samples[position].id, "it does not decode"))
        if len(self._defects) == known:
            raise error
        return int(flow.in_flight[0].places[0]) - self._rank

    def _places(self, start: int, stop: int | None) -> Iterator[NDArray[np.int64]]:
        """Yield this rank's places in each global batch."""
        if isinstance(self._order, FixedOrder):
            stop = min(len(self._order), len(self._order) if stop is None else stop)
        while stop is None or start < stop:
            size = self._batch_size if stop is None else min(self._batch_size, stop - start)
            if self._rank >= size:
                return
            yield np.arange(start + self._rank, start + size, self._world_size)
            start += size


@dataclass(frozen=True)
class _Flow:
    """A pipeline and the shares that went into it and have not come out yet."""

    pipeline: ViewPipeline
    in_flight: deque[Share]


def _order(config: LoaderConfig, index: SampleIndex, seed: int) -> Order:
    whole = ShuffledOrder(index.counts, seed)
    return SubsetOrder(whole, held_out(len(whole), config.held_out)[0]) if config.held_out else whole


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


def _stage(config: LoaderConfig, index: SampleIndex) -> Originals:
    if not config.staging:
        return Originals(index.paths)
    limit = int(config.staging_gigabytes * 1e9) // processes_here()
    return Stage(Path(config.staging), limit, index.paths, [shard.bytes for shard in index.manifest.shards])


def _check_batch_size(batch_size: int, world_size: int) -> None:
    if batch_size < 1 or batch_size % world_size:
        divisors = [n for n in range(1, batch_size + 1) if batch_size % n == 0] or [1]
        nearest = sorted(sorted(divisors, key=lambda n: abs(n - world_size))[:2])
        raise ValueError(
            f"batch_size: {batch_size} must be divisible by the number of processes, {world_size}; "
            f"start {' or '.join(map(str, nearest))} of them, "
            f"or a new run with batch_size={max(1, round(batch_size / world_size)) * world_size}."
        )


def _pipeline_device(choice: str, device: torch.device) -> torch.device:
    if choice == "gpu" and device.type != "cuda":
        raise ValueError(f"data.device: gpu needs a GPU, but this process trains on {device}; use auto.")
    return torch.device("cpu") if choice == "cpu" else device
