"""metrics.jsonl: every report of a run, one JSON object a line, without what a killed life left ahead."""

from __future__ import annotations

import json
import logging
import math
import os
import time
from collections.abc import Mapping
from pathlib import Path

from monitoring.metrics import check

log = logging.getLogger(__name__)


class JsonlSink:
    """Append reports to a file that after a resume reads as if the run had never stopped."""

    def __init__(self, path: Path, resume_step: int) -> None:
        """Drop the lines beyond `resume_step`, and a line that was torn, then open for appending."""
        if path.exists():
            _truncate(path, resume_step)
        self._file = path.open("a")
        self._failed = False

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Append one line; numbers that JSON does not know (nan, inf) become null."""
        check(metrics)
        finite = {name: value if math.isfinite(value) else None for name, value in metrics.items()}
        self._file.write(json.dumps({**finite, "step": step, "time": time.time()}, allow_nan=False) + "\n")
        # A killed process loses nothing that has left it.
        self._flush()

    def close(self) -> None:
        """Close the file."""
        self._flush()
        if not self._failed:
            self._file.close()

    def _flush(self) -> None:
        """Write what there is; on a full disk it waits for the next time, and training goes on."""
        failed = False
        try:
            self._file.flush()
        except OSError as error:
            failed = True
            if not self._failed:
                log.warning("%s: %s; its lines wait until there is room", self._file.name, error.strerror)
        self._failed = failed


def _truncate(path: Path, resume_step: int) -> None:
    lines = path.read_text().splitlines()
    kept = [line for line in lines if _step(line) <= resume_step]
    temporary = path.with_name(f".{path.name}.tmp")
    with temporary.open("w") as file:
        file.writelines(f"{line}\n" for line in kept)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)


def _step(line: str) -> float:
    try:
        return float(json.loads(line)["step"])
    except ValueError:
        # Torn by whatever killed the process.
        return math.inf
