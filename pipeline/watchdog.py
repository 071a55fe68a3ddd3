"""Nobody waits for ever: what hangs is named and ended, and what fails on one process ends all, said once."""

from __future__ import annotations

import faulthandler
import logging
import math
import os
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from pipeline.distributed import World
from pipeline.heartbeat import Heartbeat, HeartbeatFile, Phase, Report, in_collective
from pipeline.peers import Failure, peers_of
from pipeline.preemption import (
    EXIT_HUNG,
    EXIT_INTERRUPTED,
    EXIT_STOPPED,
    PeerFailedError,
    ProcessFailedError,
    StopRequest,
)
from pipeline.status_file import State, StatusFile

LONG = (Phase.start, Phase.probe, Phase.save, Phase.end)
TICK = 1.0
# Who has not reported for so long is stopped or gone.
SILENCE = 3.5
# So long processes wait for each other when they leave; and in all, where a file system keeps one from leaving.
PATIENCE = 5.0
LAST_RESORT = 30.0
REFUSED = 2
# What a run is after an end that was not its own, by exit code; failed after any other.
STATES = {EXIT_STOPPED: State.stopped, EXIT_INTERRUPTED: State.stopped, EXIT_HUNG: State.hung}

log = logging.getLogger(__name__)


@dataclass
class WatchdogConfig:
    """How long a process may stay where it is, in seconds; `inf` is for ever."""

    # In one phase of a step, or step_factor times what a recent step took as a whole, whichever is longer.
    step_seconds: float = 300.0
    step_factor: float = 20.0
    # At the start, the first step included, in a probe, in a save.
    long_seconds: float = 1800.0
    # From a signal that asks for the node to the end of the step, where the run saves.
    stop_seconds: float = 90.0

    def __post_init__(self) -> None:
        for key in ("step_seconds", "step_factor", "long_seconds", "stop_seconds"):
            if not getattr(self, key) > 0:
                raise ValueError(f"watchdog.{key} must be above 0, got {getattr(self, key):g}; inf waits for ever.")

    def allowed(self, phase: Phase, step_seconds: Sequence[float]) -> float:
        """Return how long a phase may last after such steps, in seconds; the longest 1 in 20 of them does not count."""
        if phase in LONG or not step_seconds:
            return self.long_seconds
        usual = sorted(step_seconds)[math.ceil(0.95 * len(step_seconds)) - 1]
        return max(self.step_seconds, self.step_factor * usual)


class Watchdog:
    """Watches the thread that makes it, from entering the context to leaving it.

    What it finds ends the process: a hang with exit code 76, another process's failure with that one's code.
    """

    def __init__(self, config: WatchdogConfig, world: World, stop: StopRequest) -> None:
        self.heartbeat = Heartbeat()
        self._config, self._rank, self._stop = config, world.rank, stop
        self._peers = peers_of(world)
        self._watched = threading.get_ident()
        self._awake = 0.0
        self._stacks: Path | None = None
        self._status: StatusFile | None = None
        self._ending = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)

    def __enter__(self) -> Watchdog:
        """Begin to watch."""
        self._peers.publish(self._report())
        self._thread.start()
        return self

    def open(self, directory: Path) -> None:
        """Keep heartbeat and stacks there from now on; the main process says above it what ended the run."""
        directory.mkdir(parents=True, exist_ok=True)
        self._stacks = directory / f"stacks_{self._rank:05d}.txt"
        self._status = StatusFile(directory.parent) if self._rank == 0 else None
        path = directory / f"rank_{self._rank:05d}.json"
        file = HeartbeatFile(path, self.heartbeat, self._rank, self._ending)
        file.start()

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop watching, and let the other processes know of an error.

        Raises:
            PeerFailedError: the error is another process's failure, or follows from it; that one says so.
            ProcessFailedError: a refusal that only this process knows, or a process that left without a word.
        """
        self._ending.set()
        # It does not come back if it is ending the process right now.
        self._thread.join()
        try:
            if isinstance(error, KeyboardInterrupt):
                self._say(self._peers.fail(Failure(self._rank, EXIT_INTERRUPTED, "interrupted", by=self._rank)))
            elif isinstance(error, Exception):
                self._explain(error)
        finally:
            self._peers.leave(PATIENCE)

    def _explain(self, error: Exception) -> None:
        """Raise what is to be said instead of an error, if not the error itself."""
        failure = self._origin(error)
        self._say(failure)
        if failure.by != self._rank:
            if failure.hang:
                # Woken by the end of who waited with it, before this one's own watch has followed.
                log.error("%s; exit code %d", failure.text, failure.code)
            raise PeerFailedError(failure.code) from None
        if failure.rank != self._rank:
            raise ProcessFailedError(failure.text, failure.code) from None
        if isinstance(error, ValueError) and self._rank:
            raise ProcessFailedError(str(error), REFUSED) from error

    def _origin(self, error: Exception) -> Failure:
        own = Failure(self._rank, _exit_code(error), str(error), by=self._rank)
        if not _comes_from_a_collective(error):
            return self._peers.fail(own)
        # Some process has left, and says why if it can.
        said, silent = self._survey(PATIENCE)
        if said is None and silent:
            text = f"{silent[0].name} ended without a word {silent[0].place}: it was killed, or its node is lost"
            own = Failure(silent[0].rank, EXIT_HUNG, text, by=self._rank)
        return said or self._peers.fail(own)

    def _watch(self) -> None:
        before = time.monotonic()
        while not self._ending.wait(TICK):
            now = time.monotonic()
            # A process that was stopped has not hung.
            self._awake = now if now - before > PATIENCE else self._awake
            before = now
            self._peers.publish(self._report())
            failure = self._peers.failure() or self._leave_the_start() or self._hang()
            if failure is not None:
                self._follow(failure)

    def _report(self) -> Report:
        return Report.of(self.heartbeat, self._rank, self._watched)

    def _overdue(self, now: float) -> str:
        """Return the rule that this process breaks by not moving, nothing if it breaks none."""
        place = self.heartbeat.place
        allowed = self._config.allowed(place.phase, self.heartbeat.step_seconds)
        if now - max(place.since, self._awake) > allowed:
            key = "long_seconds" if allowed == self._config.long_seconds else "step_seconds or step_factor"
            return f"a phase may last {allowed:.3g} s there; raise watchdog.{key} if it needs more"
        # A save is where the loop was to come to, or will not be long.
        limit = self._config.stop_seconds
        if place.phase not in (Phase.start, Phase.save, Phase.end) and now - max(self._stop.since, self._awake) > limit:
            return f"the run was asked to leave, and has watchdog.stop_seconds={limit:.3g} to end a step"
        return ""

    def _leave_the_start(self) -> Failure | None:
        """Return why to leave where a signal came long before the first step: there is nothing to save."""
        waited = time.monotonic() - max(self._stop.since, self._awake)
        if self.heartbeat.place.phase is not Phase.start or waited < self._config.stop_seconds:
            return None
        text = "asked to leave before the first step: there is nothing to save"
        return self._peers.fail(Failure(self._rank, EXIT_STOPPED, text, by=self._rank))

    def _hang(self) -> Failure | None:
        """Return what this process hangs in, or waits for, if it has not moved for too long."""
        if not self._overdue(time.monotonic()):
            return None
        said, silent = self._survey(SILENCE)
        rule = self._overdue(time.monotonic())
        if said is not None or not rule or self._ending.is_set():
            return said
        here = self._report()
        culprit = silent[0] if silent else _behind(self._peers.reports() or [here])
        who = culprit or here
        verdict = f"{who.name} hangs {who.place} for {who.seconds:.0f} s"
        if silent:
            verdict = f"{who.name} has gone silent {who.place}"
        elif culprit is None:
            verdict = f"all processes hang {who.place} for {who.seconds:.0f} s, none behind the others"
        return self._peers.fail(Failure(who.rank, EXIT_HUNG, f"{verdict}; {rule}", by=self._rank, hang=True))

    def _survey(self, seconds: float) -> tuple[Failure | None, list[Report]]:
        """Wait for another process's word; return it, or else who has not reported in the meantime."""
        before = self._peers.reports()
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            self._peers.publish(self._report())
            if failure := self._peers.failure():
                return failure, []
            time.sleep(TICK / 4)
        now = self._peers.reports()
        return None, [late for early, late in zip(before, now, strict=True) if early.time == late.time]

    def _follow(self, failure: Failure) -> None:
        """End this process, unless the main thread is ending it."""
        if not failure.hang and (self._main_thread_leaves() or self.heartbeat.place.phase is Phase.end):
            return
        last_resort = threading.Timer(LAST_RESORT, os._exit, [failure.code])
        last_resort.daemon = True
        last_resort.start()
        try:
            if failure.hang:
                log.error("%s. %s; exit code %d", failure.text, self._leave_stacks(), failure.code)
            elif failure.by == self._rank:
                log.error("%s", failure.text)
            self._peers.leave(PATIENCE)
            # The last thing: a file system may be what hangs.
            self._say(failure)
        finally:
            os._exit(failure.code)

    def _say(self, failure: Failure) -> None:
        if self._status is not None:
            state = STATES.get(failure.code, State.failed)
            self._status.say(state, self.heartbeat.place.step, failure.text)

    def _main_thread_leaves(self) -> bool:
        end = time.monotonic() + PATIENCE
        while time.monotonic() < end and not in_collective(sys._current_frames().get(self._watched)):
            if self._ending.wait(TICK / 10):
                return True
        return self._ending.is_set()

    def _leave_stacks(self) -> str:
        """Write down where every thread is; return where that can be read."""
        try:
            if self._stacks is not None:
                with self._stacks.open("a") as file:
                    report = self._report()
                    print(time.strftime("%Y-%m-%dT%H:%M:%S%z"), report.name, report.place, file=file, flush=True)
                    faulthandler.dump_traceback(file, all_threads=True)
                return f"Stacks of process {self._rank}: {self._stacks}"
        except OSError as error:
            log.error("%s", error)
        faulthandler.dump_traceback(all_threads=True)
        return f"Stacks of process {self._rank} stand above"


def _behind(reports: Sequence[Report]) -> Report | None:
    """Return the first process that others wait for, None if all are at one place.

    A process that waits for its GPU is not seen to wait; it has entered what it waits in.
    """
    places = [(report.entered, report.waiting) for report in reports]
    first = reports[places.index(min(places))]
    return None if len(reports) > 1 and len(set(places)) == 1 else first


def _exit_code(error: Exception) -> int:
    if isinstance(error, ProcessFailedError):
        return error.code
    return REFUSED if isinstance(error, ValueError) else 1


def _comes_from_a_collective(error: Exception) -> bool:
    trace = error.__traceback__
    while trace is not None and trace.tb_next is not None:
        trace = trace.tb_next
    return trace is not None and in_collective(trace.tb_frame)
