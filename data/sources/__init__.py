"""Where the images to be sharded lie, and what their classes are.

A scan reads directory entries, tar headers and labels only. Every image found is an extent of some file, so
that any process can read any image at random without unpacking anything.
"""

import hashlib
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from data.order import hashed
from data.sources.classes import ClassIds, Layout, folder_classes, read_class_list
from data.sources.entries import OTHER_CLASSES, REMEDY, Entry, Found, Refused
from data.sources.kinds import Listing, list_source
from data.sources.labels import LabelFile
from data.sources.lists import LIST_SUFFIXES
from data.sources.table import SourceImage, SourceSlice, Table

__all__ = ["Listing", "Source", "describe", "scan"]

_GROUPS_SHOWN = 8
_BLOCK = 1 << 20  # samples whose places are drawn at once


class Source:
    """All images of a source, each name once, in an order of their names' hashes; iterating gives SourceImages.

    classes: names, class ids are positions in them (none: unlabelled). rejected: (path, reason) of what a scan
    can tell to be no image, and of images of which a later one has the name. ignored: how many files of each group
    do not claim to be images, or are not wanted. Samples, rejected and ignored together are all that was seen.
    fingerprint: identifies names, labels, extents and modification times, not the source's place.
    """

    def __init__(self, listing: Listing, labels: LabelFile | None, wanted: frozenset[str]) -> None:
        """Raises ValueError for unlabelled images among labelled ones and for one image of two classes."""
        self._table, self.ignored = Table(str(listing.root)), Counter[str]()
        refused, layout = _fill(self._table, listing.entries, self.ignored)
        # Names are hashed without the folders before the classes, so that a folder and a tar of it agree.
        if layout.leading:
            self._table.rename_keys(layout.leading)
        rows, superseded = _canonical(self._table)
        ids = ClassIds(wanted)
        content = _add_labels(ids, self._table, _labels(self._table, listing, layout, labels, wanted))
        self.classes, self._labels = ids.ordered(None if labels else listing.classes)
        identity = f"{content} {self.classes} {layout.leading}"
        self.fingerprint = hashlib.sha256(identity.encode("utf-8", "backslashreplace")).hexdigest()
        self._rows = rows[self._labels[rows] >= 0] if wanted else rows
        kept = [each for each in refused if _is_wanted(each, listing, labels, wanted)]
        self.rejected = sorted([*((each.path, each.reason) for each in kept), *self._duplicates(superseded, wanted)])
        del self._table.given[:]
        self.ignored[f"images {OTHER_CLASSES}"] += len(rows) - len(self._rows) + len(refused) - len(kept)
        self.ignored = +self.ignored

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

    def _duplicates(self, superseded: NDArray[np.uint32], wanted: frozenset[str]) -> Iterator[tuple[str, str]]:
        """Yield (path, reason) of rows that a later one of their name replaces; count those that say the same twice."""
        for row, later in superseded.tolist():
            if self._table.are_one_extent(row, later):
                self._refuse_two_classes(row, later)
                self.ignored["listed again"] += 1
            elif wanted and self._labels[row] < 0:
                self.ignored[f"images {OTHER_CLASSES}"] += 1
            else:
                yield self._table.name(row), "a duplicate: a later one of its name counts"

    def _refuse_two_classes(self, row: int, other: int) -> None:
        labels = [self._table.given_label(each) or "none" for each in (row, other)]
        if labels[0] != labels[1]:
            raise ValueError(
                f"shard.source: {self._table.name(row)} has two classes, {labels[0]} and {labels[1]}; keep one of them."
            )

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
    try:
        # Folders named by classes tell nothing where a file says the classes.
        listing = list_source(path, frozenset() if labels else wanted, bool(labels))
        source = Source(listing, label_file, wanted)
    except OSError as error:
        raise ValueError(
            f"shard.source: cannot list {path} ({error.strerror}: {error.filename or 'TMPDIR'}); mend that and run the "
            "same command again."
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
        seen = f" (ignored {describe(source.ignored)})" if source.ignored else ""
        raise ValueError(f"shard.source: no image in {path}{seen}; {REMEDY}.")
    unlabelled = source.unlabelled()
    if source.classes and unlabelled is not None:
        remedy = "give every row of the list a label, or none" if path.suffix.lower() in LIST_SUFFIXES else REMEDY
        raise ValueError(f"shard.source: {path} has images with a class and images without ({unlabelled}); {remedy}.")


def describe(ignored: Counter[str]) -> str:
    """Return a count of ignored files and, largest first, its groups: ``5 (.txt 3, .avif 2)``."""
    groups = sorted(ignored.items(), key=lambda group: (-group[1], group[0]))
    named = [f"{group} {count}" for group, count in groups[:_GROUPS_SHOWN]]
    others = sum(count for _, count in groups[_GROUPS_SHOWN:])
    return f"{ignored.total()} ({', '.join([*named, f'others {others}'] if others else named)})"


def _fill(table: Table, entries: Iterable[Entry], ignored: Counter[str]) -> tuple[list[Refused], Layout]:
    """Add all images to the table; count what is ignored; return what was refused and how the images' names look."""
    refused, layout = [], Layout()
    for entry in tqdm(entries, desc="listing", unit=" images", disable=None):
        if isinstance(entry, Found):
            table.add(entry)
            layout.add(entry.path)
        elif isinstance(entry, Refused):
            refused.append(entry)
        else:
            ignored[entry.group] += 1
    table.close()
    return refused, layout


def _is_wanted(refused: Refused, listing: Listing, labels: LabelFile | None, wanted: frozenset[str]) -> bool:
    """Tell whether something refused could have been an image of a wanted class; of an unknown class it could."""
    if not wanted:
        return True
    if not labels and not listing.named:
        return not wanted.isdisjoint(refused.path.split("/"))
    label = labels.find(refused.path) if labels else refused.label
    return label is None or label in wanted


def _labels(
    table: Table, listing: Listing, layout: Layout, labels: LabelFile | None, wanted: frozenset[str]
) -> Iterator[str | None]:
    """Yield the class name of every row."""
    if labels is not None:
        yield from labels.labels(table.names())
        return
    if listing.named:
        yield from (table.label_names[given] if given >= 0 else None for given in table.given)
        return
    try:
        yield from folder_classes(table.names(), layout, wanted)
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


def _canonical(table: Table) -> tuple[NDArray[np.uint32], NDArray[np.uint32]]:
    """Return the rows in the order of their names' hashes, of one name the last; and (row, next of its name) [n, 2]."""
    rows = table.sorted_rows()
    superseded = np.zeros(len(rows), bool)
    if len(rows):
        np.equal(table.keys_of(rows[1:]), table.keys_of(rows[:-1]), out=superseded[:-1])
    for place in np.flatnonzero(superseded).tolist():
        # As in tar, the last of several of one name counts. Of different names, hashes are as good as never equal.
        superseded[place] = table.name(int(rows[place])) == table.name(int(rows[place + 1]))
    places = np.flatnonzero(superseded)
    return rows[~superseded], np.stack((rows[places], rows[places + 1]), axis=1)
