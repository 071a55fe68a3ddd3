"""Who is at work on an unfinished output, on whatever node.

Locks are of regular files, open for writing: NFS and Lustre keep those of folders to one node. They go with their
process; with its node they go when the file server has missed it for a while.
"""

import errno
import fcntl
import os
import socket
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from data.deal import Part

HERE = socket.gethostname()


class PartLock:
    """The right to write one part, which nobody has together with the same part or a part of another division."""

    def __init__(self, folder: Path, part: Part) -> None:
        self._folder = folder
        self._division = f"-of-{part.parts}"
        self._path = folder / f"part-{part.number}{self._division}"
        self._held = -1

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Wait until no other process is in here, and keep them out; for what takes moments."""
        while (door := _lock(self._folder / "lock", fcntl.LOCK_EX)) is None:
            self._folder.mkdir(parents=True, exist_ok=True)
        try:
            yield
        finally:
            os.close(door)

    def acquire(self) -> str:
        """Take the part and return nothing, or return the host of a process that forbids it. To be called alone."""
        lock = _try_lock(self._path)
        if lock is None:
            return _host_in(self._path)
        with ExitStack() as undo:
            undo.callback(os.close, lock)
            for other in self._folder.glob("part-*-of-*"):
                if not other.name.endswith(self._division) and _is_locked(other):
                    return _host_in(other)
            os.ftruncate(lock, 0)
            os.write(lock, HERE.encode())
            os.fsync(lock)
            undo.pop_all()
        self._held = lock
        return ""

    def release(self) -> None:
        """Leave the part to others."""
        os.close(self._held)


def _host_in(path: Path) -> str:
    return path.read_text() or "another host"


def _is_locked(path: Path) -> bool:
    lock = _try_lock(path)
    if lock is not None:
        os.close(lock)
    return lock is None


def _try_lock(path: Path) -> int | None:
    """Return a descriptor that locks a file, None while another process has it locked."""
    with suppress(BlockingIOError):
        return _lock(path, fcntl.LOCK_EX | fcntl.LOCK_NB)
    return None


def _lock(path: Path, operation: int) -> int | None:
    """Return a descriptor that locks a file; None of one that a command, having finished, has just removed."""
    try:
        with ExitStack() as undo:
            descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o666)
            undo.callback(os.close, descriptor)
            fcntl.flock(descriptor, operation)
            if os.path.samestat(os.fstat(descriptor), path.stat()):
                undo.pop_all()
                return descriptor
    except OSError as error:
        if error.errno not in (errno.ENOENT, errno.ESTALE):  # NFS says the latter of what another node removed
            raise
    return None
