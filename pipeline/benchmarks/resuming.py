"""A resume in a process of its own: from its start to the end of its first step, taken apart."""

from __future__ import annotations

import multiprocessing
import os
import time
from dataclasses import dataclass
from itertools import pairwise
from multiprocessing.connection import Connection
from pathlib import Path

from pipeline.benchmarks.cases import make_batch, make_engine, make_plan, seconds
from pipeline.checkpoint import CheckpointConfig, Checkpointer
from pipeline.compression import Compression
from pipeline.config import BenchConfig
from pipeline.distributed import start

# What a process group is told by; a process of its own must not take its parent's for its own.
_RENDEZVOUS = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


@dataclass(frozen=True)
class Resume:
    """Seconds of its parts: Python and imports, network and engine, checksums and reading, the first step."""

    start: float
    build: float
    restore: float
    step: float

    @property
    def total(self) -> float:
        """Return the seconds from the start of the process to the end of its first step."""
        return self.start + self.build + self.restore + self.step


def resume(config: BenchConfig, directory: Path) -> Resume:
    """Start a process that goes on from the newest checkpoint, and wait for its first step."""
    context = multiprocessing.get_context("spawn")
    ours, theirs = context.Pipe(duplex=False)
    child = context.Process(target=_resume, args=(config, directory, theirs))
    # A clock that all processes of a machine share.
    times = [time.monotonic()]
    child.start()
    theirs.close()
    times += ours.recv()
    child.join()
    assert child.exitcode == 0, child.exitcode
    return Resume(*(after - before for before, after in pairwise(times)))


def _resume(config: BenchConfig, directory: Path, pipe: Connection) -> None:
    times = [time.monotonic()]
    for name in _RENDEZVOUS:
        os.environ.pop(name, None)
    world = start()
    engine, method = make_engine(config, world)
    times.append(time.monotonic())
    assert Checkpointer(directory, CheckpointConfig(), {}).restore(engine) is not None
    times.append(time.monotonic())
    seconds(engine, make_batch(config, world, method), make_plan(config, method, Compression(), 0), world)
    pipe.send([*times, time.monotonic()])
    # ZeRO 3 over gloo aborts now and then when the interpreter ends.
    os._exit(0)
