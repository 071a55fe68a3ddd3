"""Read samples of a sharded set by their place in the tars."""

import errno
import json
from collections.abc import Callable, Iterable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from tarfile import BLOCKSIZE

import numpy as np
from numpy.typing import NDArray

from data.jpeg import read_header
from data.manifest import SampleIndex, sample_checksum
from data.open_files import OpenFiles

_NAME_BYTES, _SIZE_FIELD = 100, slice(124, 136)  # of a tar's header
_MOST_FACTS = 1 << 20
_USUAL_HEADER = 4096  # bytes before the first scan; an EXIF thumbnail makes it longer


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

    ``locate`` says where a shard lies now, if not where the index says; whatever is wrong there, the index's place is
    read instead. Every sample is held against the checksum that was packed with it.
    """

    def __init__(self, index: SampleIndex, locate: Callable[[int], Path] | None = None) -> None:
        self._index = index
        self._locate = locate or index.paths.__getitem__
        self._files = OpenFiles()

    def read(self, ids: Iterable[int]) -> list[Sample | Damage]:
        """Read samples. Raises ValueError, naming the shard, when the file system refuses."""
        return [self._sample(sample) for sample in ids]

    def forget(self, path: Path) -> None:
        """Close a tar that is going to be deleted, lest it keep its place on the disk."""
        self._files.forget(path)

    def close(self) -> None:
        """Let go of the open tars."""
        self._files.close()

    def describe(self, sample: int, why: str) -> Damage:
        """Return what to say about a sample that cannot be used."""
        path = self._index.paths[self._index.shard[sample]]
        try:
            header = self._files.read(path, _NAME_BYTES, int(self._index.offset[sample]) - BLOCKSIZE)
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
        shard = int(self._index.shard[sample])
        origin, place = self._index.paths[shard], self._locate(shard)
        if place != origin:
            with suppress(_DamagedError, OSError):
                return self._sample_in(place, sample)
        try:
            return self._sample_in(origin, sample)
        except _DamagedError as damage:
            return self.describe(sample, str(damage))
        except OSError as error:
            if error.errno == errno.EIO:  # a bad sector is one sample's trouble
                return self.describe(sample, "it cannot be read from the disk")
            raise ValueError(f"{origin}: {error.strerror}; check the file system.") from error

    def _sample_in(self, path: Path, sample: int) -> Sample:
        label, image, facts = self._members(path, sample)
        if sample_checksum(label, image.data) != _checksum(facts):
            raise _DamagedError("its checksum is another")
        height, width = self._size(image)
        return Sample(sample, image, height, width, self._class_id(label))

    def _members(self, path: Path, sample: int) -> tuple[bytes, NDArray[np.uint8], bytes]:
        """Read label, image and what was said of it: members that follow each other, hence in one go."""
        index = self._index
        offset, size, label_size = (int(each[sample]) for each in (index.offset, index.size, index.label_size))
        start = int(index.label_offset[sample]) if label_size else offset
        header = offset - start + -(-size // BLOCKSIZE) * BLOCKSIZE
        content = self._whole(path, header + 2 * BLOCKSIZE, start)
        try:
            facts_size = int(content[header:][_SIZE_FIELD].rstrip(b"\0 "), 8)
        except ValueError:
            raise _DamagedError("no facts follow it") from None
        facts = content[header + BLOCKSIZE :]
        if facts_size > BLOCKSIZE:
            facts = self._whole(path, min(facts_size, _MOST_FACTS), start + header + BLOCKSIZE)
        return content[:label_size], np.frombuffer(content, np.uint8, size, offset - start), facts[:facts_size]

    def _whole(self, path: Path, size: int, offset: int) -> bytes:
        content = self._files.read(path, size, offset)
        if len(content) != size:
            raise _DamagedError(f"{len(content)} of {size} bytes")
        return content

    def _size(self, image: NDArray[np.uint8]) -> tuple[int, int]:
        manifest = self._index.manifest
        header = read_header(image[:_USUAL_HEADER].tobytes()) or read_header(image.tobytes())
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


def _checksum(facts: bytes) -> int:
    try:
        return int(json.loads(facts)["crc32"])
    except (ValueError, KeyError, TypeError, RecursionError):
        raise _DamagedError("what was said of it is unreadable") from None


class _DamagedError(ValueError):
    """Bytes that are not what was packed; the message says why."""
