"""What a sharded set is: its manifest, and the place of every sample in its tars.

A directory is a finished set if and only if it holds ``manifest.json``, which is written last.
"""

import hashlib
import json
import zlib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from data.publishing import write_atomically

SCHEMA_VERSION = 2
MANIFEST_NAME = "manifest.json"
LEDGER_NAME = ".unfinished"
"""The folder in a set that is not finished; see `data.ledger`."""
INDEX_VERSION = "v1.2"
_REMEDY = "copy it again, or run the `coldpress shard` command of this set once more: it mends what is damaged"


@dataclass(frozen=True)
class Shard:
    """One tar of the set; ``bytes`` is the tar's size, the checksums are hexadecimal SHA-256."""

    name: str
    samples: int
    bytes: int
    sha256: str
    index_sha256: str


@dataclass(frozen=True)
class Manifest:
    """The record of a finished set. Class ids are positions in ``classes``; no classes means no labels.

    max_height, max_width: pixels of the tallest and of the widest image, not one and the same as a rule.
    treatments: how many samples came in by each `data.images` treatment. rejected: rows of the list of rejected
    images beside the shards; rejected_sha256: of that file, empty when there is none.
    """

    schema_version: int
    classes: tuple[str, ...]
    samples: int
    bytes: int
    max_height: int
    max_width: int
    treatments: dict[str, int]
    rejected: int
    rejected_sha256: str
    shards: tuple[Shard, ...]
    source: str
    options: dict[str, Any]

    @classmethod
    def load(cls, directory: Path) -> "Manifest":
        """Read the manifest of a finished set.

        Raises ValueError when it is missing, unreadable, of another schema, or not byte for byte as it was written.
        """
        path = Path(directory) / MANIFEST_NAME
        if not path.is_file():
            raise ValueError(
                f"{directory}: no {MANIFEST_NAME}, so this is not a finished set of shards; "
                "run the `coldpress shard` command that writes it once more, or shard to a new folder."
            )
        content = path.read_bytes()
        try:
            fields = json.loads(content)
        except ValueError as error:
            raise ValueError(f"{path}: not JSON ({error}); shard the source again to a new folder.") from None
        manifest = cls._from_fields(fields, path)
        if _encode(manifest) != content:
            raise ValueError(
                f"{path}: damaged, or edited by hand: its content is not what its sha256 says; "
                "copy it again, or shard the source again to a new folder."
            )
        return manifest

    @classmethod
    def _from_fields(cls, fields: Any, path: Path) -> "Manifest":
        version = fields.get("schema_version") if isinstance(fields, dict) else None
        if version != SCHEMA_VERSION:
            raise ValueError(
                f"{path}: schema_version is {version}, this version of coldpress reads {SCHEMA_VERSION}; "
                "shard the source again to a new folder."
            )
        try:
            fields.pop("sha256")
            shards = tuple(Shard(**shard) for shard in fields.pop("shards"))
            return cls(shards=shards, classes=tuple(fields.pop("classes")), **fields)
        except (KeyError, TypeError) as error:
            raise ValueError(f"{path}: not a manifest ({error}); shard the source again to a new folder.") from None

    def write(self, directory: Path) -> None:
        """Publish the manifest in one step, so that no reader ever sees half of it."""
        write_atomically(Path(directory) / MANIFEST_NAME, _encode(self))

    @property
    def fingerprint(self) -> str:
        """Identify the data of a run: SHA-256 over the shards' checksums, in order."""
        lines = "".join(f"{shard.sha256} {shard.index_sha256}\n" for shard in self.shards)
        return hashlib.sha256(lines.encode("ascii")).hexdigest()


def _encode(manifest: Manifest) -> bytes:
    """Return the file's only form: all fields, then the SHA-256 of those."""
    fields = asdict(manifest)
    checksum = hashlib.sha256(json.dumps(fields).encode("ascii")).hexdigest()
    return (json.dumps(fields | {"sha256": checksum}, indent=1) + "\n").encode("ascii")


@dataclass(frozen=True)
class SampleIndex:
    """Where every sample of a manifest lies. Row number = sample id; rows follow the manifest's order of shards.

    shard int32 [N] (position in ``paths``); offset, size, label_offset, label_size int64 [N] in bytes within
    the tar (label_size 0: no label).
    """

    manifest: Manifest
    paths: tuple[Path, ...]
    shard: NDArray[np.int32]
    offset: NDArray[np.int64]
    size: NDArray[np.int64]
    label_offset: NDArray[np.int64]
    label_size: NDArray[np.int64]

    @classmethod
    def load(cls, directory: Path, manifest: Manifest) -> "SampleIndex":
        """Read every shard's index file.

        Raises ValueError when a tar's size or an index is not the manifest's, or an extent leaves its tar.
        """
        paths = tuple(Path(directory) / shard.name for shard in manifest.shards)
        tables = [_read_shard_index(path, shard) for path, shard in zip(paths, manifest.shards, strict=True)]
        columns = np.concatenate(tables, axis=1) if tables else np.zeros((4, 0), np.int64)
        counts = [shard.samples for shard in manifest.shards]
        shard_of_row = np.repeat(np.arange(len(counts), dtype=np.int32), counts)
        return cls(manifest, paths, shard_of_row, columns[0], columns[1], columns[2], columns[3])

    def __len__(self) -> int:
        return len(self.shard)

    @property
    def counts(self) -> tuple[int, ...]:
        """Return the samples per shard."""
        return tuple(shard.samples for shard in self.manifest.shards)


def index_path(tar: Path) -> Path:
    """Return the index file beside a tar."""
    return tar.with_suffix(".idx")


def _read_shard_index(tar: Path, shard: Shard) -> NDArray[np.int64]:
    """Return offset, size, label_offset and label_size of one shard as int64 [4, samples]."""
    _check_tar_size(tar, shard)
    path = index_path(tar)
    try:
        text = path.read_bytes()
    except FileNotFoundError:
        raise ValueError(f"{path}: missing index; {_REMEDY}.") from None
    # A stale index of another tar reads as silently wrong bytes, so it is bound to its tar by checksum.
    if hashlib.sha256(text).hexdigest() != shard.index_sha256:
        raise ValueError(f"{path}: not the index that {MANIFEST_NAME} names; {_REMEDY}.")
    columns = parse_index(text.decode("ascii", "replace"), path)
    if columns.shape[1] != shard.samples:
        raise ValueError(f"{path}: {columns.shape[1]} samples, {MANIFEST_NAME} says {shard.samples}.")
    for start, size in (columns[:2], columns[2:]):
        if np.any(start < 0) or np.any(size < 0) or np.any(start + size > shard.bytes):
            raise ValueError(f"{path}: an extent leaves {tar.name}; shard the source again to a new folder.")
    return columns


def _check_tar_size(tar: Path, shard: Shard) -> None:
    try:
        size = tar.stat().st_size
    except FileNotFoundError:
        raise ValueError(f"{tar}: missing, but {MANIFEST_NAME} names it; {_REMEDY}.") from None
    if size != shard.bytes:
        raise ValueError(f"{tar}: {size} bytes, {MANIFEST_NAME} says {shard.bytes}; {_REMEDY}.")


def parse_index(text: str, path: Path) -> NDArray[np.int64]:
    """Parse a v1.2 index of rows ``ext offset size name ...`` that all have the same components.

    Returns offset, size, label_offset and label_size as int64 [4, rows]. Raises ValueError on any other text.
    """
    tokens = text.split()
    if len(tokens) < 2 or tokens[0] != INDEX_VERSION or not tokens[1].isdecimal():
        raise ValueError(f"{path}: not a {INDEX_VERSION} index; shard the source again to a new folder.")
    rows = int(tokens[1])
    width, rest = divmod(len(tokens) - 2, rows) if rows else (0, len(tokens) - 2)
    if rest or width % 4:
        raise ValueError(f"{path}: {rows} rows announced, {len(tokens) - 2} fields found; shard again.")
    # Sliced column by column: this is what keeps a million rows at about a second.
    columns = {tokens[2 + start]: start for start in range(0, width, 4)}
    if rows and "jpg" not in columns:
        raise ValueError(f"{path}: no jpg component; shard the source again to a new folder.")
    table = np.zeros((4, rows), np.int64)
    for into, extension in ((table[:2], "jpg"), (table[2:], "cls")):
        if extension in columns:
            start = 2 + columns[extension]
            _fill(into, extension, [tokens[start + field :: width] for field in range(3)], path)
    return table


def _fill(into: NDArray[np.int64], extension: str, fields: list[list[str]], path: Path) -> None:
    """Write one component's offsets and sizes into int64 [2, rows]."""
    extensions, *numbers = fields
    if extensions.count(extension) != into.shape[1]:
        raise ValueError(f"{path}: rows with different components; shard the source again to a new folder.")
    try:
        into[:] = [list(map(int, column)) for column in numbers]
    except (ValueError, OverflowError):
        raise ValueError(
            f"{path}: an offset or size is not a number; shard the source again to a new folder."
        ) from None


def sample_checksum(label: bytes, image: bytes | memoryview) -> int:
    """Return the CRC-32 of a sample's label and image, which its json member holds; fast enough for every read."""
    return zlib.crc32(image, zlib.crc32(label))
