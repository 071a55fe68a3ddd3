"""Sinks that a run can do without."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from typing import Protocol

from monitoring.metrics import check

log = logging.getLogger(__name__)


class Sink(Protocol):
    """What may fail."""

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Take some numbers."""

    def close(self) -> None:
        """Take no more."""


class Expendable:
    """A sink whose failure, at any time, is one warning and silence from then on, never the end of a run."""

    def __init__(self, name: str, build: Callable[[], Sink]) -> None:
        """Build the sink."""
        self._name = name
        self._sink: Sink | None = None
        self._try(lambda: self._set(build()))

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the report on while that works."""
        check(metrics)
        if (sink := self._sink) is not None:
            self._try(lambda: sink.write(step, metrics))

    def close(self) -> None:
        """Close the sink if it still works."""
        if (sink := self._sink) is not None:
            self._try(sink.close)

    def _set(self, sink: Sink) -> None:
        self._sink = sink

    def _try(self, action: Callable[[], None]) -> None:
        try:
            action()
        # Whatever a package of others, its service or the network raises.
        except Exception as error:
            self._sink = None
            reason = " ".join(str(error).split()) or type(error).__name__
            log.warning("nothing more goes to %s: %s; the run goes on without.", self._name, reason)
