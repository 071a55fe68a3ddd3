"""Which images go into which shard, and which shards to which of several processes."""

import os
import re
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from data.sources import Source


@dataclass(frozen=True)
class Part:
    """Every ``parts``-th shard from the ``number``-th on, counted from 1; part 1 of 1 is the whole set.

    Not a block of shards: what an interrupted job of other parts has finished is then a share of every part.
    """

    number: int = 1
    parts: int = 1

    def has(self, shard: int) -> bool:
        """Tell whether a shard, counted from 0, is of this part."""
        return shard % self.parts == self.number - 1

    def __str__(self) -> str:
        return f"part {self.number} of {self.parts}"


def read_part(text: str) -> Part:
    """Return the part that is named ``2/4``; without a name that of this Slurm task, or the whole set.

    Raises ValueError for any other text.
    """
    if not text:
        # Of a job step only: the batch shell, which is no task, has a SLURM_PROCID, too.
        return Part(int(os.environ["SLURM_PROCID"]) + 1, tasks) if (tasks := _tasks_of_step()) > 1 else Part()
    named = re.fullmatch(r"([0-9]{1,6})/([0-9]{1,6})", text)
    if not named or not 1 <= int(named[1]) <= int(named[2]):
        raise ValueError(f"shard.part: must be NUMBER/PARTS, from 1/4 to 4/4 for instance, not {text!r}.")
    return Part(int(named[1]), int(named[2]))


def _tasks_of_step() -> int:
    return int(os.environ.get("SLURM_STEP_NUM_TASKS", "1"))


@dataclass(frozen=True)
class Deal:
    """A source's images, shuffled, and the (first, end) of each shard's among them."""

    rows: NDArray[np.uint32]
    shards: list[tuple[int, int]]

    def images(self, part: Part) -> int:
        """Return how many images the shards of a part take."""
        return sum(end - first for number, (first, end) in enumerate(self.shards) if part.has(number))


def deal(source: Source, seed: int, samples_per_shard: int, bytes_per_shard: int) -> Deal:
    """Deal the globally shuffled images out to shards of so many samples, or else of at most so many encoded bytes."""
    rows = source.shuffled(seed)
    if bytes_per_shard:
        return Deal(rows, _by_bytes(source.sizes(rows), bytes_per_shard))
    firsts = range(0, len(rows), samples_per_shard)
    return Deal(rows, [(first, min(first + samples_per_shard, len(rows))) for first in firsts])


def _by_bytes(sizes: NDArray[np.int64], limit: int) -> list[tuple[int, int]]:
    end_bytes, first, shards = np.cumsum(sizes), 0, []
    while first < len(sizes):
        before = int(end_bytes[first - 1]) if first else 0
        fitting = int(np.searchsorted(end_bytes, before + limit, side="right"))
        end = max(fitting, first + 1)  # an image larger than a shard gets one of its own
        shards.append((first, end))
        first = end
    return shards
