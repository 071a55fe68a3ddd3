"""Command: images in folders, tars, WebDatasets or lists -> WebDataset tars, their indexes, a manifest.

The same source and options give the same bytes, whatever the number of workers and however often the command
was killed on the way: sample order and keys come from one seeded shuffle by the images' names.
"""

import hashlib
import re
import time
from collections import Counter
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.images import ImagePolicy
from data.ledger import Ledger, refuse_other_plan
from data.manifest import LEDGER_NAME, MANIFEST_NAME, SCHEMA_VERSION, Manifest
from data.pack import PackedShard, ShardTask, keep_or_pack
from data.publishing import write_atomically
from data.rejected import REJECTED_NAME, Rejected, count_reasons, encode_rejected
from data.repair import Repair, damaged_files
from data.sources import Source, describe, scan
from data.workers import run_tasks

SAMPLES_PER_SHARD = 1000


@dataclass
class ShardConfig:
    """source: what `data.sources` reads; output: new folder; workers: processes, 0 = all cores.

    labels: file of the images' classes, for sources without class folders. classes: keep only those of this list,
    `imagenet100` or a file of one class a line. samples_per_shard, or else bytes_per_shard: encoded bytes as they lie
    in the source; 0 and 0 stand for SAMPLES_PER_SHARD. max_rejected: how many images may fail before the command does.
    The rest is what `data.images.ImagePolicy` says; without shorter_side, images are kept byte for byte.
    """

    source: str
    output: str
    labels: str = ""
    classes: str = ""
    prefix: str = "train"
    samples_per_shard: int = 0
    bytes_per_shard: int = 0
    seed: int = 0
    workers: int = 0
    max_rejected: int = 0
    shorter_side: int = ImagePolicy.shorter_side
    quality: int = ImagePolicy.quality
    max_pixels: int = ImagePolicy.max_pixels
    max_aspect_ratio: float = ImagePolicy.max_aspect_ratio

    def __post_init__(self) -> None:
        for name in ("source", "output"):
            if not getattr(self, name):
                raise ValueError(
                    f"shard.{name}: is empty, maybe an unset shell variable; give a path (. for this folder)."
                )
        if not re.fullmatch(r"[A-Za-z0-9_-]{1,40}", self.prefix):
            raise ValueError(f"shard.prefix: must be 1 to 40 letters, digits, - or _, not {self.prefix!r}; try train.")
        for name in ("samples_per_shard", "bytes_per_shard", "seed", "workers", "max_rejected"):
            if getattr(self, name) < 0:
                raise ValueError(f"shard.{name}: must be at least 0, not {getattr(self, name)}.")
        if self.samples_per_shard and self.bytes_per_shard:
            raise ValueError(
                f"shard.bytes_per_shard: {self.bytes_per_shard} beside samples_per_shard={self.samples_per_shard}; "
                "give one of them."
            )
        self.policy()

    def policy(self) -> ImagePolicy:
        """Return what becomes of an image. Raises ValueError for values out of range."""
        return ImagePolicy(self.shorter_side, self.quality, self.max_pixels, self.max_aspect_ratio)


def run(config: ShardConfig) -> None:
    """Shard the source; of a finished set, write again what is missing, or say that it is done already.

    Raises ValueError for a source or output that cannot be used, and for too many rejected images.
    """
    started = time.monotonic()
    _refuse_output_in_source(config)
    source, output = scan(Path(config.source), config.labels, config.classes), Path(config.output)
    plan = _plan(config, source)
    manifest = _finished(output, plan)
    if manifest is None or damaged_files(output, manifest) or (output / LEDGER_NAME).exists():
        with Ledger(output, plan) as ledger:
            said = _write(config, source, ledger, started)
            ledger.discard()
        print(said)
    else:
        print(_done_already(output, manifest))


def _refuse_output_in_source(config: ShardConfig) -> None:
    """Raise ValueError where the next scan would find this command's output among the images."""
    source, output = Path(config.source).resolve(), Path(config.output).resolve()
    if source.is_dir() and output.is_relative_to(source):
        raise ValueError(
            f"shard.output: {config.output} lies in the source {config.source}; choose a folder beside it."
        )


def _write(config: ShardConfig, source: Source, ledger: Ledger, started: float) -> str:
    """Shard or repair; return what to say of it."""
    # Looked at again, now that nobody else writes: another command may have finished the set meanwhile.
    manifest = _finished(ledger.output, ledger.plan)
    if manifest is None:
        packed = _pack_all(config, source, ledger)
        manifest = _publish(config, source, ledger.plan, packed)
        return _table(manifest, source, packed, time.monotonic() - started)
    damaged = damaged_files(ledger.output, manifest)
    if not damaged:
        return _done_already(ledger.output, manifest)
    print(f"{ledger.output} lacks {len(damaged)} files of this set or holds others in their place: {_few(damaged)}")
    repair = Repair(ledger.output, ledger.folder, manifest, frozenset(damaged))
    repair.run(_tasks(config, source, ledger), source.rejected, config.workers)
    return f"{len(damaged)} files written again; {_done_already(ledger.output, manifest)}"


def _finished(output: Path, plan: dict[str, Any]) -> Manifest | None:
    """Return the manifest of a set of this plan, None if there is none. Raises ValueError for another set."""
    if not (output / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.load(output)
    refuse_other_plan(output, manifest.options, plan)
    return manifest


def _done_already(output: Path, manifest: Manifest) -> str:
    return f"{output} holds this set already: {manifest.samples} samples in {len(manifest.shards)} shards."


def _few(names: list[str]) -> str:
    return ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def _plan(config: ShardConfig, source: Source) -> dict[str, Any]:
    """Return what decides the output's bytes; two commands of one plan are the same command."""
    names = ("prefix", "bytes_per_shard", "seed", "shorter_side", "quality", "max_pixels", "max_aspect_ratio")
    options = {name: getattr(config, name) for name in names}
    return options | {"samples_per_shard": _samples_per_shard(config), "source_fingerprint": source.fingerprint}


def _samples_per_shard(config: ShardConfig) -> int:
    return config.samples_per_shard or (0 if config.bytes_per_shard else SAMPLES_PER_SHARD)


def _pack_all(config: ShardConfig, source: Source, ledger: Ledger) -> list[PackedShard]:
    """Write every shard that is not there yet; return all, in order."""
    packed = []
    with closing(run_tasks(keep_or_pack, _tasks(config, source, ledger), config.workers)) as results:
        for done in _follow(results, len(source)):
            ledger.record(done)
            packed.append(done)
    return sorted(packed, key=lambda done: done.shard.name)


def _tasks(config: ShardConfig, source: Source, ledger: Ledger) -> Iterator[ShardTask]:
    """Deal the globally shuffled images out to shards."""
    rows, policy = source.shuffled(config.seed), config.policy()
    for number, (first, end) in enumerate(_deal(config, source, rows)):
        name = f"{config.prefix}-{number:06d}.tar"
        images = source.take(rows[first:end])
        yield ShardTask(str(ledger.output / name), first, images, policy, ledger.recall(name))


def _deal(config: ShardConfig, source: Source, rows: NDArray[np.uint32]) -> Iterator[tuple[int, int]]:
    """Yield (first, end) of every shard's images among the shuffled rows."""
    if not config.bytes_per_shard:
        step = _samples_per_shard(config)
        yield from ((first, min(first + step, len(rows))) for first in range(0, len(rows), step))
        return
    end_bytes, first = np.cumsum(source.sizes(rows)), 0
    while first < len(rows):
        before = int(end_bytes[first - 1]) if first else 0
        fitting = int(np.searchsorted(end_bytes, before + config.bytes_per_shard, side="right"))
        end = max(fitting, first + 1)  # an image larger than a shard gets one of its own
        yield first, end
        first = end


def _follow(results: Iterable[PackedShard], total: int) -> Iterator[PackedShard]:
    """Pass results on, with a bar on a terminal and ten plain lines elsewhere."""
    done, started = 0, time.monotonic()
    with tqdm(total=total, desc="sharding", unit=" images", disable=None) as bar:
        for packed in results:
            tenth, done = 10 * done // total, done + packed.images
            bar.update(packed.images)
            if bar.disable and 10 * done // total > tenth:
                rate = done / max(time.monotonic() - started, 1e-9)
                left = tqdm.format_interval((total - done) / rate)
                print(f"{done} of {total} images, {rate:.0f} images/s, {left} left", flush=True)
            yield packed


def _publish(config: ShardConfig, source: Source, plan: dict[str, Any], packed: list[PackedShard]) -> Manifest:
    """Write the list of rejected images, refuse if there are too many, then write the manifest."""
    output = Path(config.output)
    rejected = _rejected(source, packed)
    listed = encode_rejected(rejected) if rejected else b""
    if listed:
        write_atomically(output / REJECTED_NAME, listed)
    else:
        (output / REJECTED_NAME).unlink(missing_ok=True)  # of an attempt before images could be read
    if len(rejected) > config.max_rejected:
        raise ValueError(
            f"shard.max_rejected: {len(rejected)} images are rejected, {config.max_rejected} may be "
            f"({_reasons(rejected)}); see {output / REJECTED_NAME}, then run again with max_rejected={len(rejected)}, "
            "or mend them and shard to a new output."
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
        rejected=len(rejected),
        rejected_sha256=hashlib.sha256(listed).hexdigest() if listed else "",
        shards=shards,
        source=str(Path(config.source).resolve()),
        options=plan,
    )
    manifest.write(output)
    return manifest


def _rejected(source: Source, packed: list[PackedShard]) -> list[Rejected]:
    return [*source.rejected, *(pair for done in packed for pair in done.rejected)]


def _table(manifest: Manifest, source: Source, packed: list[PackedShard], seconds: float) -> str:
    rejected = _rejected(source, packed)
    rows = {
        "source": manifest.source,
        "classes": len(manifest.classes) or "none (unlabelled)",
        "samples": manifest.samples,
        **{f"  {treatment}": count for treatment, count in manifest.treatments.items()},
        "rejected": f"{len(rejected)} (see {REJECTED_NAME})" if rejected else 0,
        **{f"  {reason}": count for reason, count in count_reasons(rejected)},
        "ignored": describe(source.ignored) if source.ignored else 0,
        "shards": len(manifest.shards),
        "megabytes": f"{manifest.bytes / 1e6:.1f}",
        "seconds": f"{seconds:.1f}",
        "images/s": f"{manifest.samples / max(seconds, 1e-9):.0f}",
    }
    width = max(map(len, rows)) + 2
    table = "\n".join(f"{name:<{width}}{value}" for name, value in rows.items())
    return table.encode("utf-8", "backslashreplace").decode("utf-8")


def _reasons(rejected: list[Rejected]) -> str:
    return ", ".join(f"{count} {reason}" for reason, count in count_reasons(rejected)[:3])
