"""A run in small: its shards, every shape of its steps, and a checkpoint."""

from __future__ import annotations

import time
from collections.abc import Iterator, Sequence
from itertools import islice
from pathlib import Path

import torch

from data.loader import Batch, Loader
from data.manifest import Manifest, SampleIndex
from data.reader import Damage, Reader
from pipeline.checkpoint import Checkpointer, TrainState
from pipeline.checkups.finding import Finding, fail, ok
from pipeline.distributed import any_rank
from pipeline.schedules import StepPlan
from pipeline.training_engine import TrainingEngine

STEPS = 2
BATCHES = 3
LESS_MEMORY = "if it is memory: lower batch_size, or take engine=zero2 or zero3, or more GPUs"


def shards(directory: Path, samples: int, seed: int) -> Finding:
    """Read so many samples from all over a set and hold them against their checksums."""
    try:
        manifest = Manifest.load(directory)
        index = SampleIndex.load(directory, manifest)
    except ValueError as error:
        return fail("shards", str(error), "shard the images again, or mend the set")
    count = min(samples, len(index))
    generator = torch.Generator().manual_seed(seed)
    reader, begin = Reader(index), time.perf_counter()
    found = reader.read(torch.randperm(len(index), generator=generator)[:count].tolist())
    rate = count / (time.perf_counter() - begin)
    reader.close()
    damages = [each for each in found if isinstance(each, Damage)]
    if damages:
        return fail("shards", f"{len(damages)} of {count} samples: {damages[0].message}", "mend the set before the run")
    said = f"{len(index):,} samples, {len(manifest.shards)} shards; {count} checked, {rate:,.0f} a second"
    return ok("shards", said)


def images(loader: Loader, batch: int) -> Finding:
    """Make some batches as a run does."""
    begin = time.perf_counter()
    made = sum(1 for _ in islice(loader.batches(), BATCHES))
    rate = made * batch / (time.perf_counter() - begin)
    return ok("images", f"{made} batches of {batch} for each process, {rate:,.0f} samples a second, start included")


def steps(loader: Loader, engine: TrainingEngine, plans: Sequence[StepPlan]) -> Iterator[Finding]:
    """Train two steps of every shape that a run will have, up to one that fails. Every process must consume this."""
    batch = next(loader.batches())
    for plan in plans:
        shape = f"{engine.method.tokens(plan)} tokens a sample, {plan.frozen_layers} frozen layers"
        failed, seconds = "", 0.0
        try:
            for _ in range(STEPS):
                seconds = _step(engine, batch, plan)
        except RuntimeError as error:
            failed = str(error).splitlines()[0]
        # What fails on one process would leave the others waiting.
        if any_rank(bool(failed))[0]:
            yield fail("steps", f"{shape}: {failed or 'failed on another process'}", LESS_MEMORY)
            return
        yield ok("steps", f"{shape}: {seconds:.2f} s{_peak()}")


def checkpoint(engine: TrainingEngine, checkpointer: Checkpointer) -> Finding:
    """Save and restore. Every process must call this."""
    begin = time.perf_counter()
    checkpointer.save(engine, TrainState(step=STEPS), 0.0)
    metrics = checkpointer.finish()
    saved = time.perf_counter()
    if checkpointer.failure:
        return fail("checkpoint", checkpointer.failure, "make room, or say runs=DIR")
    if checkpointer.restore(engine) is None:
        return fail(
            "checkpoint", f"what was written to {checkpointer.directory} is not found again", "look at the file system"
        )
    size = metrics["checkpoint_bytes"] / 1e6
    return ok(
        "checkpoint", f"{size:,.0f} MB written in {saved - begin:.1f} s, read in {time.perf_counter() - saved:.1f} s"
    )


def _step(engine: TrainingEngine, batch: Batch, plan: StepPlan) -> float:
    begin = time.perf_counter()
    engine.step(batch, plan)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - begin


def _peak() -> str:
    if not torch.cuda.is_available():
        return ""
    return f", {torch.cuda.max_memory_allocated() / 2**30:.1f} GiB"
