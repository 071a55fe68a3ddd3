"""Images in a folder and the folders below it."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path

from data.sources.entries import OTHER_CLASSES, OWN_FILE, Entry, Found, Ignored, Refused, ignored, is_hidden, is_image

# (device, inode) of the folders above one another
Ancestors = frozenset[tuple[int, int]]


def scan_folder(root: Path, wanted: frozenset[str] = frozenset()) -> Iterator[Entry]:
    """Yield the images below a folder, links followed; of sibling folders only wanted ones where any is wanted.

    Raises ValueError for a folder that cannot be read and for links that go round in a circle.
    """
    yield from _walk(root, "", wanted, frozenset())


def _walk(folder: Path, prefix: str, wanted: frozenset[str], above: Ancestors) -> Iterator[Entry]:
    entries, below = _list(folder), []
    for entry in entries:
        if _is_folder(entry) and not entry.name.startswith("."):
            below.append(entry)
        else:
            yield _look(entry, prefix + entry.name)
    here = _enter(folder, above) if below else above
    chosen = [entry for entry in below if entry.name in wanted]
    yield from (Ignored(f"folders {OTHER_CLASSES}") for entry in below if chosen and entry.name not in wanted)
    for entry in chosen or below:
        inside = frozenset[str]() if chosen else wanted
        yield from _walk(Path(entry.path), f"{prefix}{entry.name}/", inside, here)


def _list(folder: Path) -> list["os.DirEntry[str]"]:
    try:
        with os.scandir(folder) as entries:
            return list(entries)
    except OSError as error:
        raise ValueError(
            f"shard.source: cannot read {folder} ({error.strerror}); make it readable, or take it away."
        ) from None


def _is_folder(entry: "os.DirEntry[str]") -> bool:
    try:
        return entry.is_dir()
    except OSError:  # of a link that leads to itself
        return False


def _enter(folder: Path, above: Ancestors) -> Ancestors:
    status = folder.stat()
    if (status.st_dev, status.st_ino) in above:
        raise ValueError(f"shard.source: {folder} is a link to a folder above it; take the link away.")
    return above | {(status.st_dev, status.st_ino)}


def _look(entry: "os.DirEntry[str]", name: str) -> Entry:
    # A link that leads nowhere may have been a whole class, whatever its name.
    if not is_image(name) and (is_hidden(name) or not entry.is_symlink() or os.path.exists(entry.path)):
        return ignored(name)
    try:
        status = entry.stat()
    except OSError as error:
        link = "a link that leads nowhere" if entry.is_symlink() else "cannot be read"
        return Refused(name, f"{link} ({error.strerror})")
    if not stat.S_ISREG(status.st_mode):
        return Refused(name, "not a regular file")
    return Found(name, OWN_FILE, 0, status.st_size, status.st_mtime_ns)
