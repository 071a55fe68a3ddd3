"""What survives a run's process: the train state and the engine's shards, published last and checked first."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import time
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from pipeline.distributed import barrier, from_main, on_main, rank
from pipeline.engine import Engine

STATE_NAME = "state.json"
MANIFEST_NAME = "MANIFEST.json"
LATEST_NAME = "latest"
PREFIX = "step_"

log = logging.getLogger(__name__)


@dataclass
class TrainState:
    """How far a run has come; everything else is a function of this and the configuration."""

    step: int = 0
    samples: int = 0
    cost: float = 0.0
    # What an adaptive compression has seen and chosen, as JSON; empty for every other.
    tuning: dict[str, Any] = field(default_factory=dict)

    def advance(self, samples: int, sample_cost: float) -> None:
        """Count one step over `samples` of the global batch."""
        self.step += 1
        self.samples += samples
        self.cost += samples * sample_cost


@dataclass
class CheckpointConfig:
    """When to save, and what to keep. A run also saves at its end and when it is asked to stop."""

    every_steps: int = 1000
    every_minutes: float = 15.0
    keep_last: int = 2
    # Shares of the budget: what is saved when each is reached is kept for good, to be analyzed later.
    milestones: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        if self.every_steps < 1 or not self.every_minutes > 0:
            raise ValueError(
                "checkpoint.every_steps and checkpoint.every_minutes must be above 0, "
                f"got {self.every_steps} and {self.every_minutes:g}; a large number saves at the end only."
            )
        if self.keep_last < 1:
            raise ValueError(f"checkpoint.keep_last must be at least 1, got {self.keep_last}.")
        if not all(0 < milestone <= 1 for milestone in self.milestones):
            raise ValueError(
                f"checkpoint.milestones must be shares of the budget in (0, 1], got {self.milestones}; "
                "say for instance [0.25,0.5,0.75]."
            )


class Checkpointer:
    """Saves and restores a run; every process must make the same calls.

    A checkpoint is written under a temporary name, synced, listed with checksums, renamed, and only then named
    as the latest: whatever kills the run, what looks like a checkpoint is one. `identity` is what a resumed
    run must share with the run that saved.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, identity: dict[str, Any]) -> None:
        self.directory = directory
        self.config = config
        self.identity = identity
        self._last_save = time.monotonic()
        self._saved_progress = 0.0
        self._saves = 0

    def due(self, state: TrainState, progress: float) -> bool:
        """Return whether a save is due. Clocks differ: only the main process's answer counts."""
        minutes = (time.monotonic() - self._last_save) / 60
        passed = any(self._saved_progress < milestone <= progress for milestone in self.config.milestones)
        return passed or state.step % self.config.every_steps == 0 or minutes >= self.config.every_minutes

    def save(self, engine: Engine, state: TrainState, progress: float) -> dict[str, float]:
        """Write one checkpoint and publish it; return the metrics of having done so."""
        start = time.monotonic()
        final = self.directory / f"{PREFIX}{state.step:08d}"
        temporary = self.directory / f".tmp-{final.name}"
        if rank() == 0:
            for leftover in self.directory.glob(".tmp-*"):
                shutil.rmtree(leftover)
            temporary.mkdir(parents=True)
        barrier()
        engine.save(temporary)
        barrier()
        if rank() == 0:
            self._publish(temporary, final, state, progress)
        barrier()
        self._last_save, self._saved_progress = time.monotonic(), progress
        self._saves += 1
        return {
            "checkpoint_seconds": self._last_save - start,
            "checkpoint_bytes": sum(f.stat().st_size for f in final.iterdir()),
            "checkpoints_total": self._saves,
            "last_checkpoint_timestamp_seconds": time.time(),
        }

    def restore(self, engine: Engine) -> TrainState | None:
        """Load the newest valid checkpoint; None when there is none.

        Raises:
            ValueError: the checkpoint belongs to another run, or there are checkpoints and all are damaged.
        """
        found = from_main(on_main(lambda: newest_valid(self.directory)))
        if found is None:
            return None
        saved = json.loads((found / STATE_NAME).read_text())
        self._check_identity(found, saved["identity"])
        engine.load(found)
        self._saved_progress = progress_of(found)
        return TrainState(**saved["state"])

    def _publish(self, temporary: Path, final: Path, state: TrainState, progress: float) -> None:
        content = {"state": asdict(state), "progress": progress, "identity": self.identity}
        _write(temporary / STATE_NAME, json.dumps(content, indent=1))
        files = sorted(p for p in temporary.rglob("*") if p.is_file())
        listing = {str(p.relative_to(temporary)): _describe(p) for p in files}
        _write(temporary / MANIFEST_NAME, json.dumps(listing, indent=1))
        _sync(temporary)
        shutil.rmtree(final, ignore_errors=True)
        temporary.rename(final)
        _sync(self.directory)
        latest = self.directory / LATEST_NAME
        _write(latest.with_suffix(".tmp"), final.name)
        os.replace(latest.with_suffix(".tmp"), latest)
        self._prune(final)

    def _prune(self, newest: Path) -> None:
        """Keep the last few and the milestones; those after the newest are damaged ones of a life that was given up."""
        usable = [c for c in checkpoints(self.directory) if c.name <= newest.name]
        kept = usable[-self.config.keep_last :]
        for milestone in self.config.milestones:
            kept += [c for c in usable if progress_of(c) >= milestone][:1]
        for other in set(checkpoints(self.directory)) - set(kept):
            shutil.rmtree(other)

    def _check_identity(self, found: Path, saved: dict[str, Any]) -> None:
        for key, value in self.identity.items():
            if key in saved and saved[key] != value:
                raise ValueError(
                    f"{key} must stay what it was when {found} was saved ({saved[key]}), got {value}; "
                    f"set it back, or start anew with another run=NAME."
                )


def checkpoints(directory: Path) -> list[Path]:
    """Return every published checkpoint below a directory, oldest first, valid or not."""
    return sorted(directory.glob(f"{PREFIX}*"))


def step_of(checkpoint: Path) -> int:
    """Return the step after which a checkpoint was saved."""
    return int(checkpoint.name.removeprefix(PREFIX))


def progress_of(checkpoint: Path) -> float:
    """Return the share of its run's budget that was spent when a checkpoint was saved, 0 if it does not tell."""
    try:
        return float(json.loads((checkpoint / STATE_NAME).read_text()).get("progress", 0.0))
    except (OSError, ValueError):
        return 0.0


def newest_valid(directory: Path) -> Path | None:
    """Return the newest checkpoint whose every file has its listed size and checksum, None if there are none.

    Raises:
        ValueError: there are checkpoints, and none is whole.
    """
    candidates = checkpoints(directory)
    for candidate in reversed(candidates):
        damage = find_damage(candidate)
        if damage is None:
            return candidate
        log.warning("checkpoint %s is damaged (%s); trying the one before", candidate, damage)
    if candidates:
        raise ValueError(
            f"{directory}: none of its {len(candidates)} checkpoints is whole; "
            "mend the file system, or say overwrite=true to start anew."
        )
    return None


def find_damage(checkpoint: Path) -> str | None:
    """Return what is wrong with a checkpoint, None when nothing is."""
    try:
        listing = json.loads((checkpoint / MANIFEST_NAME).read_text())
        for name, expected in listing.items():
            if _describe(checkpoint / name) != expected:
                return f"{name} changed"
    except (OSError, ValueError) as error:
        return str(error)
    return None


def _describe(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
        return {"bytes": file.tell(), "sha256": digest}


def _write(path: Path, text: str) -> None:
    path.write_text(text)
    _sync(path)


def _sync(path: Path) -> None:
    """Flush a file, or all files below a directory and the directory itself, to the disk."""
    targets = [*path.rglob("*"), path] if path.is_dir() else [path]
    for target in targets:
        descriptor = os.open(target, os.O_RDONLY)
        try:
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
