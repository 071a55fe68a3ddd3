"""Contenders in turn: what one image costs each, and the ratios of rounds that ran side by side."""

from __future__ import annotations

import multiprocessing
import os
import resource
import statistics
import threading
import time
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

Stream = Generator[object, None, None]
"""Endless batches; closing it ends whatever makes them."""

_POLL_SECONDS = 0.02
_QUIET_SECONDS = 0.25
# Of one core: more than polling costs, less than any stage of a loader that has something to do.
_BUSY_SHARE = 0.2
_PATIENCE_SECONDS = 300.0


@dataclass(frozen=True)
class Round:
    """What some images cost: CPU seconds of all threads and worker processes, and seconds on the clock."""

    images: int
    cpu_seconds: float
    wall_seconds: float

    @property
    def cpu_milliseconds(self) -> float:
        """Return CPU milliseconds per image."""
        return 1e3 * self.cpu_seconds / self.images

    @property
    def images_per_second(self) -> float:
        """Return images per second on the clock."""
        return self.images / self.wall_seconds


@dataclass(frozen=True)
class Spread:
    """A median with the smallest and the largest value."""

    median: float
    low: float
    high: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Spread:
        """Summarize at least one value."""
        return cls(statistics.median(values), min(values), max(values))

    def fields(self, name: str) -> dict[str, float]:
        """Return the three as fields of a row of a report."""
        return {name: self.median, f"{name}_low": self.low, f"{name}_high": self.high}


def ratios(numerator: Sequence[Round], denominator: Sequence[Round]) -> Spread:
    """Summarize the ratios of CPU time per image, round by round: what slows the machine meets both alike."""
    pairs = zip(numerator, denominator, strict=True)
    return Spread.of([a.cpu_milliseconds / b.cpu_milliseconds for a, b in pairs])


def fastest(rounds: Mapping[str, Sequence[Round]]) -> str:
    """Return whose median CPU time per image is the smallest."""
    return min(rounds, key=lambda name: statistics.median(r.cpu_milliseconds for r in rounds[name]))


def alternate(streams: Mapping[str, Stream], rounds: int, batches: int, batch_size: int) -> dict[str, list[Round]]:
    """Take ``batches`` from each stream in turn, ``rounds`` times after one that does not count; close them."""
    measured: dict[str, list[Round]] = {name: [] for name in streams}
    try:
        for round_ in range(rounds + 1):
            for name, stream in streams.items():
                result = measure(stream, batches, batch_size)
                if round_:
                    measured[name].append(result)
    finally:
        for stream in streams.values():
            stream.close()
    return measured


def measure(stream: Stream, batches: int, batch_size: int) -> Round:
    """Measure a stream over some batches.

    It begins and ends with full queues and idle workers: as many images are made as are taken, however far
    ahead of its consumer a loader works, and nobody pays for another's start.
    """
    settled()
    cpu, began = cpu_seconds(), time.perf_counter()
    taken = sum(1 for _ in islice(stream, batches))
    assert taken == batches, "a stream of a benchmark is endless"
    cpu_after, ended = settled()
    return Round(batches * batch_size, cpu_after - cpu, ended - began)


def settled() -> tuple[float, float]:
    """Wait until this process and its workers rest; return their CPU seconds and when the last work ended.

    The cost of looking is not among those seconds. Raises RuntimeError when they never rest.
    """
    looking = time.thread_time()
    cpu, now = cpu_seconds(), time.perf_counter()
    began = active = now
    while now - active < _QUIET_SECONDS:
        if now - began > _PATIENCE_SECONDS:
            raise RuntimeError(f"after {now - began:.0f} s this process or its workers are still busy")
        time.sleep(_POLL_SECONDS)
        cpu_before, before = cpu, now
        cpu, now = cpu_seconds() - (time.thread_time() - looking), time.perf_counter()
        # On a crowded machine who has work may get no time for it.
        if cpu - cpu_before > _BUSY_SHARE * (now - before) or _someone_wants_to_run():
            active = now
    return cpu, active


def _someone_wants_to_run() -> bool:
    """Tell whether a thread of this process or its workers, other than this one, runs or waits for a core or a disk."""
    processes = [os.getpid(), *(child.pid for child in multiprocessing.active_children())]
    threads = [thread for pid in processes for thread in Path(f"/proc/{pid}/task").iterdir()]
    return any(_state(thread) in ("R", "D") for thread in threads if thread.name != str(threading.get_native_id()))


def _state(thread: Path) -> str:
    """Return the state of a thread by proc(5): the letter after its name, which may itself hold parentheses."""
    try:
        return (thread / "stat").read_text().rpartition(")")[2].split()[0]
    except (FileNotFoundError, ProcessLookupError):
        return ""


def cpu_seconds() -> float:
    """Return the CPU time, user and system, of this process and its workers, living and gone."""
    own, gone = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    # getrusage counts children only once they have ended.
    living = sum(_cpu_seconds_of(child.pid) for child in multiprocessing.active_children() if child.pid)
    return own.ru_utime + own.ru_stime + gone.ru_utime + gone.ru_stime + living


def _cpu_seconds_of(pid: int) -> float:
    """Read another process's CPU clock, by the number that clock_getcpuclockid(3) gives it."""
    return time.clock_gettime((~pid << 3) | 2)
