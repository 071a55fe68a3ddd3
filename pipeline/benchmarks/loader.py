"""CPU time per image: our loader against DALI's own readers and against webdataset with torchvision, in turn."""

from __future__ import annotations

import logging
import os
import tempfile
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch

from data.dali import COLORS
from data.dali.view import view_inputs
from data.defects import Defects
from data.feed import Feed
from data.loader import Loader, LoaderConfig
from data.manifest import SampleIndex
from data.order import ShuffledOrder
from data.reader import Reader, Sample
from data.recipes import dino_views, localmim_views, moco_views, simclr_views
from data.resources import share_of_cores
from data.views import ViewSpec
from pipeline.benchmarks.peers.dali_reader import file_reader_batches, webdataset_reader_batches
from pipeline.benchmarks.peers.webdataset_torchvision import VARIANTS, webdataset_batches
from pipeline.benchmarks.report import Column, Report
from pipeline.benchmarks.timing import Round, Spread, Stream, alternate, fastest, ratios
from pipeline.config import BenchConfig
from pipeline.distributed import World

log = logging.getLogger(__name__)

METHODS: dict[str, Callable[[int], tuple[ViewSpec, ...]]] = {
    "moco": moco_views,
    "simclr": simclr_views,
    "dino": dino_views,
    "localmim": localmim_views,
}
OURS, FEED = "coldpress", "order, reading, parameters"
_READ_AHEAD = 2
_COLUMNS = (
    Column("views", "views"),
    Column("case", "case"),
    Column("cpu_ms", "CPU ms/image", ".2f", better="less"),
    Column("cpu_ms_low", "min", ".2f"),
    Column("cpu_ms_high", "max", ".2f"),
    Column("images_per_second", "images/s", ".0f", better="more"),
    Column("ratio", "ratio", ".2f", better="more"),
    Column("ratio_low", "min", ".2f"),
    Column("ratio_high", "max", ".2f"),
)


@dataclass(frozen=True)
class _Bench:
    """What all cases share; data: with the number of threads that every case gets."""

    data: LoaderConfig
    index: SampleIndex
    device: torch.device
    batch_size: int
    batches: int
    rounds: int

    def alternate(self, streams: Mapping[str, Stream]) -> dict[str, list[Round]]:
        """Measure streams in turn."""
        return alternate(streams, self.rounds, self.batches, self.batch_size)


def bench_loader(config: BenchConfig, world: World) -> Report:
    """Measure decoding alone, then each method's views.

    Raises ValueError for a method without views, for too few shards and for more than one process.
    """
    bench = _bench(config, world)
    load_before = os.getloadavg()[0]
    samples = _some_samples(bench)
    rows = _decode_rows(bench, samples)
    notes = [
        f"{bench.data.threads} threads or workers, batches of {bench.batch_size}, {bench.rounds} rounds of "
        f"{bench.batches * bench.batch_size} images: medians, smallest and largest.",
        "ratio: CPU time of the fastest peer over the case's own, round by round.",
    ]
    for method in config.methods:
        measured = _measure_method(bench, method, METHODS[method](config.model.image_size))
        rows += _rows(method, measured, [*VARIANTS])
        notes += _notes(method, measured, config.samples_per_second)
    facts = {"threads": bench.data.threads, "load_average_before": load_before, "images": _statistics(bench, samples)}
    return Report(_COLUMNS, rows, notes, facts)


def _bench(config: BenchConfig, world: World) -> _Bench:
    for method in config.methods:
        if method not in METHODS:
            raise ValueError(f"methods: {method} has no views to measure; choose from {', '.join(METHODS)}.")
    if world.size > 1:
        raise ValueError(f"what=loader measures one process, not {world.size}; start it without a launcher.")
    device = torch.device("cpu") if config.data.device == "cpu" else world.device
    data = replace(config.data, threads=config.data.threads or share_of_cores())
    # Refuses what is no sharded set.
    loader = Loader(data, (), seed=0, batch_size=config.batch_size, device=device)
    loader.close()
    index = SampleIndex.load(Path(data.shards), loader.manifest)
    if len(index.paths) < data.threads:
        raise ValueError(
            f"data.shards: the webdataset library deals out whole shards, and {len(index.paths)} cannot be dealt to "
            f"{data.threads} workers; say data.threads={len(index.paths)} or shard with fewer samples_per_shard."
        )
    batches = -(-config.images // config.batch_size)
    return _Bench(data, index, device, config.batch_size, batches, config.rounds)


def _decode_rows(bench: _Bench, samples: Sequence[Sample]) -> list[dict[str, Any]]:
    """Measure decoding without any view, with our reading and with DALI's."""
    log.info("decoding")
    with _single_files(samples) as files:
        options: Any = {"batch_size": bench.batch_size, "threads": bench.data.threads, "device": bench.device}
        peers = {
            "DALI readers.webdataset": webdataset_reader_batches(bench.index.paths, **options),
            "DALI readers.file": file_reader_batches(files, **options),
        }
        measured = bench.alternate({**peers, OURS: _loader_batches(bench, (), bench.data)})
    return _rows("none, decoded", measured, [*peers])


def _measure_method(bench: _Bench, method: str, specs: tuple[ViewSpec, ...]) -> dict[str, list[Round]]:
    log.info("views of %s", method)
    # The peers first: they fork, and best of all before DALI has threads.
    streams: dict[str, Stream] = {
        variant: webdataset_batches(
            variant, bench.index.paths, specs, batch_size=bench.batch_size, workers=bench.data.threads
        )
        for variant in VARIANTS
    }
    for color in COLORS:
        streams[f"{OURS}, {color}"] = _loader_batches(bench, specs, replace(bench.data, color=color))
        streams[f"{FEED}, {color}"] = _feed_batches(bench, specs, color)
    return bench.alternate(streams)


def _loader_batches(bench: _Bench, specs: tuple[ViewSpec, ...], data: LoaderConfig) -> Stream:
    loader = Loader(data, specs, seed=0, batch_size=bench.batch_size, device=bench.device)
    try:
        yield from loader.batches()
    finally:
        loader.close()


def _feed_batches(bench: _Bench, specs: tuple[ViewSpec, ...], color: str) -> Stream:
    """Yield what the loader hands to DALI, without DALI."""
    reader = Reader(bench.index)
    order, defects = ShuffledOrder(bench.index.counts, seed=0), Defects(bench.data.max_bad_samples)
    size = bench.batch_size
    feed = Feed(reader, order, specs, defects, seed=0, batch_size=size, ahead=_READ_AHEAD)
    on_gpu = bench.device.type == "cuda"
    places = (np.arange(size) + size * number for number in count())
    try:
        # A queue that forgets: nobody restarts this feed.
        for batch in feed.encoded(places, deque(maxlen=1)):
            yield [view_inputs(spec, rows, color, on_gpu) for spec, rows in zip(specs, batch.rows, strict=True)]
    finally:
        feed.close()
        reader.close()


def _some_samples(bench: _Bench) -> list[Sample]:
    """Read as many samples as a round has, evenly spaced over the set."""
    number = min(len(bench.index), bench.batches * bench.batch_size)
    reader = Reader(bench.index)
    read = reader.read(np.linspace(0, len(bench.index) - 1, number).astype(int).tolist())
    reader.close()
    return [each for each in read if isinstance(each, Sample)]


@contextmanager
def _single_files(samples: Sequence[Sample]) -> Iterator[list[Path]]:
    with tempfile.TemporaryDirectory(prefix="coldpress-") as directory:
        files = [Path(directory) / f"{number:06d}.jpg" for number in range(len(samples))]
        for file, sample in zip(files, samples, strict=True):
            file.write_bytes(sample.image.tobytes())
        yield files


def _statistics(bench: _Bench, samples: Sequence[Sample]) -> dict[str, Any]:
    """Say what was decoded: the cost of an image is mostly that of its bytes and pixels."""
    return {
        "samples": len(bench.index),
        "shards": len(bench.index.paths),
        "looked_at": len(samples),
        "mean_bytes": round(float(np.mean([sample.image.size for sample in samples]))),
        "mean_height": round(float(np.mean([sample.height for sample in samples]))),
        "mean_width": round(float(np.mean([sample.width for sample in samples]))),
        "mean_kilopixels": round(float(np.mean([sample.height * sample.width for sample in samples])) / 1e3, 1),
    }


def _rows(views: str, measured: Mapping[str, Sequence[Round]], peers: Sequence[str]) -> list[dict[str, Any]]:
    """Return a row for each case; a part of the loader has no speed and no ratio to the fastest peer."""
    peer = measured[fastest({name: measured[name] for name in peers})]
    return [_row(views, case, rounds, None if case.startswith(FEED) else peer) for case, rounds in measured.items()]


def _row(views: str, case: str, rounds: Sequence[Round], peer: Sequence[Round] | None) -> dict[str, Any]:
    row: dict[str, Any] = {"views": views, "case": case}
    row |= Spread.of([each.cpu_milliseconds for each in rounds]).fields("cpu_ms")
    if peer:
        row |= Spread.of([each.images_per_second for each in rounds]).fields("images_per_second")
        row |= ratios(peer, rounds).fields("ratio")
    return row | {"rounds": [asdict(each) for each in rounds]}


def _notes(method: str, measured: Mapping[str, Sequence[Round]], samples_per_second: float) -> list[str]:
    """Say what our Python costs, and how many cores feed a model."""
    notes = []
    for color in COLORS:
        rounds, feed = measured[f"{OURS}, {color}"], measured[f"{FEED}, {color}"]
        share = ratios(feed, rounds)
        seconds = Spread.of([each.cpu_milliseconds for each in rounds]).median / 1e3
        notes.append(
            f"{method}, {color}: {1 / seconds:.0f} images/s per core, so {samples_per_second:,.0f} samples/s need "
            f"{samples_per_second * seconds:.1f} cores; {FEED}: {100 * share.median:.1f} "
            f"[{100 * share.low:.1f}-{100 * share.high:.1f}] % of its CPU time."
        )
    return notes
