"""Commands as processes of their own, shown as a user would type them, and what they leave behind."""

from __future__ import annotations

import json
import logging
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import NoReturn

log = logging.getLogger(__name__)


@contextmanager
def running(*words: str) -> Iterator[subprocess.Popen[bytes]]:
    """Start a coldpress command that does not outlive this process's being told to stop, by SIGTERM or Ctrl-C.

    Raises:
        SystemExit: SIGTERM came; the command was sent one, and has ended.
    """
    before = signal.signal(signal.SIGTERM, _leave)
    try:
        process = start(*words)
        try:
            yield process
        except KeyboardInterrupt:
            # The command was sent one as well, and may be saving.
            process.wait()
            raise
        except BaseException:
            process.terminate()
            process.wait()
            raise
    finally:
        signal.signal(signal.SIGTERM, before)


def start(*words: str) -> subprocess.Popen[bytes]:
    """Start a coldpress command."""
    log.info("$ coldpress %s", " ".join(words))
    return subprocess.Popen([sys.executable, "-m", "pipeline.cli", *words])


def coldpress(*words: str) -> None:
    """Run a coldpress command to its end.

    Raises:
        ValueError: it failed.
    """
    with running(*words) as process:
        failed = process.wait() != 0
    if failed:
        raise ValueError(f"`coldpress {words[0]}` failed; its own message stands above.")


def _leave(number: int, frame: FrameType | None) -> NoReturn:
    raise SystemExit(128 + number)


def own_directory(path: Path, marker: str) -> Path:
    """Return an empty directory for what a command makes anew at each call.

    Raises:
        ValueError: it holds something that was not made so.
    """
    if path.exists() and any(path.iterdir()):
        if not (path / marker).exists():
            raise ValueError(f"output: {path} holds something else than an earlier result; choose another output=DIR.")
        shutil.rmtree(path)
    path.mkdir(parents=True, exist_ok=True)
    (path / marker).touch()
    return path


def metrics_of(run: Path) -> list[dict[str, float]]:
    """Return the rows of a run's metrics file, none if there is none yet."""
    path = run / "metrics.jsonl"
    if not path.exists():
        return []
    return [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]


def best_knn(run: Path) -> float:
    """Return the best accuracy of a run's newest k-NN evaluation."""
    newest = max((run / "eval").glob("knn-*.json"), key=lambda path: path.stat().st_mtime)
    return float(max(json.loads(newest.read_text())["top1"].values()))
