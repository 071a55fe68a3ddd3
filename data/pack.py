"""Write one shard: test-decode its images, pack them into a tar, index it."""

import hashlib
import io
import json
import os
import tarfile
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from PIL import Image

from data.manifest import INDEX_VERSION, Shard, index_path, write_atomically
from data.sources import SourceImage

KEY_DIGITS = 9
BLOCK = 512  # a tar's unit: headers take one, contents are padded to a multiple
SHALLOW_MODES = frozenset(
    {"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr", "LAB", "HSV"}
)


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
    reencoded: int

    @property
    def images(self) -> int:
        return self.shard.samples + len(self.rejected)


class RejectedError(Exception):
    """An image that does not decode; the message says why."""


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
            rejected, reencoded = _add_images(writer, task)
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
    return PackedShard(shard, rejected, reencoded)


def _add_images(writer: "_TarWriter", task: ShardTask) -> tuple[list[tuple[str, str]], int]:
    """Add every image that decodes; return what was rejected and how many were re-encoded."""
    rejected, reencoded = [], 0
    for position, image in enumerate(task.images, start=task.first):
        original = image.read()
        try:
            jpeg, width, height = as_jpeg(original, task.shorter_side)
        except RejectedError as reason:
            rejected.append((image.path, str(reason)))
            continue
        reencoded += jpeg is not original
        members = {} if image.label is None else {"cls": str(task.class_ids[image.label]).encode("ascii")}
        facts = {"path": image.path, "width": width, "height": height}
        members |= {"jpg": jpeg, "json": json.dumps(facts).encode("ascii")}
        writer.add(f"{position:0{KEY_DIGITS}d}", members)
    return rejected, reencoded


def as_jpeg(encoded: bytes, shorter_side: int = 0) -> tuple[bytes, int, int]:
    """Return (JPEG, width, height): the same bytes if they are a gray or RGB JPEG, else a new RGB one.

    An image whose shorter side exceeds ``shorter_side`` pixels is scaled down to it; 0 keeps every size.
    Raises RejectedError when the image does not decode completely.
    """
    try:
        with warnings.catch_warnings(action="ignore"), Image.open(io.BytesIO(encoded)) as image:
            image.load()
            if 0 < shorter_side < min(image.size):
                small = _scale(image, shorter_side)
                return _encode(small), small.width, small.height
            if image.format == "JPEG" and image.mode in ("RGB", "L"):
                return encoded, image.width, image.height
            return _encode(image), image.width, image.height
    except (MemoryError, RejectedError):
        raise
    except Exception as error:  # damaged files make Pillow's plugins raise almost anything
        raise RejectedError(str(error).partition("<_io")[0].strip() or type(error).__name__) from None


def _scale(image: Image.Image, shorter_side: int) -> Image.Image:
    factor = shorter_side / min(image.size)
    size = (round(image.width * factor), round(image.height * factor))
    return _as_rgb(image).resize(size, Image.Resampling.BICUBIC)


def _as_rgb(image: Image.Image) -> Image.Image:
    if image.mode not in SHALLOW_MODES:
        raise RejectedError(f"mode {image.mode} has more than 8 bits per channel")
    return image.convert("RGB")


def _encode(image: Image.Image) -> bytes:
    out = io.BytesIO()
    _as_rgb(image).save(out, "JPEG", quality=95, subsampling="4:4:4")
    return out.getvalue()


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
