"""Write one shard: test-decode its images, pack them into a tar, index it."""

import hashlib
import json
import os
import tarfile
from collections import Counter
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from data.images import ImagePolicy, Jpeg, RejectedError, as_jpeg
from data.manifest import INDEX_VERSION, Shard, index_path, sample_checksum
from data.publishing import file_sha256, publish, temporary_path, write_atomically
from data.sources.extents import ExtentReader
from data.sources.table import SourceImage, SourceSlice

KEY_DIGITS = 9
BLOCK = tarfile.BLOCKSIZE  # headers take one, contents are padded to a multiple
_WRITTEN_AT_ONCE = 1 << 20  # bytes
MAX_ENCODED_BYTES = 1 << 28  # of one image; photographs stay below a tenth


@dataclass(frozen=True)
class ShardTask:
    """What goes into one shard; ``first`` is the global position of its first image and names the keys."""

    path: str
    first: int
    images: SourceSlice
    policy: ImagePolicy
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
    temporary = temporary_path(tar)
    try:
        with temporary.open("wb", buffering=_WRITTEN_AT_ONCE) as file:
            writer = _TarWriter(file)
            seen = _add_images(writer, task)
            size = writer.close()
        index = f"{INDEX_VERSION} {writer.samples}\n".encode("ascii") + writer.rows
        if writer.samples:
            write_atomically(index_path(tar), index)
            publish(temporary, tar)
    except OSError as error:
        raise ValueError(
            f"shard.output: cannot write {tar} ({error.strerror}); mend that and run the same command again, "
            "finished shards are kept."
        ) from None
    finally:
        temporary.unlink(missing_ok=True)
    index_sha256 = hashlib.sha256(index).hexdigest()
    shard = Shard(tar.name, writer.samples, size, writer.digest.hexdigest(), index_sha256)
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
    with ExtentReader() as reader:
        for position, image in enumerate(task.images, start=task.first):
            try:
                jpeg = _convert(reader, image, task.policy)
            except RejectedError as reason:
                seen.rejected.append((image.path, str(reason)))
                continue
            seen.treatments[jpeg.treatment] += 1
            seen.max_height, seen.max_width = max(seen.max_height, jpeg.height), max(seen.max_width, jpeg.width)
            label = b"" if image.label < 0 else str(image.label).encode("ascii")
            members = {"cls": label} if label else {}
            members |= {"jpg": jpeg.content, "json": _facts(image.path, label, jpeg)}
            writer.add(f"{position:0{KEY_DIGITS}d}", members)
    return seen


def _facts(path: str, label: bytes, jpeg: Jpeg) -> bytes:
    """Return the json member; readers hold label and image against its checksum."""
    facts = {"crc32": sample_checksum(label, jpeg.content), "path": path, "width": jpeg.width, "height": jpeg.height}
    return json.dumps(facts).encode("ascii")


def _convert(reader: ExtentReader, image: SourceImage, policy: ImagePolicy) -> Jpeg:
    if image.size > MAX_ENCODED_BYTES:
        raise RejectedError(f"its file is larger than {MAX_ENCODED_BYTES} bytes")
    return as_jpeg(reader.read(image), policy)


class _TarWriter:
    """A plain ustar of reproducible bytes, written front to back; index and checksum come on the way."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.digest = hashlib.sha256()
        self.rows = bytearray()
        self.samples = 0
        self.size = 0

    def add(self, key: str, members: dict[str, bytes]) -> None:
        """Append one sample and its index row."""
        row, pieces, start = [], [], self.size
        for extension, content in members.items():
            name = f"{key}.{extension}"
            pieces += [_header(name, len(content)), content, bytes(-len(content) % BLOCK)]
            row.append(f"{extension} {start + BLOCK} {len(content)} {name}")
            start += BLOCK + len(content) + len(pieces[-1])
        self._write(b"".join(pieces))
        self.rows += " ".join(row).encode("ascii") + b"\n"
        self.samples += 1

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


def _header(name: str, size: int) -> bytes:
    """Return the header of a read-only file that belongs to nobody, as tarfile writes it, at a tenth of the time."""
    head, middle, tail, checksum = _blank_header()
    named, sized = name.encode("ascii"), b"%011o" % size
    checksum += sum(named) + sum(sized)
    return b"%b%b%b%b%b%06o\0 %b" % (named, bytes(100 - len(named)), head, sized, middle, checksum, tail)


@lru_cache(maxsize=1)
def _blank_header() -> tuple[bytes, bytes, bytes, int]:
    """Return what lies between name, size and checksum and after them, and the checksum of it all."""
    info = tarfile.TarInfo("")
    info.mode = 0o444
    header = info.tobuf(tarfile.USTAR_FORMAT)
    pieces = header[100:124], header[135:148], header[156:]
    return *pieces, sum(map(sum, pieces)) + 8 * ord(" ")


def _holds(tar: Path, shard: Shard) -> bool:
    """Tell whether a tar and its index are bit for bit those of the record."""
    if shard.samples == 0:
        return True
    expected = ((tar, shard.sha256), (index_path(tar), shard.index_sha256))
    return all(file.is_file() and file_sha256(file) == checksum for file, checksum in expected)
