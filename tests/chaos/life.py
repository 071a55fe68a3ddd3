"""One life of a run: its processes, forked from this one or started anew, and how each of them ended."""

from __future__ import annotations

import atexit
import ctypes
import os
import signal
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NoReturn

from chaos import recorded_train
from chaos.recorded_train import Witness
from chaos.warm import check_alone

from pipeline.preemption import EXIT_STOPPED

REPOSITORY = Path(__file__).parents[2]
_PR_SET_PDEATHSIG = 1
_POLL_SECONDS = 0.0005


@dataclass(frozen=True)
class Setting:
    """How a life is started."""

    words: list[str]
    ranks: int
    witness: Witness
    # A new interpreter for each process, as a launcher would start it; three seconds dearer.
    anew: bool = False


class Life:
    """The processes of one life; what process r says goes to `log_of(r)`, what it was given to `record_of(r)`."""

    def __init__(self, number: int, directory: Path, setting: Setting) -> None:
        self.number = number
        self.setting = setting
        self._directory = directory
        self.codes: dict[int, int] = {}
        # Whether a process outlived one that was killed and did not end by itself.
        self.stayed = False
        self.began = time.time()
        check_alone()
        port = _free_port()
        self._pids = [self._start(rank, port) for rank in range(setting.ranks)]

    def log_of(self, rank: int) -> Path:
        """Return where a process's standard output and error are."""
        return self._directory / f"life-{self.number:03d}-{rank}.log"

    def record_of(self, rank: int) -> Path:
        """Return where a process's steps are recorded."""
        return self._directory / f"life-{self.number:03d}-{rank}.jsonl"

    def steps(self) -> int:
        """Return how many steps the main process has begun."""
        return self.record_of(0).read_bytes().count(b"\n") if self.record_of(0).exists() else 0

    def wait_for_step(self, step: int) -> None:
        """Wait until the main process begins its `step`-th step of this life, or all have ended."""
        self.wait(lambda: self.steps() >= step)

    def wait(self, condition: Callable[[], bool]) -> None:
        """Wait for something that may not come once all processes have ended."""
        while not condition() and not self.ended():
            time.sleep(_POLL_SECONDS)

    def ended(self) -> bool:
        """Tell whether all processes have ended, without waiting."""
        for rank, pid in enumerate(self._pids):
            if rank not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[rank] = os.waitstatus_to_exitcode(status)
        return len(self.codes) == len(self._pids)

    def end(self, patience: float = 90.0, grace: float = 5.0) -> bool:
        """Wait for all processes, and tell whether they ended by themselves in time.

        Once somebody is missed, the others have the grace that a launcher gives them.
        """
        deadline = time.monotonic() + patience
        bereaved = False
        while not self.ended() and time.monotonic() < deadline:
            if not bereaved and self._somebody_is_missed():
                bereaved, deadline = True, time.monotonic() + grace
            time.sleep(_POLL_SECONDS)
        in_time = self.ended()
        self.stayed = bereaved and not in_time
        if not in_time and not bereaved:
            self._ask_where()
        self._bury()
        return in_time or bereaved

    def _somebody_is_missed(self) -> bool:
        """Tell whether a process was killed, or has left when asked before the processes met: others may wait for it.

        The main process says so when they have met.
        """
        codes = self.codes.values()
        return any(code < 0 for code in codes) or (EXIT_STOPPED in codes and not self.log_of(0).stat().st_size)

    def _ask_where(self) -> None:
        """Have all processes write their stacks to their logs."""
        self.send(signal.SIGQUIT)
        time.sleep(1)

    def _bury(self) -> None:
        self.send(signal.SIGKILL)
        while not self.ended():
            time.sleep(_POLL_SECONDS)

    def send(self, number: signal.Signals, ranks: list[int] | None = None) -> None:
        """Send a signal to those processes that are still there, by default to all."""
        self.ended()
        for rank in range(len(self._pids)) if ranks is None else ranks:
            if rank not in self.codes:
                os.kill(self._pids[rank], number)

    def _start(self, rank: int, port: int) -> int:
        pid = os.fork()
        if not pid:
            _become(rank, port, self.log_of(rank), self._own(rank))
        return pid

    def _own(self, rank: int) -> Setting:
        return replace(self.setting, witness=replace(self.setting.witness, record=str(self.record_of(rank))))


def _become(rank: int, port: int, log: Path, setting: Setting) -> NoReturn:
    code = 1
    try:
        # Nothing that the harness would do at its own end is for this process to do.
        atexit._clear()
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        _redirect(log)
        os.chdir(REPOSITORY)
        os.environ.update(_environment(rank, port, setting))
        if setting.anew:
            os.execv(sys.executable, [sys.executable, "-m", "chaos.recorded_train", *setting.words])
        code = recorded_train.main(setting.words)
    except BaseException:
        traceback.print_exc()
    finally:
        _leave(code)


def _redirect(log: Path) -> None:
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    for descriptor in (1, 2):
        os.dup2(file, descriptor)
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(line_buffering=True)  # type: ignore[union-attr]


def _environment(rank: int, port: int, setting: Setting) -> dict[str, str]:
    ranks = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": setting.ranks, "MASTER_PORT": port}
    words = {name: str(value) for name, value in ranks.items()}
    return words | {"MASTER_ADDR": "127.0.0.1", "PYTHONUNBUFFERED": "1"} | setting.witness.variables()


def _leave(code: int) -> NoReturn:
    """End as an interpreter does, without unwinding the frames of the harness that this process was forked in."""
    try:
        threading._shutdown()  # type: ignore[attr-defined]
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
    finally:
        os._exit(code)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
