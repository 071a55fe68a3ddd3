"""What survives a run's process: saved beside the training, published last, checked before anything is read."""

from __future__ import annotations

import logging
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from threading import Thread
from typing import Any

from pipeline import pieces
from pipeline.checkpoint_files import (
    checkpoints,
    clear_leftovers,
    content_of,
    name_latest,
    name_of,
    newest_valid,
    progress_of,
    publish,
    seal,
    set_aside,
    step_of,
    temporary_of,
)
from pipeline.distributed import any_rank, first_text, from_main, on_main, rank, sum_over_ranks, world_size
from pipeline.pieces import HostCopies
from pipeline.training_engine import TrainingEngine, file_name

# Of room on the disk, as a multiple of what a checkpoint takes: for its manifest, logs and who else writes there.
ROOM = 1.1

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
    # Keep for good each checkpoint of a step that this divides; 0 keeps none for that.
    keep_every_steps: int = 0
    # Save with each k-NN probe, and keep the checkpoint of the highest.
    keep_best: bool = False
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
        if self.keep_every_steps < 0 or self.keep_every_steps % self.every_steps:
            raise ValueError(
                "checkpoint.keep_every_steps must be a multiple of checkpoint.every_steps="
                f"{self.every_steps}, got {self.keep_every_steps}; 0 keeps the last ones only."
            )
        if not all(0 < milestone <= 1 for milestone in self.milestones):
            raise ValueError(
                f"checkpoint.milestones must be shares of the budget in (0, 1], got {self.milestones}; "
                "say for instance [0.25,0.5,0.75]."
            )


class Background:
    """Something that is done beside the training; what it raises is kept."""

    def __init__(self, action: Callable[[], None]) -> None:
        self.failure = ""
        self._action = action
        # A daemon: an error elsewhere ends the process without waiting for a disk that may hang.
        self._thread = Thread(target=self._run, name="checkpoint", daemon=True)
        self._thread.start()

    @property
    def busy(self) -> bool:
        """Return whether it is still being done."""
        return self._thread.is_alive()

    def wait(self) -> None:
        """Wait until it is done."""
        self._thread.join()

    def _run(self) -> None:
        try:
            self._action()
        # Whatever it is, training goes on, and the loop says what happened.
        except Exception as error:
            self.failure = str(error) or type(error).__name__


@dataclass
class Save:
    """A checkpoint on its way to the disk."""

    final: Path
    content: dict[str, Any]
    num_bytes: int
    began: float
    # First all processes write their files, then the main one publishes them.
    work: Background
    publishing: bool = False


class Checkpointer:
    """Saves and restores a run; every process must make the same calls.

    A save copies the state and goes on in the background: the loop calls `settle` at every step with the answers of
    all processes, and `finish` to wait. `identity` is what a resumed run must share with the run that saved.
    """

    def __init__(self, directory: Path, config: CheckpointConfig, identity: dict[str, Any]) -> None:
        self.directory, self.config, self.identity = directory, config, identity
        # Why the newest state that was to be saved is not on the disk; empty when it is.
        self.failure = ""
        self._copies = HostCopies()
        self._under_way: Save | None = None
        self._last_save = time.monotonic()
        self._saved_progress = 0.0
        self._saves = self._failures = 0

    def due(self, state: TrainState, progress: float) -> bool:
        """Return whether a save is due. Clocks differ: only the main process's answer counts."""
        minutes = (time.monotonic() - self._last_save) / 60
        passed = any(self._saved_progress < milestone <= progress for milestone in self.config.milestones)
        return passed or state.step % self.config.every_steps == 0 or minutes >= self.config.every_minutes

    def save(
        self, engine: TrainingEngine, state: TrainState, progress: float, score: float | None = None
    ) -> dict[str, float]:
        """Copy the state and begin to write it; return the metrics of having done so.

        One save is under way at a time: an earlier one is waited for. `score` is what `keep_best` goes by. What
        fails is logged and noted in `failure`, and training may go on.
        """
        began = time.monotonic()
        metrics = self.finish()
        final = self.directory / name_of(state.step)
        mine = engine.state()
        num_bytes = round(sum_over_ranks(sum(piece.num_bytes for piece in mine)))
        self._last_save, self._saved_progress = began, progress
        self.failure = from_main(self._prepare(final, num_bytes) if rank() == 0 else "")
        if self.failure:
            return metrics | self._count_failure(final)
        content = {"state": asdict(state), "progress": progress, "score": score, "identity": self.identity}
        path = temporary_of(final) / file_name(rank())
        copies, facts = self._copies.copy(mine), engine.facts()

        def write() -> None:
            pieces.write(path, copies, facts)
            seal(path)

        self._under_way = Save(final, content, num_bytes, began, Background(write))
        return metrics | {"checkpoint_stall_seconds": time.monotonic() - began}

    def pending(self) -> tuple[bool, bool]:
        """Return whether this process still has to do something for the save under way, and whether it has failed."""
        save = self._under_way
        if save is None:
            return False, False
        busy = save.work.busy
        return busy, not busy and bool(save.work.failure)

    def settle(self, busy: bool, failed: bool) -> dict[str, float]:
        """Take the next step of the save under way, told `pending` of any process; return metrics once it is done."""
        save = self._under_way
        if save is None or busy:
            return {}
        if not failed and not save.publishing:
            save.publishing = True
            if rank() == 0:
                save.work = Background(lambda: self._publish(save))
            # The others have nothing left to do, and learn from the votes when it is done.
            return {}
        self._under_way = None
        if failed:
            self.failure = first_text(save.work.failure)
            if rank() == 0:
                _try(lambda: clear_leftovers(self.directory))
            return self._count_failure(save.final)
        self._saves += 1
        return {
            "checkpoint_seconds": time.monotonic() - save.began,
            "checkpoint_bytes": save.num_bytes,
            "checkpoints_total": self._saves,
            "run_directory_free_bytes": shutil.disk_usage(self.directory).free,
            "last_checkpoint_timestamp_seconds": time.time(),
        }

    def finish(self) -> dict[str, float]:
        """Wait until nothing is under way; return the metrics of what has been."""
        metrics: dict[str, float] = {}
        while self._under_way is not None:
            self._under_way.work.wait()
            metrics |= self.settle(*any_rank(*self.pending()))
        return metrics

    def restore(self, engine: TrainingEngine) -> TrainState | None:
        """Load the newest valid checkpoint, and set damaged newer ones aside; None when there is none.

        Raises:
            ValueError: the checkpoint belongs to another run, or there are checkpoints and all are damaged.
        """
        found = from_main(on_main(lambda: newest_valid(self.directory)))
        if found is None:
            return None
        saved = content_of(found)
        self._check_identity(found, saved["identity"])
        on_main(lambda: _try(lambda: set_aside(self.directory, found)))
        engine.load(found)
        self._saved_progress = progress_of(found)
        return TrainState(**saved["state"])

    def _prepare(self, final: Path, num_bytes: int) -> str:
        """Make room for a save; return why there is none."""
        try:
            clear_leftovers(self.directory)
            self.directory.mkdir(parents=True, exist_ok=True)
            free = shutil.disk_usage(self.directory).free
            if free < ROOM * num_bytes:
                return (
                    f"it takes {num_bytes / 1e6:,.0f} MB, and {free / 1e6:,.0f} MB are free in {self.directory}; "
                    "make room, or keep fewer (checkpoint.keep_last)"
                )
            temporary_of(final).mkdir()
        except OSError as error:
            return str(error)
        return ""

    def _publish(self, save: Save) -> None:
        publish(save.final, map(file_name, range(world_size())), save.content)
        # It is saved by now, whatever becomes of the rest.
        _try(lambda: name_latest(save.final))
        _try(lambda: self._prune(save.final))
        _try(lambda: clear_leftovers(self.directory))

    def _prune(self, newest: Path) -> None:
        """Delete all but the last few and those to be kept for good."""
        config = self.config
        there = [c for c in checkpoints(self.directory) if c.name <= newest.name]
        kept = there[-config.keep_last :]
        for milestone in config.milestones:
            kept += [c for c in there if progress_of(c) >= milestone][:1]
        if config.keep_every_steps:
            kept += [c for c in there if step_of(c) % config.keep_every_steps == 0]
        if config.keep_best:
            scores = {c: score for c in there if (score := content_of(c).get("score")) is not None}
            kept += sorted(scores, key=lambda c: scores[c])[-1:]
        for other in set(there) - set(kept):
            shutil.rmtree(other)

    def _count_failure(self, final: Path) -> dict[str, float]:
        self._failures += 1
        if rank() == 0:
            log.error("checkpoint %s could not be saved: %s; the one before stays the newest.", final, self.failure)
        return {"checkpoint_failures_total": self._failures}

    def _check_identity(self, found: Path, saved: dict[str, Any]) -> None:
        for key, value in self.identity.items():
            if key in saved and saved[key] != value:
                raise ValueError(
                    f"{key} must stay what it was when {found} was saved ({saved[key]}), got {value}; "
                    f"set it back, or start anew with another run=NAME."
                )


def _try(action: Callable[[], None]) -> None:
    """Do what is worth doing and not worth failing for, as on a file system that cannot be written to."""
    try:
        action()
    except OSError as error:
        log.warning("%s", error)
