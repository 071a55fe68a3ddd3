"""Files that are there whole or not at all, and for good, whenever the power goes."""

import errno
import hashlib
import os
import secrets
from collections.abc import Callable
from pathlib import Path

TEMPORARY_SUFFIX = ".tmp"
_PROCESS = secrets.token_hex(4)  # process numbers are those of one node


def write_atomically(path: Path, content: bytes) -> None:
    """Write a whole file or nothing."""
    temporary = temporary_path(path)
    try:
        with temporary.open("wb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        publish(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)


def temporary_path(path: Path) -> Path:
    """Return a neighbor that no other process writes to, such as one that was told to stop and has not yet."""
    return path.with_name(f"{path.name}.{os.getpid()}-{_PROCESS}{TEMPORARY_SUFFIX}")


def remove_temporaries(directory: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
    """Remove what killed processes left half-written, of wanted names; of nobody who still writes there."""
    for path in directory.glob(f"*.[0-9]*{TEMPORARY_SUFFIX}"):
        if wanted(path.name):
            path.unlink(missing_ok=True)


def publish(written: Path, path: Path) -> None:
    """Give a file, whole and synced, its name in one step. The folder is synced, too: it holds the name."""
    os.replace(written, path)
    folder = os.open(path.parent, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    except OSError as error:
        if error.errno != errno.EINVAL:  # of file systems that do not sync folders
            raise
    finally:
        os.close(folder)


def file_sha256(path: Path) -> str:
    """Return the hexadecimal SHA-256 of a file, read in pieces."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
