"""What a scan finds: images as extents of files, and what cannot be one."""

from pathlib import PurePosixPath
from typing import NamedTuple

IMAGE_SUFFIXES = frozenset({".jpg", ".jpeg", ".png", ".bmp", ".webp", ".gif", ".tif", ".tiff", ".ppm", ".pgm"})
REMEDY = (
    "give a class folder (class/image), a tar of one, an ImageNet archive, a folder of class tars or of WebDataset "
    "shards, or a .csv, .tsv or .parquet list of path,label"
)
OWN_FILE = ""


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
    """Something with an image's name that cannot be read as one."""

    path: str
    reason: str


Entry = Found | Refused


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
