"""Weights & Biases: one run there for one run here, however many lives it has.

Offline, a life writes a directory of its own, and of several with one id `wandb sync` would let each replace the one
before. So a new life first repeats what metrics.jsonl has, which is what the run has kept, and the directories of
earlier lives go. Online, the service takes no step twice: reports of steps that are done again stay what they were,
which for the same number of processes is the same to the bit.
"""

from __future__ import annotations

import json
import math
import os
import re
import secrets
import shutil
import time
from collections.abc import Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import wandb

from monitoring.metrics import CATALOG, check

ID_NAME = "wandb_id"
PROJECT = "coldpress"
# A service that does not answer must use up neither the start nor the grace of a preemption.
INIT_SECONDS = 30.0
FINISH_SECONDS = 20.0
FLUSH_SECONDS = 5.0
# Reports that a resumed offline run repeats, at a few ms each; a chart there shows 1500.
REPEATED = 3000


class WandbSink:
    """Hands every number on under its name in the catalogue."""

    def __init__(self, directory: Path, *, run: str, mode: str, settings: Mapping[str, Any]) -> None:
        """Open or go on with the run whose id lies in its directory; metrics.jsonl there ends at the resumed step."""
        identity = run_id(directory, run)
        offline = mode == "offline"
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", PROJECT),
            id=identity,
            name=run,
            dir=directory,
            mode="offline" if offline else "online",
            # An offline run cannot know whether there is one.
            resume=None if offline else "allow",
            config=json.loads(json.dumps(settings, default=_plain)),
            settings=_settings(),
        )
        if offline:
            for row in _thinned(_rows(directory / "metrics.jsonl")):
                self._log(int(row["step"]), row)
            _drop_earlier_lives(Path(self._run.dir).parent, identity)

    def write(self, step: int, metrics: Mapping[str, float]) -> None:
        """Hand the numbers on, but for steps that the service has already."""
        check(metrics)
        self._log(step, {**metrics, "time": time.time()})

    def close(self) -> None:
        """Wait until everything is on its way or on disk, but not for ever."""
        self._run.finish()
        # An offline run's file is whole when its writer, another process, has ended: finish() does not wait for that.
        wandb.teardown()

    def _log(self, step: int, row: Mapping[str, float]) -> None:
        if step < self._run.step:
            return
        numbers = {name: row[name] for name in row.keys() & CATALOG.keys() - {"step"}}
        self._run.log({**numbers, "_timestamp": row["time"]}, step=step)


def run_id(directory: Path, run: str) -> str:
    """Return the id of a run, which its directory keeps from its first life on: the name and some random letters."""
    path = directory / ID_NAME
    if not path.exists():
        name = re.sub(r"[^A-Za-z0-9_-]", "-", run)[:48]
        temporary = path.with_name(f".{ID_NAME}.tmp")
        temporary.write_text(f"{name}-{secrets.token_hex(4)}\n")
        os.replace(temporary, path)
    return path.read_text().strip()


def _plain(value: object) -> str:
    return value.name if isinstance(value, Enum) else str(value)


def _settings() -> wandb.Settings:
    return wandb.Settings(
        init_timeout=INIT_SECONDS,
        finish_timeout=FINISH_SECONDS,
        # What a killed process may lose; a resumed one repeats it.
        x_transaction_log_flush_interval=FLUSH_SECONDS,
        # The console belongs to the run, its own numbers to the catalogue.
        silent=True,
        console="off",
        disable_git=True,
        disable_code=True,
        x_disable_stats=True,
        x_save_requirements=False,
    )


def _rows(path: Path) -> list[dict[str, float]]:
    rows = map(json.loads, path.read_text().splitlines())
    return [{name: math.nan if value is None else value for name, value in row.items()} for row in rows]


def _thinned(rows: list[dict[str, float]]) -> list[dict[str, float]]:
    """Return every so many-th report, and what was seldom reported, probes and saves, whole."""
    stride = -(-len(rows) // REPEATED)
    return [row for i, row in enumerate(rows) if i % stride == 0 or "loss" not in row] if rows else []


def _drop_earlier_lives(own: Path, identity: str) -> None:
    for other in own.parent.glob(f"offline-run-*-{identity}"):
        if other.name != own.name:
            shutil.rmtree(other, ignore_errors=True)
