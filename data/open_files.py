"""Files kept open for reading at random, no more at a time than the system allows, on disks that may stutter."""

import errno
import os
import resource
import threading
import time
from collections import OrderedDict
from pathlib import Path

# All windows of the shuffled order, for one rank alone.
_MOST_OPEN = 256
# A network file system may be slow to answer or forget an open file (ESTALE); seconds to wait before trying anew.
_WAITS = (0.1, 1.0, 5.0)
_LASTING = frozenset({errno.ENOENT, errno.EACCES, errno.EPERM, errno.EISDIR, errno.ENOTDIR})


class OpenFiles:
    """Read from any of many files. Threads may share it; the least recently used files are closed."""

    def __init__(self) -> None:
        allowed, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._most = _MOST_OPEN if allowed == resource.RLIM_INFINITY else max(1, min(_MOST_OPEN, allowed // 4))
        self._open: OrderedDict[Path, _File] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, path: Path, size: int, offset: int) -> bytes:
        """Return ``size`` bytes, less at the end of the file only. Raises OSError when trying anew is of no use."""
        for wait in (*_WAITS, None):
            try:
                # Held by name: it may be closed for others meanwhile, but not while we read.
                file = self._file(path)
                return file.read(size, offset)
            except OSError as error:
                if error.errno in _LASTING or wait is None:
                    raise
                self.forget(path)
                time.sleep(wait)
        raise AssertionError

    def forget(self, path: Path) -> None:
        """Close a file as soon as nobody reads it."""
        with self._lock:
            self._open.pop(path, None)

    def close(self) -> None:
        """Close all files."""
        with self._lock:
            self._open.clear()

    def _file(self, path: Path) -> "_File":
        with self._lock:
            if path in self._open:
                self._open.move_to_end(path)
                return self._open[path]
        file = _File(path)  # outside of the lock: it may take its time
        with self._lock:
            while len(self._open) >= self._most:
                self._open.popitem(last=False)
            return self._open.setdefault(path, file)


class _File:
    """A file open for reading, closed when the last thread lets go of it."""

    def __init__(self, path: Path) -> None:
        self._descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)

    def read(self, size: int, offset: int) -> bytes:
        """Read, however small the pieces that the file system gives."""
        pieces: list[bytes] = []
        while size > 0 and (piece := os.pread(self._descriptor, size, offset)):
            pieces.append(piece)
            size, offset = size - len(piece), offset + len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def __del__(self) -> None:
        if hasattr(self, "_descriptor"):
            os.close(self._descriptor)
