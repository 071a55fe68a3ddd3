"""Give a finished set back what it has lost: the same bytes, from the same source and options."""

import hashlib
import os
from collections.abc import Iterable, Iterator
from contextlib import closing
from dataclasses import dataclass, replace
from pathlib import Path

from data.manifest import Manifest, Shard, index_path
from data.pack import PackedShard, ShardTask, pack
from data.publishing import file_sha256, publish, write_atomically
from data.rejected import REJECTED_NAME, Rejected, encode_rejected
from data.workers import run_tasks


def damaged_files(directory: Path, manifest: Manifest) -> list[str]:
    """Return the names of files that are missing or not the manifest's, of tars those of another size.

    Reading all tars is what `coldpress verify` is for.
    """
    damaged = []
    for shard in manifest.shards:
        tar = directory / shard.name
        if not tar.is_file() or tar.stat().st_size != shard.bytes:
            damaged.append(tar.name)
        if not _is(index_path(tar), shard.index_sha256):
            damaged.append(index_path(tar).name)
    if manifest.rejected and not _is(directory / REJECTED_NAME, manifest.rejected_sha256):
        damaged.append(REJECTED_NAME)
    return damaged


def _is(path: Path, sha256: str) -> bool:
    return path.is_file() and file_sha256(path) == sha256


@dataclass(frozen=True)
class Repair:
    """Files of a set to be written again, in ``workshop`` at first: what there is, is replaced by its like only."""

    directory: Path
    workshop: Path
    manifest: Manifest
    damaged: frozenset[str]

    def run(self, tasks: Iterable[ShardTask], scanned: list[Rejected], workers: int) -> None:
        """Write the files; tasks are those of the whole set, scanned is what the scan of its source rejected.

        Raises ValueError when the same source and options no longer give the same bytes.
        """
        rejected = list(scanned)
        with closing(run_tasks(pack, self._wanted(tasks), workers)) as results:
            for packed in results:
                rejected += packed.rejected
                self._replace(packed)
        if REJECTED_NAME in self.damaged:
            self._replace_rejected(encode_rejected(rejected))

    def _wanted(self, tasks: Iterable[ShardTask]) -> Iterator[ShardTask]:
        """Yield the tasks of damaged shards and, to tell what was rejected, of those that lack some images."""
        for task in tasks:
            name = Path(task.path).name
            damaged = not self.damaged.isdisjoint((name, index_path(Path(name)).name))
            lacking = len(task.images) - (self._held[name].samples if name in self._held else 0)
            if damaged or (lacking and REJECTED_NAME in self.damaged):
                yield replace(task, path=str(self.workshop / name))

    @property
    def _held(self) -> dict[str, Shard]:
        return {shard.name: shard for shard in self.manifest.shards}

    def _replace(self, packed: PackedShard) -> None:
        name = packed.shard.name
        if packed.shard.samples == 0 and name not in self._held:
            return
        if packed.shard != self._held.get(name):
            raise _no_longer_the_same(self.directory / name)
        for path in (index_path(self.workshop / name), self.workshop / name):
            if path.name in self.damaged:
                publish(path, self.directory / path.name)
            else:
                os.unlink(path)

    def _replace_rejected(self, content: bytes) -> None:
        if hashlib.sha256(content).hexdigest() != self.manifest.rejected_sha256:
            raise _no_longer_the_same(self.directory / REJECTED_NAME)
        write_atomically(self.directory / REJECTED_NAME, content)


def _no_longer_the_same(path: Path) -> ValueError:
    return ValueError(
        f"shard.output: {path} is damaged, and written again it is another file: the source's bytes have changed, or "
        "the decoder is another version; copy it again, or shard to a new folder."
    )
