"""Read samples of a sharded set by their place in the tars."""

import os
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from data.jpeg import read_header
from data.manifest import SampleIndex

# All windows of the shuffled order, for one rank alone; below the usual limit of 1024 open files.
_OPEN_TARS = 256
_TAR_BLOCK, _TAR_NAME = 512, 100


@dataclass(frozen=True)
class Sample:
    """An encoded image, uint8 [bytes]; its height and width in pixels once decoded; its class, -1 = none."""

    id: int
    image: NDArray[np.uint8]
    height: int
    width: int
    label: int


@dataclass(frozen=True)
class Damage:
    """A sample whose bytes are not what was packed; the message names shard and member, and says why."""

    sample: int
    message: str


class Reader:
    """Read samples by id. Threads may share it.

    ``locate`` says where a shard lies now, if not where the index says; that place may fail at any time.
    """

    def __init__(self, index: SampleIndex, locate: Callable[[int], Path] | None = None) -> None:
        self._index = index
        self._locate = locate or index.paths.__getitem__
        # Least recently used tars are let go, so that any number of shards stays within the open-file limit.
        self._tar = lru_cache(_OPEN_TARS)(_Tar)

    def read(self, ids: Iterable[int]) -> list[Sample | Damage]:
        """Read samples. Raises ValueError, naming the shard, when the file system refuses."""
        return [self._sample(sample) for sample in ids]

    def close(self) -> None:
        """Let go of the open tars."""
        self._tar.cache_clear()

    def describe(self, sample: int, why: str) -> Damage:
        """Return what to say about a sample that cannot be used."""
        path = self._index.paths[self._index.shard[sample]]
        try:
            header = self._pread(path, _TAR_NAME, int(self._index.offset[sample]) - _TAR_BLOCK)
        except OSError:
            header = b"?"
        # Raw bytes of a damaged tar could steer the terminal that shows them.
        member = ascii(header.partition(b"\0")[0].decode("ascii", "replace"))[1:-1]
        return Damage(
            sample,
            f"{path}: sample {member} is not the image that was packed ({why}); "
            f"find the damage with `coldpress verify shards={path.parent}`",
        )

    def _sample(self, sample: int) -> Sample | Damage:
        index, shard = self._index, int(self._index.shard[sample])
        try:
            image = self._bytes(shard, int(index.offset[sample]), int(index.size[sample]))
            label = self._bytes(shard, int(index.label_offset[sample]), int(index.label_size[sample]))
            height, width = self._size(image)
            return Sample(sample, np.frombuffer(image, np.uint8), height, width, self._class_id(label))
        except _DamagedError as damage:
            return self.describe(sample, str(damage))

    def _bytes(self, shard: int, offset: int, size: int) -> bytes:
        origin = self._index.paths[shard]
        content = b""
        for path in dict.fromkeys((self._locate(shard), origin)):
            try:
                content = self._pread(path, size, offset)
            except OSError as error:
                if path == origin:
                    raise ValueError(f"{path}: {error.strerror}; check the file system.") from error
            if len(content) == size:
                return content
        raise _DamagedError(f"{len(content)} of {size} bytes")

    def _pread(self, path: Path, size: int, offset: int) -> bytes:
        if size == 0:
            return b""
        try:
            # Held by name: a thread that lost the race to open a tar has one that no cache keeps open.
            tar = self._tar(path)
            return os.pread(tar.descriptor, size, offset)
        except OSError:
            # A network file system may have forgotten the open file (ESTALE); a new one is of use then.
            return os.pread(_Tar(path).descriptor, size, offset)

    def _size(self, image: bytes) -> tuple[int, int]:
        header, manifest = read_header(image), self._index.manifest
        if header is None:
            raise _DamagedError("no header of a JPEG")
        if header.height > manifest.max_height or header.width > manifest.max_width:
            raise _DamagedError(f"{header.width} x {header.height} pixels, more than any that was packed")
        return header.height, header.width

    def _class_id(self, label: bytes) -> int:
        if not label:
            return -1
        if not label.isdigit() or int(label) >= len(self._index.manifest.classes):
            raise _DamagedError(f"class {ascii(label[:20])[2:-1]}")
        return int(label)


class _DamagedError(ValueError):
    """Bytes that are not what was packed; the message says why."""


class _Tar:
    """A tar open for reading, closed when the last thread lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)
