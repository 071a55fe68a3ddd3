"""Where a process is: written by the loop in passing, read by those who watch it."""

from __future__ import annotations

import json
import logging
import os
import socket
import sys
import threading
import time
from collections import deque
from contextlib import suppress
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import FrameType
from typing import NamedTuple

from monitoring.histogram import histogram
from monitoring.live import Live
from monitoring.metrics import PHASE_SECONDS, STEP_SECONDS, seconds_in

RECENT_STEPS = 100
FILE_SECONDS = 5.0
# Code in which a process waits for others, and nothing else.
COLLECTIVES = ("/torch/distributed/", "/deepspeed/comm/")

log = logging.getLogger(__name__)


class Phase(Enum):
    """What a process does; every process enters the same phases in the same order."""

    start = "start"
    data = "data"
    tune = "tune"
    forward = "forward"
    backward = "backward"
    # Gradients are averaged, the optimizer steps.
    step = "step"
    report = "report"
    probe = "probe"
    save = "save"
    end = "end"


# Of which a step is made.
PARTS = (Phase.data, Phase.tune, Phase.forward, Phase.backward, Phase.step)


class Place(NamedTuple):
    """A phase among all that a process has entered; replaced as a whole, so that no reader sees half of it."""

    entered: int
    phase: Phase
    since: float
    step: int


class Heartbeat:
    """Says where the process is, at the cost of a few attributes; times are on the monotonic clock."""

    def __init__(self) -> None:
        self.place = Place(0, Phase.start, time.monotonic(), 0)
        # Of recent steps, waiting for data and tuning included, probes and saves not. The first is like no other.
        self.step_seconds: deque[float] = deque(maxlen=RECENT_STEPS)
        self._began = time.monotonic()
        self._steps = 0
        self._thread = threading.get_ident()
        # Of this life, up to the last change of phase.
        self._seconds = dict.fromkeys(Phase, 0.0)
        # Of the step that is under way; a phase may be entered more than once.
        self._parts = dict.fromkeys(PARTS, 0.0)
        self._durations = (histogram(PHASE_SECONDS), histogram(STEP_SECONDS))
        self._phase_seconds = {phase: self._durations[0].labels(phase.value) for phase in PARTS}

    def begin(self, step: int) -> None:
        """Begin the step after `step` steps; it waits for its batch."""
        self._began = time.monotonic()
        self._leave(self._began)
        self.place = Place(self.place.entered + 1, Phase.data, self._began, step)

    def enter(self, phase: Phase) -> None:
        """Begin the next phase."""
        now = time.monotonic()
        self._leave(now)
        self.place = Place(self.place.entered + 1, phase, now, self.place.step)

    def finish(self, step: int) -> None:
        """End the step, which makes `step` of them, and begin to report it."""
        now = time.monotonic()
        self._leave(now)
        if self._steps:
            self.step_seconds.append(now - self._began)
        self._steps += 1
        self._count(now)
        self.place = Place(self.place.entered + 1, Phase.report, now, step)

    def totals(self) -> dict[str, float]:
        """Return the seconds spent in each phase since the process started, by names of the catalogue."""
        return {seconds_in(phase.value): seconds for phase, seconds in self._seconds.items()}

    def live(self) -> Live | None:
        """Return what the process says at this moment; None if it says nothing."""
        place = self.place
        waiting = in_collective(sys._current_frames().get(self._thread))
        numbers = {
            "phase_timestamp_seconds": time.time() - (time.monotonic() - place.since),
            "phases_total": place.entered,
            "waiting": float(waiting),
        }
        return Live(place.phase.value, numbers, self._durations)

    def _leave(self, now: float) -> None:
        phase, seconds = self.place.phase, now - self.place.since
        self._seconds[phase] += seconds
        if phase in self._parts:
            self._parts[phase] += seconds

    def _count(self, now: float) -> None:
        self._durations[1].observe(now - self._began)
        for phase, seconds in self._parts.items():
            self._phase_seconds[phase].observe(seconds)
            self._parts[phase] = 0.0


class Unwatched(Heartbeat):
    """Says nothing."""

    def begin(self, step: int) -> None:
        """Do nothing."""

    def enter(self, phase: Phase) -> None:
        """Do nothing."""

    def finish(self, step: int) -> None:
        """Do nothing."""

    def totals(self) -> dict[str, float]:
        """Return nothing."""
        return {}

    def live(self) -> Live | None:
        """Return nothing."""
        return None


UNWATCHED = Unwatched()


@dataclass(frozen=True)
class Report:
    """A heartbeat as others see it; `since` and `time` in seconds of the wall clock."""

    rank: int
    host: str = "an unknown host"
    pid: int = 0
    step: int = 0
    phase: str = Phase.start.value
    # Phases entered so far: who is behind the others, they wait for.
    entered: int = 0
    # Inside a collective, so waiting itself.
    waiting: bool = False
    since: float = 0.0
    time: float = 0.0

    @classmethod
    def of(cls, heartbeat: Heartbeat, rank: int, thread: int) -> Report:
        """Return what a process's `thread` is doing, by its own account and by its stack."""
        place, now = heartbeat.place, time.time()
        return cls(
            rank,
            socket.gethostname(),
            os.getpid(),
            place.step,
            place.phase.value,
            place.entered,
            in_collective(sys._current_frames().get(thread)),
            now - (time.monotonic() - place.since),
            now,
        )

    @property
    def name(self) -> str:
        """Name the process."""
        return f"process {self.rank} (pid {self.pid} on {self.host})"

    @property
    def seconds(self) -> float:
        """Return how long it had been there."""
        return self.time - self.since

    @property
    def place(self) -> str:
        """Say where it is."""
        return f"in {self.phase} after step {self.step}"


def in_collective(frame: FrameType | None) -> bool:
    """Return whether the innermost Python code of a stack waits for other processes."""
    return frame is not None and any(part in frame.f_code.co_filename for part in COLLECTIVES)


class HeartbeatFile(threading.Thread):
    """Keeps a process's newest report in a file; a thread of its own, since a file system may hang."""

    def __init__(self, path: Path, heartbeat: Heartbeat, rank: int, ending: threading.Event) -> None:
        """Report on the thread that calls this."""
        super().__init__(name="heartbeat", daemon=True)
        self._path, self._heartbeat, self._rank, self._ending = path, heartbeat, rank, ending
        self._thread = threading.get_ident()

    def run(self) -> None:
        """Write every few seconds and at the end."""
        ended = False
        while not ended:
            try:
                self._write()
            except OSError as error:
                log.warning("no heartbeat: %s", error)
            ended = self._ending.wait(FILE_SECONDS)
        with suppress(OSError):
            self._write()

    def _write(self) -> None:
        report = Report.of(self._heartbeat, self._rank, self._thread)
        temporary = self._path.with_name(f".{self._path.name}.tmp")
        temporary.write_text(json.dumps(asdict(report)))
        os.replace(temporary, self._path)
