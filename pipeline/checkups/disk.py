"""Checks of the directory in which a run is to live."""

from __future__ import annotations

import errno
import os
import shutil
import time
import uuid
from pathlib import Path

from pipeline.checkups.finding import Finding, fail, ok, warn
from pipeline.distributed import World, barrier, from_main

CHECK = "run directory"
PROBE_BYTES = 32 * 2**20
# File systems of one node: another node sees other files there, or none after a restart.
LOCAL = {"tmpfs", "overlay", "ramfs"}
# A network file system may show a new file late.
SEEN_SECONDS = 5.0


def run_directory(directory: Path, world: World) -> Finding:
    """Write, sync, rename and read back a file where runs are to be. Every process must call this."""
    name = from_main(f".doctor-{uuid.uuid4().hex}")
    try:
        probe = _nearest(directory) / f"{name}-{world.rank}"
        finding = _judge(directory, _write(probe))
    except OSError as error:
        probe = None
        finding = fail(CHECK, f"{directory}: {error.strerror}", "change its permissions, or say runs=DIR")
    barrier()
    # The main process's file, seen by all.
    if world.rank and probe is not None and not _appears(probe.with_name(f"{name}-0")):
        finding = fail(CHECK, f"{directory} is another one on this node", "say runs=DIR on a file system of all nodes")
    barrier()
    if probe is not None:
        probe.unlink(missing_ok=True)
    return finding


def _write(probe: Path) -> float:
    """Return bytes a second, synced."""
    temporary = probe.with_name(f"{probe.name}.tmp")
    begin = time.perf_counter()
    with temporary.open("wb") as file:
        file.write(os.urandom(PROBE_BYTES))
        file.flush()
        os.fsync(file.fileno())
    seconds = time.perf_counter() - begin
    os.replace(temporary, probe)
    if probe.stat().st_size != PROBE_BYTES:
        raise OSError(0, "what was written is not what is read")
    return PROBE_BYTES / seconds


def _judge(directory: Path, rate: float) -> Finding:
    free = shutil.disk_usage(_nearest(directory)).free
    kind = file_system(_nearest(directory))
    said = f"{directory} on {kind}, {free / 1e9:,.0f} GB free, written at {rate / 1e6:,.0f} MB/s"
    if kind in LOCAL and "SLURM_JOB_ID" in os.environ:
        return warn(CHECK, said, "other nodes and later lives may not see it; say runs=DIR on a shared one")
    return ok(CHECK, said)


def _appears(path: Path) -> bool:
    end = time.monotonic() + SEEN_SECONDS
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.1)
    return path.exists()


def _nearest(directory: Path) -> Path:
    """Return the directory, or the first above it that is there.

    Raises:
        NotADirectoryError: that is a file.
    """
    found = next(each for each in (directory, *directory.absolute().parents) if each.exists())
    if not found.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, f"{found} is a file")
    return found


def file_system(directory: Path) -> str:
    """Return the kind of file system that a directory is on."""
    best, kind = Path(), "an unknown file system"
    for line in Path("/proc/mounts").read_text().splitlines():
        _, mount, found, *_ = line.split()
        # Spaces are written in octal there.
        point = Path(mount.encode().decode("unicode_escape"))
        if directory.resolve().is_relative_to(point) and len(point.parts) >= len(best.parts):
            best, kind = point, found
    return kind
