"""Command: images in folders, tars, WebDatasets or lists -> WebDataset tars, their indexes, a manifest.

The same source and options give the same bytes, whatever the number of workers and however often the command
was killed on the way: sample order and keys come from one seeded shuffle by the images' names.
"""

import re
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from data.deal import Deal, Part, deal, read_part
from data.images import ImagePolicy
from data.ledger import Ledger, refuse_other_plan
from data.manifest import LEDGER_NAME, MANIFEST_NAME, Manifest
from data.merge import Merge, incomplete
from data.pack import PackedShard, ShardTask, keep_or_pack
from data.repair import Repair, damaged_files
from data.sources import Source, scan
from data.workers import run_tasks

SAMPLES_PER_SHARD = 1000


@dataclass
class ShardConfig:
    """source: what `data.sources` reads; output: new folder; workers: processes, 0 = all cores.

    labels: file of the images' classes, for sources without class folders. classes: keep only those of this list,
    `imagenet100` or a file of one class a line. samples_per_shard, or else bytes_per_shard: encoded bytes as they lie
    in the source; 0 and 0 stand for SAMPLES_PER_SHARD. max_rejected: how many images may fail before the command does.
    part: 2/4 writes the second of four parts, and the part that finishes last the manifest of all; without it each task
    of a Slurm step takes a part of its own.
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
    part: str = ""
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
        read_part(self.part)
        self.policy()

    def policy(self) -> ImagePolicy:
        """Return what becomes of an image. Raises ValueError for values out of range."""
        return ImagePolicy(self.shorter_side, self.quality, self.max_pixels, self.max_aspect_ratio)


def run(config: ShardConfig) -> None:
    """Shard the source; of a finished set, write again what is missing, or say that it is done already.

    Raises ValueError for a source or output that cannot be used, and for too many rejected images.
    """
    started, part = time.monotonic(), read_part(config.part)
    _refuse_output_in_source(config)
    source, output = scan(Path(config.source), config.labels, config.classes), Path(config.output)
    plan = _plan(config, source)
    manifest = _finished(output, plan, part)
    if manifest is None or damaged_files(output, manifest) or (output / LEDGER_NAME).exists():
        with Ledger(output, plan, part) as ledger:
            said = _write(config, source, ledger, started)
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
    manifest = _finished(ledger.output, ledger.plan, ledger.part)
    if manifest is not None:
        return _mend(config, source, ledger, manifest)
    dealt = _deal(config, source)
    _pack_part(config, source, dealt, ledger)
    with ledger.part_finished() as unfinished:
        if unfinished:
            return f"{ledger.part} is finished, {_few(unfinished)} to come; the last to finish writes {MANIFEST_NAME}."
        merge = Merge(ledger.output, source, _recall_all(config, dealt, ledger))
        merge.refuse_rejected(config.max_rejected)
        manifest = merge.publish(config.source, ledger.plan)
    ledger.discard()
    return merge.table(manifest, dealt.images(ledger.part), time.monotonic() - started)


def _mend(config: ShardConfig, source: Source, ledger: Ledger, manifest: Manifest) -> str:
    """Give a finished set back what it lacks; where there are parts, the first does."""
    damaged, done = damaged_files(ledger.output, manifest), _done_already(ledger.output, manifest)
    if damaged and ledger.part.number > 1:
        return f"{ledger.output} lacks {_few(damaged)}; part 1 writes that again."
    if damaged:
        print(f"{ledger.output} lacks {len(damaged)} files of this set or holds others in their place: {_few(damaged)}")
        tasks = _tasks(config, source, _deal(config, source), ledger, Part())
        repair = Repair(ledger.output, ledger.folder, manifest, frozenset(damaged))
        repair.run(tasks, source.rejected, config.workers)
        done = f"{len(damaged)} files written again; {done}"
    if ledger.part.number == 1:
        ledger.discard()
    return done


def _finished(output: Path, plan: dict[str, Any], part: Part) -> Manifest | None:
    """Return the manifest of a set of this plan, None if there is none. Raises ValueError for another set."""
    if not (output / MANIFEST_NAME).exists():
        return None
    manifest = Manifest.load(output)
    refuse_other_plan(output, manifest.options, plan, part)
    return manifest


def _done_already(output: Path, manifest: Manifest) -> str:
    return f"{output} holds this set already: {manifest.samples} samples in {len(manifest.shards)} shards."


def _few(names: Sequence[object]) -> str:
    return ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")


def _plan(config: ShardConfig, source: Source) -> dict[str, Any]:
    """Return what decides the output's bytes; two commands of one plan are the same command."""
    names = ("prefix", "bytes_per_shard", "seed", "shorter_side", "quality", "max_pixels", "max_aspect_ratio")
    options = {name: getattr(config, name) for name in names}
    return options | {"samples_per_shard": _samples_per_shard(config), "source_fingerprint": source.fingerprint}


def _samples_per_shard(config: ShardConfig) -> int:
    return config.samples_per_shard or (0 if config.bytes_per_shard else SAMPLES_PER_SHARD)


def _pack_part(config: ShardConfig, source: Source, dealt: Deal, ledger: Ledger) -> None:
    """Write every shard of this part that is not there yet."""
    images = dealt.images(ledger.part)
    if images < len(source):
        print(f"{ledger.part}: {images} of {len(source)} images", flush=True)
    tasks = _tasks(config, source, dealt, ledger, ledger.part)
    with closing(run_tasks(keep_or_pack, tasks, config.workers)) as results:
        for packed in _follow(results, images):
            ledger.record(packed)


def _recall_all(config: ShardConfig, dealt: Deal, ledger: Ledger) -> list[PackedShard]:
    """Return the records of all parts, in order."""
    recalled = [ledger.recall(_name(config, number)) for number in range(len(dealt.shards))]
    if None in recalled:
        raise incomplete(ledger.output, f"the records of {recalled.count(None)} shards")
    return [packed for packed in recalled if packed is not None]


def _tasks(config: ShardConfig, source: Source, dealt: Deal, ledger: Ledger, part: Part) -> Iterator[ShardTask]:
    for number, (first, end) in enumerate(dealt.shards):
        if part.has(number):
            images, name = source.take(dealt.rows[first:end]), _name(config, number)
            yield ShardTask(str(ledger.output / name), first, images, config.policy(), ledger.recall(name))


def _deal(config: ShardConfig, source: Source) -> Deal:
    return deal(source, config.seed, _samples_per_shard(config), config.bytes_per_shard)


def _name(config: ShardConfig, number: int) -> str:
    return f"{config.prefix}-{number:06d}.tar"


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
