"""A file system of a few megabytes for one chain, in a mount namespace that ends with this process."""

from __future__ import annotations

import ctypes
import os
import subprocess
from contextlib import suppress
from pathlib import Path

MEGABYTES = 24
_CLONE_NEWNS = 0x00020000
_BALLAST = "ballast"


def own_mounts() -> str:
    """Let this process and those that it forks mount what no other process sees; return why not, "" if it works."""
    if ctypes.CDLL(None, use_errno=True).unshare(_CLONE_NEWNS):
        return f"no mount namespace: {os.strerror(ctypes.get_errno())}"
    return _mount("--make-rprivate", "/")


class SmallDisk:
    """The disk of one chain; made full, read-only, and whole again."""

    def __init__(self, path: Path) -> None:
        """Mount it.

        Raises:
            OSError: it cannot be mounted.
        """
        self.path = path
        path.mkdir(parents=True)
        refusal = _mount("-t", "tmpfs", "-o", f"size={MEGABYTES}m", "none", str(path))
        if refusal:
            raise OSError(refusal)

    def fill(self, room: int) -> None:
        """Leave so many bytes at most; a run that goes on takes its own share meanwhile."""
        with (self.path / _BALLAST).open("ab") as file:
            while (taken := self._free() - room) > 0:
                with suppress(OSError):
                    os.posix_fallocate(file.fileno(), file.seek(0, os.SEEK_END), taken)

    def _free(self) -> int:
        status = os.statvfs(self.path)
        return status.f_bavail * status.f_frsize

    def empty(self) -> None:
        """Give back what `fill` took."""
        (self.path / _BALLAST).unlink(missing_ok=True)

    def read_only(self, on: bool) -> None:
        """Refuse or allow writes; nobody may have a file open for writing."""
        refusal = _mount("-o", f"remount,{'ro' if on else 'rw'}", str(self.path))
        assert not refusal, refusal

    def close(self) -> None:
        """Unmount it."""
        subprocess.run(["umount", "--lazy", str(self.path)], check=True)


def _mount(*words: str) -> str:
    done = subprocess.run(["mount", *words], capture_output=True, text=True, check=False)
    return done.stderr.strip() if done.returncode else ""
