"""Where the images to be sharded lie, and what their classes are.

A scan reads directory entries, tar headers and labels only. Every image found is an extent of some file, so
that any process can read any image at random without unpacking anything.
"""

import hashlib
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.order import hashed
from data.sources.classes import ClassIds, folder_classes, read_class_list
from data.sources.entries import REMEDY, Entry, Refused, is_hidden, is_image
from data.sources.folder import scan_folder
from data.sources.labels import LabelFile
from data.sources.lists import LIST_SUFFIXES, scan_list
from data.sources.table import SourceImage, SourceSlice, Table
from data.sources.tars import scan_class_tars, scan_tar
from data.sources.webdataset import classes_of, is_shard, scan_shards

_BLOCK = 1 << 20  # samples whose places are drawn at once


@dataclass(frozen=True)
class Listing:
    """What lies at a source's path: its entries, and what its kind says about classes.

    root: the folder that paths are relative to. named: entries bring their labels, else folders are classes.
    classes: all classes in their order, where the source knows it.
    """

    entries: Iterator[Entry]
    root: Path
    named: bool = False
    classes: tuple[str, ...] | None = None


class Source:
    """All images of a source, each name once, in an order of their names' hashes; iterating gives SourceImages.

    classes: names, class ids are positions in them (none: unlabelled). rejected: (path, reason) of what a scan
    can tell to be no image. duplicates: how many images were left out for a later one of the same name.
    fingerprint: identifies names, labels, extents and modification times, not the source's place.
    """

    def __init__(self, listing: Listing, labels: LabelFile | None, wanted: frozenset[str]) -> None:
        """Raises ValueError for unlabelled images among labelled ones and for wanted classes that are not there."""
        self._table = Table(str(listing.root))
        rejected = _fill(self._table, listing.entries)
        rows = _canonical(self._table)
        self.duplicates = len(self._table) - len(rows)
        ids = ClassIds(wanted)
        content = _add_labels(ids, self._table, _labels(self._table, listing, labels, wanted))
        del self._table.given[:]
        known = None if labels else listing.classes
        self.classes, self._labels = ids.ordered(known, numbered=listing.named or labels is not None)
        self.fingerprint = hashlib.sha256(f"{content} {self.classes}".encode("utf-8", "backslashreplace")).hexdigest()
        self.rejected = sorted(r for r in rejected if not wanted or not wanted.isdisjoint(r[0].split("/")))
        self._rows = rows[self._labels[rows] >= 0] if wanted else rows

    def __len__(self) -> int:
        return len(self._rows)

    def __iter__(self) -> Iterator[SourceImage]:
        return iter(self.take(self._rows))

    def shuffled(self, seed: int) -> NDArray[np.uint32]:
        """Return the rows of all images in an order that depends on their names and the seed only."""
        # 32 bits of hash above the position, so that one sort in place does; positions follow from names, too.
        packed = np.arange(len(self), dtype=np.uint64)
        for first in range(0, len(self), _BLOCK):
            block = slice(first, first + _BLOCK)
            keys = hashed(seed, self._table.keys_of(self._rows[block]).view(np.int64))
            packed[block] |= keys & np.uint64(0xFFFF_FFFF_0000_0000)
        packed.sort()
        return self._rows[packed.astype(np.uint32)]

    def sizes(self, rows: NDArray[np.uint32]) -> NDArray[np.int64]:
        """Return the encoded bytes of some rows."""
        return self._table.sizes()[rows]

    def take(self, rows: NDArray[np.uint32]) -> SourceSlice:
        """Return the images of some rows, in that order."""
        return self._table.take(rows, self._labels)

    def unlabelled(self) -> str | None:
        """Return the name of an image without a class, None if there is none."""
        rows = self._rows[self._labels[self._rows] < 0]
        return self._table.name(int(rows.min())) if len(rows) else None


def scan(path: Path, labels: str = "", classes: str = "") -> Source:
    """List the images of a source.

    labels: file of the images' classes (`data.sources.labels`). classes: the name or file of a list of those to keep.
    Raises ValueError for a missing path, a damaged tar, unusable lists, or a source without images.
    """
    wanted = read_class_list(classes)
    label_file = LabelFile(Path(labels)) if labels else None
    # Folders named by classes tell nothing where a file says the classes.
    listing = _list(path, frozenset() if labels else wanted)
    try:
        source = Source(listing, label_file, wanted)
    except OSError as error:
        raise ValueError(
            f"shard.source: cannot list {path} ({error.strerror}: {error.filename or 'TMPDIR'})."
        ) from None
    _refuse_unusable(source, path, wanted)
    return source


def _refuse_unusable(source: Source, path: Path, wanted: frozenset[str]) -> None:
    missing = sorted(wanted - set(source.classes))
    if missing:
        raise ValueError(
            f"shard.classes: {len(missing)} of {len(wanted)} classes are not in {path}: {', '.join(missing[:5])}"
            f"{', ...' if len(missing) > 5 else ''}; take them off the list or give the source that has them."
        )
    if not len(source) and not source.rejected:
        raise ValueError(f"shard.source: no image in {path}; {REMEDY}.")
    unlabelled = source.unlabelled()
    if source.classes and unlabelled is not None:
        raise ValueError(f"shard.source: {path} has images with a class and images without ({unlabelled}); {REMEDY}.")


def _list(path: Path, wanted: frozenset[str]) -> Listing:
    """Choose the reader of a source by what lies at its path."""
    if path.is_dir():
        return _list_folder(path, wanted)
    if not path.is_file():
        raise ValueError(f"shard.source: no such file or folder {path}; {REMEDY}.")
    if path.suffix.lower() in LIST_SUFFIXES:
        return Listing(scan_list(path), path.parent, named=True)
    if is_shard(path):
        return Listing(scan_shards([path], None), path.parent, named=True)
    return Listing(scan_tar(path, wanted), path.parent)


def _list_folder(path: Path, wanted: frozenset[str]) -> Listing:
    with os.scandir(path) as found:
        entries = sorted((entry for entry in found if not is_hidden(entry.name)), key=lambda entry: entry.name)
    tars = [Path(entry.path) for entry in entries if entry.name.endswith(".tar")]
    if not tars:
        return Listing(scan_folder(path, wanted), path)
    others = [entry.name for entry in entries if entry.is_dir() or is_image(entry.name)]
    if others:
        raise ValueError(f"shard.source: {path} holds tars and, beside them, {others[0]}; {REMEDY}.")
    if is_shard(tars[0]):
        classes = classes_of(path)
        return Listing(scan_shards(tars, classes), path, named=True, classes=classes)
    return Listing(scan_class_tars(tars, wanted), path)


def _fill(table: Table, entries: Iterable[Entry]) -> list[tuple[str, str]]:
    """Add all images to the table; return what was refused."""
    refused = []
    for entry in tqdm(entries, desc="listing", unit=" images", disable=None):
        if isinstance(entry, Refused):
            refused.append((entry.path, entry.reason))
        else:
            table.add(entry)
    table.close()
    return refused


def _labels(table: Table, listing: Listing, labels: LabelFile | None, wanted: frozenset[str]) -> Iterator[str | None]:
    """Yield the class name of every row."""
    if labels is not None:
        return labels.labels(table.names())
    if listing.named:
        return (table.label_names[given] if given >= 0 else None for given in table.given)
    try:
        return folder_classes(table.names, wanted)
    except ValueError as error:
        raise ValueError(f"shard.source: {listing.root} {error}; {REMEDY}.") from None


def _add_labels(ids: ClassIds, table: Table, labels: Iterator[str | None]) -> str:
    """Assign the labels to the table's rows; return a digest of both, in whatever order."""
    total = 0
    for (path, offset, size, mtime_ns), label in zip(table.entries(), labels, strict=True):
        ids.add(label)
        line = f"{path}\0{label}\0{offset}\0{size}\0{mtime_ns}".encode("utf-8", "surrogateescape")
        total += int.from_bytes(hashlib.blake2b(line, digest_size=16).digest(), "little")
    return f"{total % (1 << 128):032x}"


def _canonical(table: Table) -> NDArray[np.uint32]:
    """Return the rows in the order of their names' hashes; of rows of one name the last only."""
    rows = table.sorted_rows()
    superseded = np.zeros(len(rows), bool)
    if len(rows):
        np.equal(table.keys_of(rows[1:]), table.keys_of(rows[:-1]), out=superseded[:-1])
    for place in np.flatnonzero(superseded).tolist():
        # As in tar, the last of several of one name counts. Of different names, hashes are as good as never equal.
        superseded[place] = table.name(int(rows[place])) == table.name(int(rows[place + 1]))
    return rows[~superseded]
