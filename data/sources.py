"""Where the images to be sharded lie: class folders, tars of them, tars of class tars.

A scan reads directory entries and tar headers only. Every image found is an extent of some file, so that
any process can read any image at random without unpacking anything.
"""

import hashlib
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import takewhile
from pathlib import Path, PurePosixPath
from typing import IO, NamedTuple

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
REMEDY = "give a class folder (class/image), a tar of one, or an ImageNet archive"


class SourceImage(NamedTuple):
    """An encoded image: ``size`` bytes at ``offset`` of ``file``; ``path`` is its name within the source."""

    path: str
    label: str | None
    file: str
    offset: int
    size: int
    mtime_ns: int

    def read(self) -> bytes:
        """Return the encoded bytes. Raises ValueError when they are no longer what the scan saw."""
        try:
            with open(self.file, "rb", buffering=0) as file:
                content = os.pread(file.fileno(), self.size, self.offset)
                changed = os.fstat(file.fileno()).st_mtime_ns != self.mtime_ns
        except OSError as error:
            raise ValueError(f"shard.source: cannot read {self.path} ({error.strerror}).") from None
        if changed or len(content) != self.size:
            raise ValueError(f"shard.source: {self.file} changed while it was read; shard it again to a new output.")
        return content


@dataclass(frozen=True)
class Source:
    """All images of a source, sorted by path, and its class names, sorted (none: unlabelled)."""

    images: list[SourceImage]
    classes: tuple[str, ...]

    def fingerprint(self) -> str:
        """Identify the source's content by names, extents and modification times, not by its place."""
        digest = hashlib.sha256()
        for image in self.images:
            line = f"{image.path}\0{image.label}\0{image.offset}\0{image.size}\0{image.mtime_ns}\n"
            digest.update(line.encode("utf-8", "surrogateescape"))
        return digest.hexdigest()


def scan(path: Path) -> Source:
    """List the images of a folder or tar.

    Raises ValueError for a missing path, a file that is no plain tar, or a source without images.
    """
    if path.is_dir():
        found = _scan_folder(path)
    elif path.is_file():
        found = _scan_tar(path)
    else:
        raise ValueError(f"shard.source: no such file or folder {path}; {REMEDY}.")
    # As in tar, the last of several members of one name counts.
    images = sorted({image.path: image for image in found}.values())
    if not images:
        raise ValueError(f"shard.source: no image in {path}; {REMEDY}.")
    return _with_labels(images, path)


def _scan_folder(root: Path) -> Iterator[SourceImage]:
    """Yield the images below a folder; folders of the first level may be links, as in subsets of ImageNet."""
    tops = [root, *sorted(entry for entry in root.iterdir() if entry.is_dir())]
    for top in tops:
        for folder, below, names in os.walk(top, onerror=_refuse):
            below[:] = [] if top is root else [name for name in below if not name.startswith(".")]
            for name in names:
                file = Path(folder, name)
                relative = file.relative_to(root).as_posix()
                if is_image(relative):
                    stat = _stat(file)
                    yield SourceImage(relative, None, str(file), 0, stat.st_size, stat.st_mtime_ns)


def _refuse(error: OSError) -> None:
    raise ValueError(f"shard.source: cannot read {error.filename} ({error.strerror}).") from None


def _stat(file: Path) -> os.stat_result:
    try:
        return file.stat()
    except OSError as error:
        raise ValueError(f"shard.source: cannot read {file} ({error.strerror}).") from None


def _scan_tar(path: Path) -> Iterator[SourceImage]:
    """Yield the images of a tar, and those of the tars inside it with the inner tar's stem as folder."""
    mtime_ns = path.stat().st_mtime_ns
    with path.open("rb") as file:
        for member, stream, start in _members(file, str(path)):
            inner = PurePosixPath(member.name)
            if is_image(member.name):
                name = str(inner)
                yield SourceImage(name, None, str(path), start, member.size, mtime_ns)
            elif inner.suffix == ".tar" and not inner.name.startswith("."):
                for image, _, inner_start in _members(stream, f"{path}:{inner}"):
                    name = str(inner.with_suffix("") / image.name)
                    if is_image(name):
                        yield SourceImage(name, None, str(path), start + inner_start, image.size, mtime_ns)


def _members(file: IO[bytes], name: str) -> Iterator[tuple[tarfile.TarInfo, IO[bytes], int]]:
    """Yield (member, its content as a stream, offset of the content) for every file of a plain tar."""
    try:
        with tarfile.open(fileobj=file, mode="r:") as tar:
            while (member := tar.next()) is not None:
                tar.members.clear()  # type: ignore[attr-defined]  # else a million headers stay in memory
                if member.islnk() or member.issym() or member.issparse():
                    _refuse_link(member, name)
                elif member.isreg():
                    stream = tar.extractfile(member)
                    assert stream is not None
                    yield member, stream, member.offset_data
    except tarfile.TarError as error:
        raise ValueError(f"shard.source: {name} is not a whole, uncompressed tar ({error}); {REMEDY}.") from None


def _refuse_link(member: tarfile.TarInfo, name: str) -> None:
    if is_image(member.name):
        raise ValueError(
            f"shard.source: {member.name} in {name} is a link or sparse; pack the files themselves "
            "(tar --dereference --hard-dereference)."
        )


def is_image(name: str) -> bool:
    """Tell by name whether a file is an image; hidden files and folders hold none."""
    path = PurePosixPath(name)
    hidden = any(part.startswith(".") or part == "__MACOSX" for part in path.parts)
    return path.suffix.lower() in IMAGE_SUFFIXES and not hidden


def _with_labels(images: list[SourceImage], source: Path) -> Source:
    """Label every image with its class folder: the first one that is not shared by all images.

    `tar cf x.tar train` puts `train/` before every class; such leading folders are dropped.
    """
    folders = [PurePosixPath(image.path).parts[:-1] for image in images]
    level = _shared_levels(folders)
    depths = {len(folder) > level for folder in folders}
    if len(depths) == 2:
        flat = next(image.path for image, folder in zip(images, folders, strict=True) if len(folder) <= level)
        raise ValueError(f"shard.source: {source} mixes class folders with images outside them ({flat}); {REMEDY}.")
    if depths == {False}:
        return Source(images, ())
    labelled = [image._replace(label=folder[level]) for image, folder in zip(images, folders, strict=True)]
    return Source(labelled, tuple(sorted({folder[level] for folder in folders})))


def _shared_levels(folders: list[tuple[str, ...]]) -> int:
    """Return how many leading folders all images share, leaving at least one as the class folder."""
    # The folders come from sorted paths, so that what the first and last share is shared by all.
    pairs = zip(folders[0], folders[-1], strict=False)
    shared = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], pairs))
    return max(0, min(shared, min(map(len, folders)) - 1))
