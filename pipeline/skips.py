"""Steps that changed nothing: each is said once, and too many in a row end the run and name their samples."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import numpy as np
from torch import Tensor

from data.manifest import Manifest
from data.order import Order
from pipeline.distributed import gather, rank, world_size
from pipeline.methods.base import Batch
from pipeline.preemption import ProcessFailedError
from pipeline.training_engine import StepResult

BAD_BATCH_NAME = "bad_batch.json"
ABOUT = (
    "indices: places in the run, counted over all processes and epochs; samples: the same, as shard and number of the "
    "image in it: tar tf SHARD | grep jpg | sed -n NUMBERp"
)

log = logging.getLogger(__name__)


class SkippedSteps:
    """Watches every step of a process's life; whether one was applied is the same on all processes."""

    def __init__(self, limit: int, directory: Path, manifest: Manifest, order: Order) -> None:
        """Forget what an earlier life left; `manifest` and `order` say which sample is where in the run."""
        self._limit, self._path = limit, directory / BAD_BATCH_NAME
        self._manifest, self._order = manifest, order
        self._in_a_row = 0
        if rank() == 0:
            self._path.unlink(missing_ok=True)

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
        samples = find_samples(self._manifest, self._order, indices)
        self._path.write_text(json.dumps(_describe(step, losses, indices, samples), indent=1))
        raise ProcessFailedError(
            f"engine.max_skipped: loss or gradient was not finite in {self._limit} steps in a row, the last of them "
            f"step {step}; lower rate.base or look at the samples that {self._path} lists."
        )


def find_samples(manifest: Manifest, order: Order, indices: Tensor) -> list[str]:
    """Return shard and row, from 1 on, of the samples at places of the run [n].

    What took the place of a sample that broke after sharding is not known here; train.log names what broke.
    """
    _, samples = order.place(indices.cpu().numpy())
    counts = [shard.samples for shard in manifest.shards]
    ends = np.cumsum(counts)
    shards = np.searchsorted(ends, samples, side="right")
    rows = samples - (ends - counts)[shards] + 1
    return [f"{manifest.shards[shard].name} image {row}" for shard, row in zip(shards, rows, strict=True)]


def _describe(step: int, losses: Tensor, indices: Tensor, samples: list[str]) -> dict[str, object]:
    """Return the step, and of each process its loss (what JSON has no number for, as a word) and its samples."""
    shape = world_size(), -1
    parts = zip(losses.tolist(), indices.view(shape).tolist(), np.reshape(samples, shape).tolist(), strict=True)
    ranks = [
        {
            "rank": number,
            "loss": loss if math.isfinite(loss) else str(loss),
            "indices": places,
            "samples": names,
        }
        for number, (loss, places, names) in enumerate(parts)
    ]
    return {"step": step, "about": ABOUT, "ranks": ranks}
