"""What a scan finds: images as extents of files, and what cannot be one."""

import re
from pathlib import PurePosixPath
from typing import NamedTuple

IMAGE_SUFFIXES = frozenset(
    {".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"}
)
# Nothing in the middle of a compressed archive can be found without unpacking all before it.
PACKED_SUFFIXES = (".tar.gz", ".tgz", ".tar.bz2", ".tbz2", ".tar.xz", ".txz", ".tar.zst", ".tzst")
_UNPACKERS = {"gz": "gunzip", "bz2": "bunzip2", "xz": "unxz", "zst": "unzstd"}
OTHER_CLASSES = "of other classes"
REMEDY = (
    "give a class folder (class/image), a tar of one, an ImageNet archive, a folder of class tars or of WebDataset "
    "shards, or a .csv, .tsv or .parquet list of path,label"
)
OWN_FILE = ""
_SUFFIX = re.compile(r"\.[a-z][a-z0-9_]{0,9}")  # what follows a dot in names such as 2024.17 is none


class Found(NamedTuple):
    """An encoded image: ``size`` bytes at ``offset`` of ``file``; ``path`` is its name within the source.

    file: an archive, or OWN_FILE for the file at ``path`` below the source's root. label: the class's name where
    the source itself says it, None where folders or a file of labels do.
    """

    path: str
    file: str
    offset: int
    size: int
    mtime_ns: int
    label: str | None = None


class Refused(NamedTuple):
    """Something with an image's name that cannot be read as one; ``label`` as that of `Found`."""

    path: str
    reason: str
    label: str | None = None


class Ignored(NamedTuple):
    """A file that does not claim to be an image, by the group that it is counted in."""

    group: str


Entry = Found | Refused | Ignored


def ignored(name: str) -> Ignored:
    """Return what is counted for a file that is no image by name: its suffix, where that is one."""
    if is_hidden(name):
        return Ignored("hidden")
    suffix = PurePosixPath(name).suffix.lower()
    return Ignored(suffix if _SUFFIX.fullmatch(suffix) else "without a suffix")


def is_tar(name: str) -> bool:
    """Tell by name whether a file is a tar that can be read in place."""
    return name[-4:].lower() == ".tar" and not is_hidden(name)


def is_packed_tar(name: str) -> bool:
    """Tell by name whether a file is a compressed tar."""
    return name.lower().endswith(PACKED_SUFFIXES) and not is_hidden(name)


def packed_tar(where: str) -> ValueError:
    """Return the refusal of a compressed tar."""
    tool = next((tool for end, tool in _UNPACKERS.items() if where.lower().endswith(end)), "gunzip, for gzip")
    return ValueError(
        f"shard.source: {where} is compressed, and images are read in place; unpack it to a plain .tar first ({tool})."
    )


def is_image(name: str) -> bool:
    """Tell by name whether a file is an image; hidden files and folders hold none."""
    suffix = name[name.rfind(".") :].lower()
    return suffix in IMAGE_SUFFIXES and not is_hidden(name)


def is_hidden(name: str) -> bool:
    """Tell whether a file or one of its folders is hidden, or the shadow that macOS leaves of one."""
    if not (name.startswith(".") or "/." in name or "__MACOSX" in name):
        return False  # a million times, and a tenth of the time of looking at every part
    return any((part.startswith(".") and part not in (".", "..")) or part == "__MACOSX" for part in name.split("/"))


def normalized(name: str) -> str:
    """Return a name without the dots and slashes that change nothing: ``./a//b`` is ``a/b``."""
    if not name.startswith(("/", "./")) and "//" not in name and "/." not in name and not name.endswith("/"):
        return name
    return str(PurePosixPath(name))
