"""Steps that changed nothing: each is said once, and too many in a row end the run and name their samples."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

from torch import Tensor

from pipeline.distributed import gather, rank, world_size
from pipeline.engine import StepResult
from pipeline.methods.base import Batch
from pipeline.preemption import ProcessFailedError

BAD_BATCH_NAME = "bad_batch.json"

log = logging.getLogger(__name__)


class SkippedSteps:
    """Watches every step of a process's life; whether one was applied is the same on all processes."""

    def __init__(self, limit: int, directory: Path) -> None:
        self._limit, self._path = limit, directory / BAD_BATCH_NAME
        self._in_a_row = 0

    def watch(self, step: int, result: StepResult, batch: Batch) -> None:
        """Look at one step; every process must call this.

        Raises:
            ProcessFailedError: it was the last of `limit` in a row. The main process says so for all; the others
                leave with its exit code.
        """
        self._in_a_row = 0 if result.applied else self._in_a_row + 1
        if result.applied:
            return
        if rank() == 0:
            log.warning(
                "step %d changed nothing: its loss or gradient is not finite (%d in a row of at most %d)",
                step,
                self._in_a_row,
                self._limit,
            )
        if self._in_a_row == self._limit:
            self._give_up(step, result, batch)

    def _give_up(self, step: int, result: StepResult, batch: Batch) -> None:
        losses, indices = gather(result.loss.reshape(1)), gather(batch.index)
        if rank() != 0:
            raise SystemExit(1)
        self._path.write_text(json.dumps(_describe(step, losses, indices), indent=1))
        raise ProcessFailedError(
            f"engine.max_skipped: loss or gradient was not finite in {self._limit} steps in a row, the last of them "
            f"step {step}; lower rate.base or look at the samples that {self._path} lists."
        )


def _describe(step: int, losses: Tensor, indices: Tensor) -> dict[str, object]:
    """Return the step, and of each process its loss (what JSON has no number for, as a word) and its samples."""
    ranks = [
        {"rank": number, "loss": loss if math.isfinite(loss) else str(loss), "indices": index}
        for number, (loss, index) in enumerate(
            zip(losses.tolist(), indices.view(world_size(), -1).tolist(), strict=True)
        )
    ]
    return {"step": step, "ranks": ranks}
