"""Images of an existing WebDataset: tars of adjacent members ``key.extension``, one key a sample."""

import json
import os
import re
from collections.abc import Iterator
from itertools import groupby, islice
from pathlib import Path
from typing import NamedTuple

from data.manifest import MANIFEST_NAME, Manifest
from data.sources.entries import Entry, Found, Refused, is_hidden
from data.sources.tars import Member, defect, members

# Of several images of one sample the first of these is the photograph; masks and depths are PNGs as a rule.
IMAGE_EXTENSIONS = ("jpg", "jpeg", "webp", "png")
_LABEL, _FACTS = "cls", "json"
_PEEKED = 32  # members
_LARGEST_TEXT = 1 << 20


class Sample(NamedTuple):
    """One sample of a shard: its members by lower-case extension."""

    key: str
    members: dict[str, Member]


class _Shard(NamedTuple):
    """An open shard and the names of its set's classes."""

    tar: Path
    descriptor: int
    mtime_ns: int
    classes: tuple[str, ...] | None


def is_shard(tar: Path) -> bool:
    """Tell by a tar's first members whether it is a WebDataset shard: images with labels or facts beside them."""
    with tar.open("rb") as file:
        first = list(islice(members(file, str(tar)), _PEEKED))
    names = {_parts(member.name) for member in first if not is_hidden(member.name)}
    keys = {key for key, extension in names if extension in IMAGE_EXTENSIONS}
    companions = {extension for key, extension in names if key in keys and (extension == _LABEL or "/" not in key)}
    return not companions.isdisjoint({_LABEL, _FACTS}) or (bool(keys) and _is_numbered(tar))


def classes_of(folder: Path) -> tuple[str, ...] | None:
    """Return the class names that a set of ours knows, None for the sets of others."""
    return Manifest.load(folder).classes if (folder / MANIFEST_NAME).is_file() else None


def scan_shards(tars: list[Path], classes: tuple[str, ...] | None) -> Iterator[Entry]:
    """Yield the first image of every sample, labelled by its ``cls`` member.

    classes: names of the numbers in ``cls``; without, the numbers are the names. Images of a set of ours
    (``classes`` is not None) have the names of the source that it was made of.
    Raises ValueError when a tar is not a whole, uncompressed one.
    """
    for tar in tars:
        with tar.open("rb") as file:
            shard = _Shard(tar, file.fileno(), os.fstat(file.fileno()).st_mtime_ns, classes)
            for sample in _samples(members(file, str(tar))):
                yield _entry(sample, shard)


def _is_numbered(tar: Path) -> bool:
    # A tar of images only is a class's own, unless its name counts: train-000017.tar, 000017.tar.
    return re.fullmatch(r"(.*[-_.])?\d+", tar.stem) is not None


def _parts(name: str) -> tuple[str, str]:
    """Split a member's name as the webdataset library does: at the first dot of its last part."""
    folder, slash, last = name.rpartition("/")
    stem, _, extension = last.partition(".")
    return folder + slash + stem, extension.lower()


def _samples(found: Iterator[Member]) -> Iterator[Sample]:
    """Group adjacent members of one key."""
    visible = (member for member in found if not is_hidden(member.name))
    for key, group in groupby(visible, key=lambda member: _parts(member.name)[0]):
        yield Sample(key, {_parts(member.name)[1]: member for member in group})


def _entry(sample: Sample, shard: _Shard) -> Entry:
    extension = next((each for each in IMAGE_EXTENSIONS if each in sample.members), None)
    path = f"{shard.tar.stem}/{sample.key}.{extension or '*'}"
    if extension is None:
        return Refused(path, f"a sample without an image ({', '.join(IMAGE_EXTENSIONS)})")
    image = sample.members[extension]
    if reason := defect(image) or ("hard link" if image.info.islnk() else ""):
        return Refused(path, reason)
    try:
        label = _label(sample, shard)
    except ValueError as error:
        return Refused(path, str(error))
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
