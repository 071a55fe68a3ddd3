"""Leaving: signals become a flag that the loop reads at a safe point; a failure has a name."""

from __future__ import annotations

import signal
from types import FrameType

# What the Slurm template understands as "saved on request, run me again" (EX_TEMPFAIL).
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130

SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)


class ProcessFailedError(Exception):
    """One process cannot go on, for a reason that its user can understand; the others may know nothing of it."""


class StopRequest:
    """Remembers the first signal that asks the run to save and leave."""

    def __init__(self) -> None:
        """Install the handlers."""
        self.signal: signal.Signals | None = None
        for number in SIGNALS:
            signal.signal(number, self._remember)

    @property
    def requested(self) -> bool:
        """Return whether this process was asked to leave."""
        return self.signal is not None

    @property
    def exit_code(self) -> int:
        """Return 130 after Ctrl-C, 75 after anything that a scheduler sends."""
        return EXIT_INTERRUPTED if self.signal == signal.SIGINT else EXIT_STOPPED

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if self.signal is None:
            self.signal = signal.Signals(number)
        # A second Ctrl-C no longer waits for the loop, which may hang; what is published stays whole.
        signal.signal(signal.SIGINT, signal.default_int_handler)
