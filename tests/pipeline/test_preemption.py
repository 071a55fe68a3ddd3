"""Signals become a flag; a second Ctrl-C becomes an exception."""

import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest

from pipeline.preemption import SIGNALS, StopRequest


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopRequest()
    os.close(signal.set_wakeup_fd(-1))
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered(stop: StopRequest, number: signal.Signals) -> None:
    assert not stop.requested
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested
    assert stop.signal == number
    assert stop.exit_code == (130 if number == signal.SIGINT else 75)


@pytest.mark.parametrize(("then", "code"), [("raise SystemExit(3)", 3), ("time.sleep(60)", 130)])
def test_a_second_ctrl_c_does_not_wait(then: str, code: int) -> None:
    # In a process of its own: the second one ends it, sooner or later.
    program = f"""
import signal, time
from pipeline.preemption import StopRequest

stop = StopRequest()
signal.raise_signal(signal.SIGINT)
assert stop.requested
try:
    signal.raise_signal(signal.SIGINT)
except KeyboardInterrupt:
    {then}
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, timeout=30)
    assert (done.returncode, done.stderr) == (code, "")


def test_a_ctrl_c_after_another_signal_does_not_disturb_the_save(stop: StopRequest) -> None:
    signal.raise_signal(signal.SIGTERM)
    signal.raise_signal(signal.SIGINT)
    assert stop.exit_code == 75


def test_the_time_of_the_first_signal_counts(stop: StopRequest) -> None:
    assert stop.since == float("inf")
    assert stop.after() == ""
    begin = time.monotonic()
    signal.raise_signal(signal.SIGUSR1)
    first = stop.since
    assert begin <= first <= time.monotonic()
    signal.raise_signal(signal.SIGUSR2)
    assert stop.since == first
    assert re.fullmatch(r", \d+\.\d s after SIGUSR1", stop.after())


def test_a_signal_is_known_before_the_main_thread_can_run_its_handler(monkeypatch: pytest.MonkeyPatch) -> None:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    monkeypatch.setattr(StopRequest, "_handle", lambda *_: None)
    stop = StopRequest()
    try:
        os.kill(os.getpid(), signal.SIGTERM)
        deadline = time.monotonic() + 5
        while not stop.requested and time.monotonic() < deadline:
            time.sleep(0.01)
        assert stop.signal == signal.SIGTERM
    finally:
        os.close(signal.set_wakeup_fd(-1))
        for number, handler in handlers.items():
            signal.signal(number, handler)


def test_the_listener_of_an_earlier_request_ends(stop: StopRequest) -> None:
    def listeners() -> int:
        return sum(thread.name == "signals" for thread in threading.enumerate())

    before = listeners()
    StopRequest()
    deadline = time.monotonic() + 5
    while listeners() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert listeners() == before
