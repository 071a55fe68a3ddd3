"""The list of a source's images, of any length in little memory.

Rows and names lie in unnamed temporary files (about 80 bytes an image); what stays in memory of each image is a hash
of its name, its class and its place in the order, 24 bytes together.
"""

import os
import struct
import tempfile
from array import array
from collections.abc import Iterator
from dataclasses import dataclass
from hashlib import blake2b
from typing import BinaryIO, NamedTuple, cast

import numpy as np
from numpy.typing import NDArray

from data.sources.entries import OWN_FILE, Found

# name_start, offset, size, mtime_ns, file, name_length
_ROW = struct.Struct("<qqqqiI")
_SIZES = np.dtype({"names": ["size"], "formats": ["<i8"], "offsets": [16], "itemsize": _ROW.size})
_OWN = -1  # in place of a file: the image's own
_CHUNK = 1 << 14  # rows


class SourceImage(NamedTuple):
    """An image as `data.sources.entries.Found`; ``file`` is to be opened, ``label`` a class id, -1 for none."""

    path: str
    label: int
    file: str
    offset: int
    size: int
    mtime_ns: int
    archived: bool


@dataclass(frozen=True)
class SourceSlice:
    """Some images of a source in a few bytes each, to be sent to another process. Iterating gives SourceImages."""

    root: str
    files: dict[int, str]  # those of its own rows only: of ten thousand archives every task needs a few
    rows: bytes
    names: bytes
    labels: bytes

    def __len__(self) -> int:
        return len(self.rows) // _ROW.size

    def __iter__(self) -> Iterator[SourceImage]:
        start = 0
        labels = np.frombuffer(self.labels, np.int32).tolist()
        for label, row in zip(labels, _ROW.iter_unpack(self.rows), strict=True):
            _, offset, size, mtime_ns, file, length = row
            path = _text(self.names[start : start + length])
            start += length
            place = os.path.join(self.root, path) if file < 0 else self.files[file]
            yield SourceImage(path, label, place, offset, size, mtime_ns, file >= 0)


class Table:
    """All images found, in the order of the scan. Row numbers are positions in it."""

    def __init__(self, root: str) -> None:
        self.root = root
        self.files: list[str] = []
        self.label_names: list[str] = []
        self.given = array("i")  # positions in label_names, -1 for none
        self.keys = array("Q")
        self._rows, self._names = _temporary(), _temporary()
        self._names_size = 0
        self._file_ids: dict[str, int] = {OWN_FILE: _OWN}
        self._label_ids: dict[str | None, int] = {None: -1}

    def __len__(self) -> int:
        return len(self.keys)

    def add(self, found: Found) -> None:
        """Append an image."""
        name = _encoded(found.path)
        file = self._file_ids.get(found.file)
        if file is None:
            file = self._file_ids[found.file] = len(self.files)
            self.files.append(found.file)
        label = self._label_ids.get(found.label)
        if label is None:
            label = self._label_ids[found.label] = len(self.label_names)
            self.label_names.append(str(found.label))
        self._rows.write(_ROW.pack(self._names_size, found.offset, found.size, found.mtime_ns, file, len(name)))
        self._names.write(name)
        self._names_size += len(name)
        self.keys.append(name_key(name))
        self.given.append(label)

    def close(self) -> None:
        """Bring what was added to the files; needed before anything is read."""
        self._rows.flush()
        self._names.flush()

    def entries(self) -> Iterator[tuple[str, int, int, int]]:
        """Yield (path, offset, size, mtime_ns) of every row, in the order of the scan."""
        for first in range(0, len(self), _CHUNK):
            rows = os.pread(self._rows.fileno(), _CHUNK * _ROW.size, first * _ROW.size)
            table = list(_ROW.iter_unpack(rows))
            start = table[0][0]
            names = os.pread(self._names.fileno(), table[-1][0] + table[-1][5] - start, start)
            for name_start, offset, size, mtime_ns, _, length in table:
                name = names[name_start - start : name_start - start + length]
                yield _text(name), offset, size, mtime_ns

    def names(self) -> Iterator[str]:
        """Yield the path of every row, in the order of the scan."""
        return (path for path, _, _, _ in self.entries())

    def rename_keys(self, leading: int) -> None:
        """Hash the names anew, without some leading folders that all of them have."""
        keys = (name_key(_encoded(name.split("/", leading)[leading])) for name in self.names())
        self.keys = array("Q", keys)

    def keys_of(self, rows: NDArray[np.uint32]) -> NDArray[np.uint64]:
        """Return the hashes of the names of some rows."""
        return np.frombuffer(self.keys, np.uint64)[rows]

    def sorted_rows(self) -> NDArray[np.uint32]:
        """Return all rows by the hashes of their names; of one hash in the order of the scan."""
        # Row numbers take half of what argsort gives; no list has 2^32 images.
        return np.argsort(np.frombuffer(self.keys, np.uint64), kind="stable").astype(np.uint32)

    def name(self, row: int) -> str:
        """Return the path of one row."""
        return _text(self._name(self._row(row)))

    def given_label(self, row: int) -> str | None:
        """Return the label that the source itself gives to a row."""
        given = self.given[row]
        return None if given < 0 else self.label_names[given]

    def are_one_extent(self, row: int, other: int) -> bool:
        """Tell whether two rows are the same bytes of the same file."""
        return _ROW.unpack(self._row(row))[1:5] == _ROW.unpack(self._row(other))[1:5]

    def sizes(self) -> NDArray[np.int64]:
        """Return the encoded bytes of every row, int64 [rows]."""
        sizes = np.empty(len(self), np.int64)
        for first in range(0, len(self), _CHUNK):
            rows = os.pread(self._rows.fileno(), _CHUNK * _ROW.size, first * _ROW.size)
            sizes[first : first + _CHUNK] = np.frombuffer(rows, _SIZES)["size"]
        return sizes

    def take(self, rows: NDArray[np.uint32], labels: NDArray[np.int32]) -> SourceSlice:
        """Return the images of some rows, in that order."""
        packed = [self._row(row) for row in rows.tolist()]
        names = b"".join(map(self._name, packed))
        used = {_ROW.unpack(row)[4] for row in packed} - {_OWN}
        files = {file: self.files[file] for file in sorted(used)}
        return SourceSlice(self.root, files, b"".join(packed), names, labels[rows].tobytes())

    def _row(self, row: int) -> bytes:
        return os.pread(self._rows.fileno(), _ROW.size, row * _ROW.size)

    def _name(self, row: bytes) -> bytes:
        start, *_, length = _ROW.unpack(row)
        return os.pread(self._names.fileno(), length, start)


def _temporary() -> BinaryIO:
    return cast(BinaryIO, tempfile.TemporaryFile())  # it is gone with the process, however that ends


def name_key(name: bytes) -> int:
    """Hash a name to 64 bits: the same on every machine, whatever the order of the scan."""
    return int.from_bytes(blake2b(name, digest_size=8).digest(), "little")


def _encoded(path: str) -> bytes:
    return path.encode("utf-8", "surrogateescape")


def _text(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")
