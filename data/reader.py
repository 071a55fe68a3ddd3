"""Read samples of a sharded set by their place in the tars."""

import io
import os
import struct
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from PIL import Image

from data.manifest import SampleIndex

# A window of the shuffled order and the next one; far below the usual limit of 1024 open files.
_OPEN_TARS = 64
_NO_PAYLOAD = frozenset({0x01, *range(0xD0, 0xD9)})
_START_OF_FRAME = frozenset(range(0xC0, 0xD0)) - {0xC4, 0xC8, 0xCC}
_END_OF_HEADERS = frozenset({0xD9, 0xDA})
_TAR_BLOCK, _TAR_NAME = 512, 100


@dataclass(frozen=True)
class Sample:
    """An encoded image, uint8 [bytes]; its height and width in pixels once decoded; its class, -1 = none."""

    image: NDArray[np.uint8]
    height: int
    width: int
    label: int


class Reader:
    """Read samples by id. Threads may share it."""

    def __init__(self, index: SampleIndex) -> None:
        self._index = index
        # Least recently used tars are let go, so that any number of shards stays within the open-file limit.
        self._tar = lru_cache(_OPEN_TARS)(_Tar)

    def read(self, ids: Iterable[int]) -> list[Sample]:
        """Read samples. Raises ValueError, naming shard and member, for bytes that are not what was packed."""
        return [self._sample(sample) for sample in ids]

    def first_undecodable(self, ids: Iterable[int]) -> ValueError | None:
        """Find the sample that a decoder gave up on; return the error that names it."""
        for sample in ids:
            try:
                Image.open(io.BytesIO(self._sample(sample).image.tobytes())).load()
            except ValueError as error:
                return error
            except (OSError, SyntaxError) as error:
                return self._broken(sample, str(error))
        return None

    def close(self) -> None:
        """Let go of the open tars."""
        self._tar.cache_clear()

    def _sample(self, sample: int) -> Sample:
        index = self._index
        image = self._bytes(sample, int(index.offset[sample]), int(index.size[sample]))
        label = self._bytes(sample, int(index.label_offset[sample]), int(index.label_size[sample]))
        try:
            height, width = jpeg_size(image)
            return Sample(np.frombuffer(image, np.uint8), height, width, int(label) if label else -1)
        except ValueError as error:
            raise self._broken(sample, str(error)) from None

    def _bytes(self, sample: int, offset: int, size: int) -> bytes:
        path = self._index.paths[self._index.shard[sample]]
        try:
            # Held by name: a thread that lost the race to open a tar has one that no cache keeps open.
            tar = self._tar(path)
            content = os.pread(tar.descriptor, size, offset) if size else b""
        except OSError as error:
            raise ValueError(f"{path}: {error.strerror}; check the file system.") from error
        if len(content) != size:
            raise self._broken(sample, f"{len(content)} of {size} bytes")
        return content

    def _broken(self, sample: int, why: str) -> ValueError:
        path = self._index.paths[self._index.shard[sample]]
        header = os.pread(self._tar(path).descriptor, _TAR_NAME, int(self._index.offset[sample]) - _TAR_BLOCK)
        member = header.partition(b"\0")[0].decode("ascii", "replace")
        return ValueError(
            f"{path}: sample {member} is not the image that was packed ({why}); "
            f"find the damage with `coldpress verify shards={path.parent}`."
        )


class _Tar:
    """A tar open for reading, closed when the last thread lets go of it."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def __del__(self) -> None:
        if hasattr(self, "descriptor"):
            os.close(self.descriptor)


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Return height and width from the frame header of a JPEG (ITU-T T.81, annex B).

    Raises ValueError when there is none.
    """
    if data[:2] != b"\xff\xd8":
        raise ValueError("not a JPEG")
    position = 2
    while position + 9 <= len(data) and data[position] == 0xFF:
        marker = data[position + 1]
        if marker in _START_OF_FRAME:
            height, width = struct.unpack_from(">HH", data, position + 5)
            if height and width:
                return height, width
            break
        if marker in _END_OF_HEADERS:
            break
        position += _segment_bytes(data, position, marker)
    raise ValueError("a JPEG without a frame header")


def _segment_bytes(data: bytes, position: int, marker: int) -> int:
    if marker == 0xFF:  # a fill byte
        return 1
    if marker in _NO_PAYLOAD:
        return 2
    (length,) = struct.unpack_from(">H", data, position + 2)
    return 2 + int(length)
