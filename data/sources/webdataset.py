"""Images of an existing WebDataset: tars of adjacent members ``key.extension``, one key a sample."""

import json
import os
from collections.abc import Iterator
from enum import Enum
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from data.sources.entries import Entry, Found, Refused, ignored, is_hidden
from data.sources.tars import Member, defect, members

# Of several images of one sample the first of these is the photograph; masks and depths are PNGs as a rule.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "jpe", "jfif", "webp", "png")
_LABEL, _FACTS = "cls", "json"
_PEEKED = 32  # members
_LARGEST_TEXT = 1 << 20


class Sample(NamedTuple):
    """One sample of a shard: its members by lower-case extension."""

    key: str
    members: dict[str, Member]


class TarKind(Enum):
    """What a tar's first members are.

    SHARD: a WebDataset's samples. Else images only: FLAT: in no folder. CLASS: in a folder of the tar's name.
    FOLDERS: in other folders. NEITHER: no images.
    """

    SHARD, FLAT, CLASS, FOLDERS, NEITHER = range(5)


class _Shard(NamedTuple):
    """An open shard and the names of its set's classes."""

    tar: Path
    descriptor: int
    mtime_ns: int
    classes: tuple[str, ...] | None


def kind_of(tar: Path) -> TarKind:
    """Tell by a tar's first members whether it is a WebDataset shard: images with labels or facts beside them."""
    with tar.open("rb") as file:
        first = list(islice(members(file, str(tar)), _PEEKED))
    names = {_parts(member.name) for member in first if not is_hidden(member.name)}
    keys = {key for key, extension in names if extension in IMAGE_EXTENSIONS}
    companions = {extension for key, extension in names if key in keys and (extension == _LABEL or "/" not in key)}
    if not companions.isdisjoint({_LABEL, _FACTS}):
        return TarKind.SHARD
    folders = {key.split("/")[0] for key in keys if "/" in key}
    if not folders:
        return TarKind.FLAT if keys else TarKind.NEITHER
    return TarKind.CLASS if folders == {tar.stem} else TarKind.FOLDERS


def scan_shards(tars: list[Path], classes: tuple[str, ...] | None) -> Iterator[Entry]:
    """Yield the first image of every sample, labelled by its ``cls`` member.

    classes: names of the numbers in ``cls``; without, the numbers are the names. Images of a set of ours
    (``classes`` is not None) have the names of the source that it was made of.
    Raises ValueError when a tar is not a whole, uncompressed one.
    """
    for tar in tars:
        with tar.open("rb") as file:
            shard = _Shard(tar, file.fileno(), os.fstat(file.fileno()).st_mtime_ns, classes)
            hidden: list[Entry] = []
            for sample in _samples(_visible(members(file, str(tar)), hidden)):
                yield from _entries(sample, shard)
            yield from hidden


def _parts(name: str) -> tuple[str, str]:
    """Split a member's name as the webdataset library does: at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _visible(found: Iterator[Member], hidden: list[Entry]) -> Iterator[Member]:
    """Pass on members that are not hidden; those that are may lie between the members of one sample."""
    for member in found:
        if is_hidden(member.name):
            hidden.append(ignored(member.name))
        else:
            yield member


def _samples(found: Iterator[Member]) -> Iterator[Sample]:
    """Group adjacent members of one key; a second one of the same extension starts another sample of that key."""
    for key, group in groupby(found, key=lambda member: _parts(member.name)[0]):
        sample = Sample(key, {})
        for member in group:
            extension = _parts(member.name)[1]
            if extension in sample.members:
                yield sample
                sample = Sample(key, {})
            sample.members[extension] = member
        yield sample


def _entries(sample: Sample, shard: _Shard) -> Iterator[Entry]:
    """Yield a sample's image, and what of the sample does not come along."""
    extension = next((each for each in IMAGE_EXTENSIONS if each in sample.members), None)
    yield _entry(sample, extension, shard)
    used = {extension, _LABEL} if shard.classes is None else {extension, _LABEL, _FACTS}
    for each, member in sample.members.items():
        if each not in used:
            yield ignored(member.name)


def _entry(sample: Sample, extension: str | None, shard: _Shard) -> Entry:
    path = f"{shard.tar.stem}/{sample.key}.{extension or '*'}"
    try:
        label = _label(sample, shard)
    except ValueError as error:
        return Refused(path, str(error))
    if extension is None:
        return Refused(path, f"a sample without an image ({', '.join(IMAGE_EXTENSIONS)})", label)
    image = sample.members[extension]
    if reason := defect(image) or ("hard link" if image.info.islnk() else ""):
        return Refused(path, reason, label)
    name = path if shard.classes is None else _source_path(sample, shard) or path
    return Found(name, str(shard.tar), image.start, image.info.size, shard.mtime_ns, label)


def _label(sample: Sample, shard: _Shard) -> str | None:
    """Return the class's name. Raises ValueError for a label that is none."""
    member = sample.members.get(_LABEL)
    if member is None:
        return None
    text, classes = _read(member, shard).decode("utf-8", "replace").strip(), shard.classes
    if not classes:
        if not text:
            raise ValueError("its label is empty")
        return text
    if not (text.isascii() and text.isdecimal() and int(text) < len(classes)):
        raise ValueError(f"its label {text[:40]!r} is not one of {len(classes)} classes")
    return classes[int(text)]


def _source_path(sample: Sample, shard: _Shard) -> str | None:
    """Return the name that the image had before it was sharded by us."""
    member = sample.members.get(_FACTS)
    try:
        path = json.loads(_read(member, shard))["path"] if member else None
        return path if isinstance(path, str) and path.encode("utf-8", "surrogateescape") else None
    except (ValueError, KeyError, TypeError, RecursionError):
        return None


def _read(member: Member, shard: _Shard) -> bytes:
    if not member.info.isreg():
        return b""
    return os.pread(shard.descriptor, min(member.info.size, _LARGEST_TEXT), member.start)
