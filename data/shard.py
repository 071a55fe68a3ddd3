"""Command: a folder, tar or ImageNet archive of images -> WebDataset tars, their indexes, a manifest.

The same source and options give the same bytes, whatever the number of workers and however often the command
was killed on the way: sample order and keys come from one seeded shuffle of the sorted paths.
"""

import csv
import io
import random
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.ledger import Ledger, discard, refuse_other_plan
from data.manifest import MANIFEST_NAME, SCHEMA_VERSION, Manifest, write_atomically
from data.pack import PackedShard, ShardTask, keep_or_pack
from data.sources import Source, scan
from data.workers import run_tasks

REJECTED_NAME = "rejected.csv"


@dataclass
class ShardConfig:
    """source: class folder, tar or ImageNet archive; output: new folder; workers: processes, 0 = all cores.

    max_rejected: how many images may fail to decode before the command fails. shorter_side: pixels to which
    larger images are scaled down, so that every step decodes less; 0 keeps images byte for byte.
    """

    source: str
    output: str
    prefix: str = "train"
    samples_per_shard: int = 1000
    seed: int = 0
    workers: int = 0
    max_rejected: int = 0
    shorter_side: int = 0

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", self.prefix):
            raise ValueError(f"shard.prefix: must be 1 to 40 letters, digits, - or _, not {self.prefix!r}; try train.")
        for name, least in (
            ("samples_per_shard", 1),
            ("seed", 0),
            ("workers", 0),
            ("max_rejected", 0),
            ("shorter_side", 0),
        ):
            value = getattr(self, name)
            if value < least:
                raise ValueError(f"shard.{name}: must be at least {least}, not {value}.")


def run(config: ShardConfig) -> None:
    """Shard the source, or say that it is done already.

    Raises ValueError for a source or output that cannot be used, and for too many undecodable images.
    """
    started = time.monotonic()
    source, output = scan(Path(config.source)), Path(config.output)
    plan = _plan(config, source)
    if (output / MANIFEST_NAME).exists():
        manifest = Manifest.load(output)
        refuse_other_plan(output, manifest.options, plan)
        print(f"{output} holds this set already: {manifest.samples} samples in {len(manifest.shards)} shards.")
    else:
        with Ledger(output, plan) as ledger:
            packed = _pack_all(config, source, ledger)
            manifest = _publish(config, source, plan, packed)
        print(_table(manifest, packed, time.monotonic() - started))
    discard(output)


def _plan(config: ShardConfig, source: Source) -> dict[str, Any]:
    """Return what decides the output's bytes; two commands of one plan are the same command."""
    names = ("prefix", "samples_per_shard", "seed", "shorter_side")
    return {name: getattr(config, name) for name in names} | {"source_fingerprint": source.fingerprint()}


def _pack_all(config: ShardConfig, source: Source, ledger: Ledger) -> list[PackedShard]:
    """Write every shard that is not there yet; return all, in order."""
    tasks = list(_tasks(config, source, ledger))
    packed = []
    for done in _follow(run_tasks(keep_or_pack, tasks, config.workers), len(source.images)):
        ledger.record(done)
        packed.append(done)
    return sorted(packed, key=lambda done: done.shard.name)


def _tasks(config: ShardConfig, source: Source, ledger: Ledger) -> Iterator[ShardTask]:
    """Deal the globally shuffled images out to shards."""
    images = list(source.images)
    random.Random(config.seed).shuffle(images)
    class_ids = {name: position for position, name in enumerate(source.classes)}
    for number, first in enumerate(range(0, len(images), config.samples_per_shard)):
        name = f"{config.prefix}-{number:06d}.tar"
        members = images[first : first + config.samples_per_shard]
        yield ShardTask(str(ledger.output / name), first, members, class_ids, config.shorter_side, ledger.recall(name))


def _follow(results: Iterable[PackedShard], total: int) -> Iterator[PackedShard]:
    """Pass results on, with a bar on a terminal and ten plain lines elsewhere."""
    done = 0
    with tqdm(total=total, unit="image", disable=None) as bar:
        for packed in results:
            tenth, done = 10 * done // total, done + packed.images
            bar.update(packed.images)
            if bar.disable and 10 * done // total > tenth:
                print(f"{done} of {total} images", flush=True)
            yield packed


def _publish(config: ShardConfig, source: Source, plan: dict[str, Any], packed: list[PackedShard]) -> Manifest:
    """Write the list of rejected images, refuse if there are too many, then write the manifest."""
    output = Path(config.output)
    rejected = sorted(pair for done in packed for pair in done.rejected)
    if rejected:
        write_atomically(output / REJECTED_NAME, _csv(rejected))
    if len(rejected) > config.max_rejected:
        raise ValueError(
            f"shard.max_rejected: {len(rejected)} images do not decode, {config.max_rejected} may; see "
            f"{output / REJECTED_NAME}, then run again with max_rejected={len(rejected)}, or mend them and "
            "shard to a new output."
        )
    shards = tuple(done.shard for done in packed if done.shard.samples)
    if not shards:
        raise ValueError(f"shard.source: not one image of {config.source} decodes.")
    manifest = Manifest(
        schema_version=SCHEMA_VERSION,
        classes=source.classes,
        samples=sum(shard.samples for shard in shards),
        bytes=sum(shard.bytes for shard in shards),
        max_height=max(done.max_height for done in packed),
        max_width=max(done.max_width for done in packed),
        treatments=dict(sorted(sum((Counter(done.treatments) for done in packed), Counter()).items())),
        shards=shards,
        source=str(Path(config.source).resolve()),
        options=plan,
    )
    manifest.write(output)
    return manifest


def _csv(rejected: list[tuple[str, str]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows([("path", "reason"), *rejected])
    return text.getvalue().encode("utf-8", "surrogateescape")


def _table(manifest: Manifest, packed: list[PackedShard], seconds: float) -> str:
    rejected = sum(len(done.rejected) for done in packed)
    rows = {
        "source": manifest.source,
        "classes": len(manifest.classes) or "none (unlabelled)",
        "samples": manifest.samples,
        **manifest.treatments,
        "rejected": f"{rejected} (see {REJECTED_NAME})" if rejected else 0,
        "shards": len(manifest.shards),
        "megabytes": f"{manifest.bytes / 1e6:.1f}",
        "seconds": f"{seconds:.1f}",
    }
    return "\n".join(f"{name:<16}{value}" for name, value in rows.items())
