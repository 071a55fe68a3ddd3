"""Images in tars of class folders, in tars of class tars, and in folders of class tars, all read in place.

A scan reads headers only. A tar may come from anywhere, so that its names and links are not trusted.
"""

import tarfile
from collections.abc import Iterator
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

from data.sources.entries import (
    OTHER_CLASSES,
    REMEDY,
    Entry,
    Found,
    Ignored,
    Refused,
    ignored,
    is_hidden,
    is_image,
    is_packed_tar,
    is_tar,
    normalized,
    packed_tar,
)

# The first bytes of gzip, bzip2, xz and zstd.
_COMPRESSED = (b"\x1f\x8b", b"BZh", b"\xfd7zXZ", b"\x28\xb5\x2f\xfd")
_READ_AT_ONCE = 1 << 20  # bytes


class Member(NamedTuple):
    """A member of a tar that is no folder, by its normalized name."""

    name: str
    info: tarfile.TarInfo
    tar: tarfile.TarFile

    @property
    def start(self) -> int:
        """Return the offset of the content in the tar."""
        return self.info.offset_data

    def open(self) -> IO[bytes]:
        """Return the content of a regular file."""
        content = self.tar.extractfile(self.info)
        assert content is not None
        return content


class _Link(NamedTuple):
    """A hard link of an archive: another name of an earlier member of the same archive."""

    path: str
    target: str
    offset: int


def scan_tar(path: Path, wanted: frozenset[str] = frozenset(), prefix: str = "") -> Iterator[Entry]:
    """Yield the images of a tar, and those of the tars inside it with the inner tar's stem as folder.

    wanted: classes; where inner tars are named by them, the others are not looked into. prefix: goes before names.
    Raises ValueError when the tar or one inside it is not a whole, uncompressed one.
    """
    mtime_ns = path.stat().st_mtime_ns
    with path.open("rb") as file:
        archive = _Archive(file, str(path), str(path), 0, mtime_ns)
        yield from _images(archive, prefix, _inner_tars(archive, wanted) if wanted else frozenset())


def scan_class_tars(tars: list[Path], wanted: frozenset[str] = frozenset()) -> Iterator[Entry]:
    """Yield the images of tars that hold one class each, named by it."""
    chosen = [tar for tar in tars if tar.stem in wanted]
    yield from (Ignored(f"tars {OTHER_CLASSES}") for tar in tars if chosen and tar.stem not in wanted)
    for tar in chosen or tars:
        yield from scan_tar(tar, prefix=f"{tar.stem}/")


def members(file: IO[bytes], name: str) -> Iterator[Member]:
    """Yield every member of a plain tar but folders, in order.

    Raises ValueError, also after some members, when the tar is damaged, cut off, or compressed.
    """
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else a million headers stay in memory
                if not member.isdir():
                    yield Member(normalized(member.name), member, tar)
            _check_end(file, tar.offset)
    except tarfile.TarError as error:
        file.seek(0)
        if file.read(6).startswith(_COMPRESSED):
            raise packed_tar(name) from None
        raise ValueError(f"shard.source: {name} is not a whole, uncompressed tar ({error}); {REMEDY}.") from None


def defect(member: Member) -> str:
    """Say why a member must not be read, nothing for a plain file."""
    info = member.info
    if info.name.startswith("/") or ".." in member.name.split("/"):
        return "its name leads out of the archive"
    if info.issym():
        return f"symbolic link to {info.linkname}; pack what it points to (tar --dereference)"
    if info.issparse():
        return "sparse member; pack it as a plain file"
    return "" if info.isreg() or info.islnk() else "not a regular file"


class _Archive(NamedTuple):
    """A tar, or a tar inside one: ``base`` is its offset in the file on ``disk``."""

    file: IO[bytes]
    disk: str
    name: str
    base: int
    mtime_ns: int


def _check_end(file: IO[bytes], offset: int) -> None:
    # tarfile takes a damaged header, or no more bytes, for the end: what follows would be lost without a word.
    file.seek(offset)
    if file.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError(f"no end mark at byte {offset}, it is cut off or damaged there")
    while padding := file.read(_READ_AT_ONCE):
        if padding.count(0) != len(padding):
            raise tarfile.ReadError(
                f"more follows its end mark at byte {offset}: tars are joined by tar --concatenate, not by cat"
            )


def _inner_tars(archive: _Archive, wanted: frozenset[str]) -> frozenset[str]:
    """Return the tars inside a tar of tars that are named by wanted classes."""
    inner = takewhile(lambda member: not is_image(member.name), members(archive.file, archive.name))
    return frozenset(m.name for m in inner if _is_tar(m) and PurePosixPath(m.name).stem in wanted)


def _is_tar(member: Member) -> bool:
    return is_tar(member.name) and member.info.isreg()


def _images(archive: _Archive, prefix: str, chosen: frozenset[str]) -> Iterator[Entry]:
    """Yield the images of an archive; of the tars inside it only the chosen ones, all if none is chosen."""
    links, packed, images, tars = [], "", False, False
    archive.file.seek(0)
    for member in members(archive.file, archive.name):
        if _is_tar(member) and archive.base == 0:
            tars = True
            yield from _inner_images(archive, member, prefix, chosen)
        elif is_image(member.name) or _may_be_a_folder(member):
            images, path = True, prefix + member.name
            if reason := defect(member):
                yield Refused(path, reason)
            elif member.info.islnk():
                links.append(_Link(path, normalized(member.info.linkname), member.info.offset))
            else:
                yield _found(archive, path, member)
        else:
            packed = packed or (member.name if is_packed_tar(member.name) else "")
            yield ignored(member.name)
    if packed and (tars or not images):  # beside images it may be anything
        raise packed_tar(f"{archive.name}:{packed}")
    if links:
        yield from _resolved(archive, links)


def _inner_images(archive: _Archive, member: Member, prefix: str, chosen: frozenset[str]) -> Iterator[Entry]:
    if chosen and member.name not in chosen:
        yield Ignored(f"tars {OTHER_CLASSES}")
    elif reason := defect(member):
        yield Refused(prefix + member.name, reason)
    else:
        name, start = f"{archive.name}:{member.name}", archive.base + member.start
        inner = _Archive(member.open(), archive.disk, name, start, archive.mtime_ns)
        yield from _images(inner, f"{prefix}{member.name[: -len('.tar')]}/", frozenset())


def _may_be_a_folder(member: Member) -> bool:
    """Tell whether a member may stand for a whole folder of images, whatever its name."""
    return member.info.issym() and not is_hidden(member.name)


def _found(archive: _Archive, path: str, member: Member) -> Found:
    return Found(path, archive.disk, archive.base + member.start, member.info.size, archive.mtime_ns)


def _resolved(archive: _Archive, links: list[_Link]) -> Iterator[Entry]:
    """Yield what hard links name: the last member of that name before each, found in a second reading of headers."""
    waiting = {link.offset: link for link in links}
    sought = {link.target for link in links}
    extents: dict[str, Member] = {}
    archive.file.seek(0)
    for member in members(archive.file, archive.name):
        link = waiting.get(member.info.offset)
        if link is not None:
            target = extents.get(link.target)
            missing = f"hard link to {link.target}, which is no plain file before it in the archive"
            yield _found(archive, link.path, target) if target else Refused(link.path, missing)
        if member.name in sought and not defect(member):
            target = extents.get(normalized(member.info.linkname)) if member.info.islnk() else member
            if target is not None:
                extents[member.name] = target
