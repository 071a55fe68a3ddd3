"""Write one shard: test-decode its images, pack them into a tar, index it."""

import hashlib
import json
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import BinaryIO

from data.images import ImagePolicy, RejectedError, as_jpeg
from data.manifest import INDEX_VERSION, Shard, index_path, write_atomically
from data.sources import SourceImage

KEY_DIGITS = 9
BLOCK = 512  # a tar's unit: headers take one, contents are padded to a multiple


@dataclass(frozen=True)
class ShardTask:
    """What goes into one shard; ``first`` is the global position of its first image and names the keys."""

    path: str
    first: int
    images: list[SourceImage]
    class_ids: dict[str, int]
    shorter_side: int = 0
    record: "PackedShard | None" = None  # of an earlier, interrupted command


@dataclass(frozen=True)
class PackedShard:
    """A written shard and the (path, reason) of what could not be decoded; no samples, no tar."""

    shard: Shard
    rejected: list[tuple[str, str]]
    treatments: dict[str, int]
    max_height: int
    max_width: int

    @property
    def images(self) -> int:
        return self.shard.samples + len(self.rejected)


def keep_or_pack(task: ShardTask) -> PackedShard:
    """Keep the shard that an interrupted command left if it is whole, write it otherwise."""
    if task.record is not None and _holds(Path(task.path), task.record.shard):
        return task.record
    return pack(task)


def pack(task: ShardTask) -> PackedShard:
    """Write a shard's index and then its tar, each in one step.

    Raises ValueError when the source changed or the disk refuses.
    """
    tar = Path(task.path)
    temporary = tar.with_name(tar.name + ".tmp")
    try:
        with temporary.open("wb") as file:
            writer = _TarWriter(file)
            seen = _add_images(writer, task)
            size = writer.close()
        rows = "".join(f"{row}\n" for row in writer.rows)
        index = f"{INDEX_VERSION} {len(writer.rows)}\n{rows}".encode("ascii")
        if writer.rows:
            write_atomically(index_path(tar), index)
            os.replace(temporary, tar)
    except OSError as error:
        raise ValueError(
            f"shard.output: cannot write {tar} ({error.strerror}); mend that and run the same command again, "
            "finished shards are kept."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    index_sha256 = hashlib.sha256(index).hexdigest()
    shard = Shard(tar.name, len(writer.rows), size, writer.digest.hexdigest(), index_sha256)
    return PackedShard(shard, seen.rejected, dict(seen.treatments), seen.max_height, seen.max_width)


@dataclass
class _Seen:
    """What became of the images of one shard."""

    rejected: list[tuple[str, str]] = field(default_factory=list)
    treatments: Counter[str] = field(default_factory=Counter)
    max_height: int = 0
    max_width: int = 0


def _add_images(writer: "_TarWriter", task: ShardTask) -> _Seen:
    """Add every image that decodes; return what became of all."""
    seen = _Seen()
    for position, image in enumerate(task.images, start=task.first):
        try:
            jpeg = as_jpeg(image.read(), ImagePolicy(task.shorter_side))
        except RejectedError as reason:
            seen.rejected.append((image.path, str(reason)))
            continue
        seen.treatments[jpeg.treatment] += 1
        seen.max_height, seen.max_width = max(seen.max_height, jpeg.height), max(seen.max_width, jpeg.width)
        members = {} if image.label is None else {"cls": str(task.class_ids[image.label]).encode("ascii")}
        facts = {"path": image.path, "width": jpeg.width, "height": jpeg.height}
        members |= {"jpg": jpeg.content, "json": json.dumps(facts).encode("ascii")}
        writer.add(f"{position:0{KEY_DIGITS}d}", members)
    return seen


class _TarWriter:
    """A plain ustar of reproducible bytes, written front to back; index and checksum come on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.rows: list[str] = []
        self.size = 0

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample and its index row."""
        row = []
        for extension, content in members.items():
            info = tarfile.TarInfo(f"{key}.{extension}")
            info.size, info.mode = len(content), 0o444
            self._write(info.tobuf(tarfile.USTAR_FORMAT))
            row.append(f"{extension} {self.size} {info.size} {info.name}")
            self._write(content + bytes(-info.size % BLOCK))
        self.rows.append(" ".join(row))

    def close(self) -> int:
        """End the archive as tar does, bring it to the disk, return its size in bytes."""
        self._write(bytes(2 * BLOCK))
        self._write(bytes(-self.size % tarfile.RECORDSIZE))
        self.file.flush()
        os.fsync(self.file.fileno())
        return self.size

    def _write(self, content: bytes) -> None:
        self.file.write(content)
        self.digest.update(content)
        self.size += len(content)


def _holds(tar: Path, shard: Shard) -> bool:
    """Tell whether a tar and its index are bit for bit those of the record."""
    if shard.samples == 0:
        return True
    expected = ((tar, shard.sha256), (index_path(tar), shard.index_sha256))
    return all(file.is_file() and file_sha256(file) == checksum for file, checksum in expected)


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
