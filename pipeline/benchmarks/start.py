"""From nothing to the first place of a run, on a set of ImageNet's size made for the purpose."""

from __future__ import annotations

import hashlib
import time
from pathlib import Path
from tarfile import BLOCKSIZE
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from data.manifest import INDEX_VERSION, SCHEMA_VERSION, Manifest, SampleIndex, Shard, index_path
from data.order import ShuffledOrder
from pipeline.benchmarks.report import Column, Report
from pipeline.benchmarks.timing import Spread
from pipeline.config import BenchConfig
from pipeline.distributed import World

SHARDS, SAMPLES = 2_000, 1_300_000
LIMIT_SECONDS = 2.0
# Sizes of ImageNet's images and of the other members of a sample, in bytes.
_IMAGE_BYTES, _LABEL_BYTES, _FACTS_BYTES = (20_000, 200_000), 3, 90
_STAGES = ("manifest", "index", "first order")
_COLUMNS = (
    Column("stage", "stage"),
    Column("seconds", "seconds", ".3f", better="less"),
    Column("seconds_low", "min", ".3f"),
    Column("seconds_high", "max", ".3f"),
    Column("cpu_seconds", "CPU seconds", ".3f"),
)


def bench_start(config: BenchConfig, world: World) -> Report:
    """Measure loading manifest and index and drawing the first epoch, in files that the page cache holds."""
    with TemporaryDirectory(prefix="coldpress-") as name:
        directory = Path(name)
        draw_set(directory, SHARDS, SAMPLES)
        rounds = [start_once(directory) for _ in range(config.rounds)]
    rows = [_row(stage, [each[stage] for each in rounds]) for stage in _STAGES]
    rows.append(_row("all", [np.sum(list(each.values()), axis=0) for each in rounds]))
    return Report(_COLUMNS, rows, [_verdict(rows[-1])], {"shards": SHARDS, "samples": SAMPLES})


def draw_set(directory: Path, shards: int, samples: int) -> None:
    """Write a set whose tars are holes of the right size, and whose indexes and manifest are real."""
    counts = np.diff(np.arange(shards + 1) * samples // shards)
    sizes = np.random.default_rng(0).integers(*_IMAGE_BYTES, size=samples)
    records, first = [], 0
    for number, count in enumerate(counts.tolist()):
        tar = directory / f"train-{number:06d}.tar"
        records.append(_draw_shard(tar, first, sizes[first : first + count].tolist()))
        first += count
    Manifest(
        schema_version=SCHEMA_VERSION,
        classes=tuple(f"n{number:08d}" for number in range(1000)),
        samples=samples,
        bytes=sum(shard.bytes for shard in records),
        max_height=1000,
        max_width=1000,
        treatments={"kept": samples},
        rejected=0,
        rejected_sha256="",
        shards=tuple(records),
        source="drawn",
        options={},
    ).write(directory)


def _draw_shard(tar: Path, first: int, sizes: list[int]) -> Shard:
    rows, end = [f"{INDEX_VERSION} {len(sizes)}"], 0
    for key, image_bytes in enumerate(sizes, start=first):
        row = []
        for extension, size in (("cls", _LABEL_BYTES), ("jpg", image_bytes), ("json", _FACTS_BYTES)):
            row.append(f"{extension} {end + BLOCKSIZE} {size} {key:09d}.{extension}")
            end += BLOCKSIZE + size + -size % BLOCKSIZE
        rows.append(" ".join(row))
    index = "".join(f"{row}\n" for row in rows).encode("ascii")
    index_path(tar).write_bytes(index)
    with tar.open("wb") as file:
        file.truncate(end + 2 * BLOCKSIZE)
    tar_sha256 = hashlib.sha256(tar.name.encode("ascii")).hexdigest()  # a start does not read the tars
    return Shard(tar.name, len(sizes), end + 2 * BLOCKSIZE, tar_sha256, hashlib.sha256(index).hexdigest())


def start_once(directory: Path) -> dict[str, tuple[float, float]]:
    """Return wall and CPU seconds of each stage."""
    clock = _Clock()
    manifest = Manifest.load(directory)
    clock.lap("manifest")
    index = SampleIndex.load(directory, manifest)
    clock.lap("index")
    ShuffledOrder(index.counts, seed=0).place(np.arange(256))
    clock.lap("first order")
    return clock.laps


class _Clock:
    """Wall and CPU seconds between laps."""

    def __init__(self) -> None:
        self.laps: dict[str, tuple[float, float]] = {}
        self._last = self._now()

    def lap(self, name: str) -> None:
        wall, cpu = self._now()
        self.laps[name] = (wall - self._last[0], cpu - self._last[1])
        self._last = self._now()

    @staticmethod
    def _now() -> tuple[float, float]:
        return time.perf_counter(), time.process_time()


def _row(stage: str, seconds: list[Any]) -> dict[str, Any]:
    wall = Spread.of([float(each[0]) for each in seconds])
    cpu = Spread.of([float(each[1]) for each in seconds])
    return {"stage": stage, **wall.fields("seconds"), "cpu_seconds": cpu.median}


def _verdict(row: dict[str, Any]) -> str:
    """Judge by the slowest round: a run starts once, and never warmed up."""
    relation = "below" if row["seconds_high"] < LIMIT_SECONDS else "NOT below"
    return (
        f"{SHARDS:,} shards, {SAMPLES:,} samples: median {row['seconds']:.2f} s, at most {row['seconds_high']:.2f} s, "
        f"{relation} the {LIMIT_SECONDS:g} s that a start may take; {row['cpu_seconds']:.2f} s of it CPU time."
    )
