"""Node-local copies of the shards that a process will read next, for sets on a network file system.

A thread copies ahead of the run's order and deletes behind it. Whatever goes wrong with a copy, the original is read
instead: staging saves time and decides nothing.
"""

import errno
import fcntl
import logging
import os
import tempfile
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from typing import IO

import numpy as np

from data.order import ShuffledOrder

log = logging.getLogger(__name__)

_PREFIX = "coldpress-stage-"
_OWNER = "owner.lock"
_PIECE = 1 << 22


@dataclass(frozen=True)
class Need:
    """A shard, or a lane's part of it, that a rank reads from place ``first`` to place ``last`` of the run."""

    shard: int
    first: int
    last: int


def needs(order: ShuffledOrder, start: int, rank: int, world_size: int) -> Iterator[Need]:
    """Yield what a rank reads of shards from place ``start`` on, by first use, epoch after epoch, endlessly.

    The rank takes the places start + rank, start + rank + world_size, and so on. A shard that a boundary of lanes
    cuts is needed twice, at the end of one lane and at the beginning of another.
    """
    # Its own: it draws epochs long before they are trained on, and in another thread.
    ahead = ShuffledOrder(order.counts.tolist(), order.seed)
    shard_of_sample = np.repeat(np.arange(len(order.counts)), order.counts)
    size = len(order)
    for epoch in count(start // size):
        begin = max(start, epoch * size)
        places = np.arange(begin + (start + rank - begin) % world_size, (epoch + 1) * size, world_size)
        positions = places - epoch * size
        parts = shard_of_sample[ahead.permutation(epoch)[positions]] * order.lanes + positions % order.lanes
        used, first = np.unique(parts, return_index=True)
        last = len(parts) - 1 - np.unique(parts[::-1], return_index=True)[1]
        for k in np.argsort(first):
            yield Need(int(used[k]) // order.lanes, int(places[first[k]]), int(places[last[k]]))


class Originals:
    """No staging: shards are read where they lie."""

    def __init__(self, originals: Sequence[Path]) -> None:
        self._originals = originals

    def path(self, shard: int) -> Path:
        """Return where to read a shard."""
        return self._originals[shard]

    def follow(self, upcoming: Iterator[Need], horizon: int) -> None:
        """Do nothing."""

    def advance(self, place: int) -> None:
        """Do nothing."""

    def close(self) -> None:
        """Do nothing."""

    def on_eviction(self, forget: Callable[[Path], None]) -> None:
        """Do nothing."""


class Stage(Originals):
    """A bounded folder of copied shards: ``path(shard)`` is the copy where there is one, else the original.

    folder: on a local disk; limit: bytes that this process may use there; originals and sizes: the shards' files and
    their bytes. The copies lie in a folder of their own, which goes when the stage is closed, or, after a kill, when
    the next stage is opened in the same place.
    Raises ValueError when the folder cannot be written to.
    """

    def __init__(self, folder: Path, limit: int, originals: Sequence[Path], sizes: Sequence[int]) -> None:
        super().__init__(originals)
        self._limit, self._sizes = limit, sizes
        self._forget: Callable[[Path], None] = lambda _: None
        if limit < max(sizes):
            raise ValueError(
                f"data.staging_gigabytes: this process's part is {limit / 1e9:g}, less than the largest shard, "
                f"{max(sizes) / 1e9:g}; give more, or leave data.staging empty."
            )
        self._copies: dict[int, Path] = {}
        self._last_use: dict[int, int] = {}
        self._used = self._place = 0
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None
        self._stopping = False
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_orphans(folder)
            self.folder, self._lock = _new_folder(folder)
        except OSError as error:
            raise ValueError(
                f"data.staging: cannot write to {folder} ({error.strerror}); choose a folder on a local disk."
            ) from None

    def path(self, shard: int) -> Path:
        """Return where to read a shard now."""
        return self._copies.get(shard) or self._originals[shard]

    def on_eviction(self, forget: Callable[[Path], None]) -> None:
        """Call ``forget`` with each copy that goes: a file that is open somewhere keeps its place on the disk."""
        self._forget = forget

    def follow(self, upcoming: Iterator[Need], horizon: int) -> None:
        """Copy, in a thread, what is needed within the next ``horizon`` places; end what was followed before."""
        self._end_thread()
        self._stopping = False
        self._thread = threading.Thread(target=self._copy_all, args=(upcoming, horizon), name="stage", daemon=True)
        self._thread.start()

    def advance(self, place: int) -> None:
        """Say that everything before a place of the run has been read; what is no longer needed may go."""
        with self._changed:
            self._place = place
            for shard in [shard for shard in self._copies if self._last_use[shard] < place]:
                self._evict(shard)
            self._changed.notify_all()

    def close(self) -> None:
        """Delete the copies and their folder."""
        self._end_thread()
        if not self._lock.closed:
            _remove(self.folder)
            self._lock.close()

    def _end_thread(self) -> None:
        with self._changed:
            self._stopping = True
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()

    def _copy_all(self, upcoming: Iterator[Need], horizon: int) -> None:
        for need in upcoming:
            if not self._wait_until_near(need, horizon):
                return
            if self._make_room(need):
                self._copy(need.shard)

    def _wait_until_near(self, need: Need, horizon: int) -> bool:
        """Wait until a shard is needed soon enough to think of it; return False when the stage ends."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopping or need.first < self._place + horizon)
            return not self._stopping

    def _make_room(self, need: Need) -> bool:
        """Wait until a shard fits; return False when it is there, is of no more use, or never fits."""
        size = self._sizes[need.shard]
        with self._changed:
            self._last_use[need.shard] = max(need.last, self._last_use.get(need.shard, 0))
            if need.shard in self._copies:
                return False
            self._changed.wait_for(lambda: self._hopeless(need, size) or self._used + size <= self._limit)
            if self._hopeless(need, size):
                return False
            self._used += size
            return True

    def _hopeless(self, need: Need, size: int) -> bool:
        return self._stopping or need.last < self._place or size > self._limit

    def _copy(self, shard: int) -> None:
        copy = self.folder / self._originals[shard].name
        temporary = copy.with_name(copy.name + ".tmp")
        try:
            copied = self._copy_file(self._originals[shard], temporary)
            if copied not in (None, self._sizes[shard]):
                raise OSError(errno.EIO, "the copy has another size")
            if copied is not None:
                os.replace(temporary, copy)
        except OSError as error:
            self._do_without(shard, error)
            _delete(temporary)
            return
        with self._changed:
            if copied is None:
                self._used -= self._sizes[shard]
                _delete(temporary)
                return
            self._copies[shard] = copy
            if self._last_use[shard] < self._place:
                self._evict(shard)

    def _copy_file(self, source: Path, target: Path) -> int | None:
        """Copy piece by piece, lest somebody who leaves wait for the rest; return the bytes, None if unfinished."""
        copied = 0
        with source.open("rb") as read, target.open("wb") as written:
            while piece := read.read(_PIECE):
                if self._stopping:
                    return None
                copied += written.write(piece)
        return copied

    def _do_without(self, shard: int, error: OSError) -> None:
        """Leave this shard where it is; where the disk is full, never hold more than now."""
        with self._changed:
            self._used -= self._sizes[shard]
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                self._limit = self._used
        log.warning(
            "staging: cannot copy %s to %s (%s); reading the original; at most %.1f GB of copies from now on",
            self._originals[shard],
            self.folder,
            error.strerror,
            self._limit / 1e9,
        )

    def _evict(self, shard: int) -> None:
        copy = self._copies.pop(shard)
        _delete(copy)
        self._forget(copy)  # only now: deleted, it cannot be opened anew
        self._used -= self._sizes[shard]


def _delete(file: Path) -> None:
    """Delete a file; a disk that refuses keeps it, which is no reason to end a run."""
    try:
        file.unlink(missing_ok=True)
    except OSError as error:
        log.warning("staging: cannot delete %s (%s)", file, error.strerror)


def _new_folder(parent: Path) -> tuple[Path, IO[bytes]]:
    """Make a folder whose lock is held from the first moment that its name says whose it is."""
    fresh = Path(tempfile.mkdtemp(prefix=".coldpress-", dir=parent))
    lock = (fresh / _OWNER).open("wb")
    fcntl.flock(lock, fcntl.LOCK_EX)
    folder = fresh.with_name(_PREFIX + fresh.name.rpartition("-")[2])
    fresh.rename(folder)
    return folder, lock


def _remove_orphans(parent: Path) -> None:
    """Delete the stages of processes that were killed: the lock dies with its process."""
    for folder in parent.glob(_PREFIX + "*"):
        # Not ours to open, gone meanwhile, or locked by a living process: in each case it stays.
        with suppress(OSError), (folder / _OWNER).open("r+b") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _remove(folder)


def _remove(folder: Path) -> None:
    """Delete what a stage wrote, and nothing else; a folder with anything else in it stays."""
    for file in (*folder.glob("*.tar"), *folder.glob("*.tar.tmp"), folder / _OWNER):
        _delete(file)
    try:
        folder.rmdir()
    except FileNotFoundError:
        pass
    except OSError:
        log.warning("staging: %s holds files that are not ours and stays", folder)
