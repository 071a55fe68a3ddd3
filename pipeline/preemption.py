"""Leaving: signals end a process that has nothing to save, and are a flag for a loop that has; a failure has a name.

Python runs a signal's handler when the main thread comes back from C, which it does not while a collective or the
rendezvous waits for a process that is gone. The signal's number is on a socket at once, and a thread reads it there.
"""

from __future__ import annotations

import os
import signal
import socket
import threading
import time
from types import FrameType

# What the Slurm template understands as "saved on request, run me again" (EX_TEMPFAIL), and as "hung, run me again".
EXIT_STOPPED = 75
EXIT_HUNG = 76
EXIT_INTERRUPTED = 130

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)
# Ctrl-C that has to end a process is left to the main thread for so long.
SECONDS_TO_LEAVE = 2.0


class ProcessFailedError(Exception):
    """One process cannot go on, for a reason that its user can understand; the others may know nothing of it."""

    def __init__(self, reason: str, code: int = 1) -> None:
        """Take the sentence for the user, and the exit code."""
        super().__init__(reason)
        self.code = code


class PeerFailedError(Exception):
    """Another process failed and says why; this one leaves without a word."""

    def __init__(self, code: int) -> None:
        """Take the exit code."""
        super().__init__(f"another process failed with code {code}")
        self.code = code


def leave_when_asked() -> None:
    """Let every signal end this process at once, for it has nothing to save until a `StopRequest` takes over."""
    # The socket first: a handler without one would swallow what comes in between.
    signals = _socket_of_signals()
    for number in set(SIGNALS) - {signal.SIGINT}:
        signal.signal(number, _wake_up)
    threading.Thread(target=_leave_at_the_first, args=(signals,), name="signals", daemon=True).start()


class StopRequest:
    """Remembers the first signal that asks the run to save and leave."""

    def __init__(self) -> None:
        """Install the handlers."""
        self.signal: signal.Signals | None = None
        # On the monotonic clock.
        self.since = float("inf")
        self._interrupted = False
        signals = _socket_of_signals()
        for number in SIGNALS:
            signal.signal(number, self._handle)
        threading.Thread(target=self._listen, args=(signals,), name="signals", daemon=True).start()

    @property
    def requested(self) -> bool:
        """Return whether this process was asked to leave."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """Return 130 after Ctrl-C, 75 after anything that a scheduler sends."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_STOPPED

    def after(self) -> str:
        """Say what asked this process to leave and how long ago; nothing if none did."""
        return f", {time.monotonic() - self.since:.1f} s after {self.signal.name}" if self.signal else ""

    def _remember(self, number: int) -> None:
        if self.signal is None:
            self.since = time.monotonic()
            self.signal = signal.Signals(number)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        self._remember(number)
        # A second Ctrl-C no longer waits for the loop, which may hang; what is published stays whole.
        if number == signal.SIGINT and self._interrupted:
            raise KeyboardInterrupt
        self._interrupted |= number == signal.SIGINT

    def _listen(self, signals: socket.socket) -> None:
        interrupted = False
        while number := signals.recv(1):
            self._remember(number[0])
            if number[0] == signal.SIGINT and interrupted:
                _end(EXIT_INTERRUPTED)
            interrupted |= number[0] == signal.SIGINT


def _socket_of_signals() -> socket.socket:
    """Return where the numbers of all signals that have a handler can be read from now on."""
    receiver, sender = socket.socketpair()
    sender.setblocking(False)
    before = signal.set_wakeup_fd(sender.detach(), warn_on_full_buffer=False)
    if before >= 0:
        os.close(before)
    return receiver


def _leave_at_the_first(signals: socket.socket) -> None:
    number = signals.recv(1)
    if number and number[0] == signal.SIGINT:
        _end(EXIT_INTERRUPTED)
    elif number:
        os._exit(EXIT_STOPPED)


def _end(code: int) -> None:
    # The main thread may still say something, if it is not held up in C.
    time.sleep(SECONDS_TO_LEAVE)
    os._exit(code)


def _wake_up(number: int, frame: FrameType | None) -> None:
    """Do nothing: without a handler of Python's the number would not come to the socket."""
