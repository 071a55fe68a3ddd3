"""status.json: what a run says that it is doing.

It is replaced as a whole where a life begins, turns or ends, and at saves, never at each report: how far a run has
come is in the last lines of metrics.jsonl, and that it is alive in heartbeats/, which a thread keeps anyway.
"""

from __future__ import annotations

import json
import logging
import os
import threading
import time
from dataclasses import asdict, dataclass
from enum import StrEnum
from pathlib import Path

STATUS_NAME = "status.json"

log = logging.getLogger(__name__)


class State(StrEnum):
    """What a run is doing; after `stopped` and `hung` the same command, or Slurm, goes on with it."""

    running = "running"
    # Saved and left when asked.
    stopped = "stopped"
    # Ended by the watchdog, or by processes that were lost.
    hung = "hung"
    failed = "failed"
    finished = "finished"


@dataclass(frozen=True)
class Status:
    """A run's word on itself; `time` is Unix time."""

    state: State
    step: int = 0
    time: float = 0.0
    # What ended it, of hung, failed and stopped runs.
    reason: str = ""


class StatusFile:
    """Keeps the status of a run in its directory; several threads may say something."""

    def __init__(self, directory: Path) -> None:
        self._path = directory / STATUS_NAME

    def say(self, state: State, step: int, reason: str = "") -> None:
        """Replace what was said before; on a full disk that stays, with a warning."""
        content = json.dumps(asdict(Status(state, step, time.time(), reason)))
        temporary = self._path.with_name(f".{STATUS_NAME}.{threading.current_thread().name}.tmp")
        try:
            temporary.write_text(content)
            os.replace(temporary, self._path)
        except OSError as error:
            log.warning("%s: %s; it says what was before", self._path, error.strerror)


def read_status(directory: Path) -> Status:
    """Return what a run said last.

    Raises:
        OSError: there is nothing, or it may not be read.
        ValueError: what is there is no status.
    """
    content = json.loads((directory / STATUS_NAME).read_text())
    try:
        return Status(
            State(content["state"]), int(content["step"]), float(content["time"]), str(content.get("reason", ""))
        )
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{STATUS_NAME} has no state, step and time") from error
