"""Which kind of source lies at a path: a folder, a tar, tars of classes, a WebDataset, or a list."""

import os
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

from data.sources.entries import REMEDY, Entry, ignored, is_hidden, is_image, is_packed_tar, is_tar, packed_tar
from data.sources.folder import scan_folder
from data.sources.lists import LIST_SUFFIXES, scan_list
from data.sources.ours import files_beside, refuse_unfinished, whole_set
from data.sources.tars import scan_class_tars, scan_tar
from data.sources.webdataset import TarKind, kind_of, scan_shards

_PEEKED = 3  # tars, from both ends: looking into each would open every file twice
# The name that WebDataset writers give: train-000017.tar, 00017.tar.
_SHARD_NAME = re.compile(r"(?P<prefix>.*?)(?P<number>\d{5,})")
# A name that may be a class or a shard: class_0.tar, part-17.tar, 3.tar.
_NUMBERED = re.compile(r"(.*[-_.])?\d+")


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


def list_source(path: Path, wanted: frozenset[str], has_labels: bool) -> Listing:
    """Choose the reader of a source by what lies at its path.

    wanted: classes; folders and tars of others are not looked into. has_labels: a file says the classes, so that
    neither folders nor tars need to. Raises ValueError for what is no source, and for what may be two kinds of one.
    """
    if path.is_dir():
        return _list_folder(path, wanted, has_labels)
    if not path.is_file():
        raise ValueError(f"shard.source: no such file or folder {path}; {REMEDY}.")
    if path.suffix.lower() in LIST_SUFFIXES:
        return Listing(scan_list(path), path.parent, named=True)
    if is_packed_tar(path.name):
        raise packed_tar(str(path))
    if kind_of(path) is TarKind.SHARD:
        return Listing(scan_shards([path], None), path.parent, named=True)
    return Listing(scan_tar(path, wanted), path.parent)


def _list_folder(path: Path, wanted: frozenset[str], has_labels: bool) -> Listing:
    refuse_unfinished(path)
    with os.scandir(path) as found:
        entries = sorted(found, key=lambda entry: entry.name)
    tars = [Path(entry.path) for entry in entries if is_tar(entry.name)]
    packed = [entry.path for entry in entries if is_packed_tar(entry.name)]
    image = next((entry.name for entry in entries if _is_image_or_folder(entry)), None)
    if packed and (tars or image is None):  # beside class folders it may be anything
        raise packed_tar(packed[0])
    manifest = whole_set(path, tars) if image is None else None
    if not tars:
        return Listing(scan_folder(path, wanted), path)
    if image is not None:
        raise ValueError(f"shard.source: {path} holds tars and, beside them, {image}; {REMEDY}.")
    others = (entry.name for entry in entries if not is_tar(entry.name))
    if manifest is not None:
        beside = map(ignored, sorted(set(others) - files_beside(manifest)))
        return Listing(chain(beside, scan_shards(tars, manifest.classes)), path, named=True, classes=manifest.classes)
    return _list_tars(path, tars, map(ignored, others), wanted, has_labels)


def _is_image_or_folder(entry: "os.DirEntry[str]") -> bool:
    return not is_hidden(entry.name) and (is_image(entry.name) or os.path.isdir(entry.path))


def _list_tars(
    path: Path, tars: list[Path], beside: Iterator[Entry], wanted: frozenset[str], has_labels: bool
) -> Listing:
    named_by_class = any(tar.stem in wanted for tar in tars)
    if not named_by_class and _are_shards(path, tars, has_labels):
        return Listing(chain(beside, scan_shards(tars, None)), path, named=True)
    return Listing(chain(beside, scan_class_tars(tars, wanted)), path)


def _are_shards(folder: Path, tars: list[Path], has_labels: bool) -> bool:
    """Tell shards from class tars, by what is in them first.

    Raises ValueError for numbered tars of images only, unless they are named as WebDataset writers name shards.
    """
    kinds = {kind_of(tar) for tar in dict.fromkeys([*tars[:_PEEKED], *tars[-_PEEKED:]])}
    if TarKind.SHARD in kinds:
        return True
    if not all(_NUMBERED.fullmatch(tar.stem) for tar in tars) or kinds <= {TarKind.CLASS, TarKind.NEITHER}:
        return False
    if TarKind.FOLDERS not in kinds and _are_consecutive(tar.stem for tar in tars):
        return True
    if has_labels or (len(tars) == 1 and TarKind.FOLDERS in kinds):
        return False
    raise ValueError(
        f"shard.source: {folder} holds {tars[0].name}, which may be a class or a part of an unlabelled set; put class "
        "tars into one tar, name the parts of a set train-000000.tar and so on, or give labels=."
    )


def _are_consecutive(stems: Iterable[str]) -> bool:
    """Tell whether tars are named prefix-000000, prefix-000001 and so on."""
    matches = [_SHARD_NAME.fullmatch(stem) for stem in stems]
    found = [(match["prefix"], len(match["number"]), int(match["number"])) for match in matches if match]
    numbers = {number for _, _, number in found}
    one_series = len({(prefix, width) for prefix, width, _ in found}) == 1
    return len(found) == len(matches) and one_series and max(numbers) - min(numbers) == len(numbers) - 1
