"""Command: look at a machine, its disks and a run before the run is started; one process or all of them."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch.distributed as dist

from data.resources import processes_here
from pipeline import distributed
from pipeline.checkpoint import TrainState
from pipeline.checkups import disk, machine, trial
from pipeline.checkups.finding import Finding, Verdict, table, unfit_nodes, worst
from pipeline.config import DoctorConfig
from pipeline.distributed import World
from pipeline.parts import build


def run(config: DoctorConfig) -> int:
    """Print what was found, with a remedy for what is wrong; return 1 if a run would not go."""
    world = distributed.start()
    by_rank, nodes = _of_all(list(_checkups(config, world)))
    findings = worst(by_rank, nodes)
    if world.is_main:
        print(table(findings))
        # The batch script reads it.
        if unfit := unfit_nodes(by_rank, nodes):
            print(f"nodes to leave out: {','.join(unfit)}")
    return int(any(each.verdict is Verdict.fail for each in findings))


def _checkups(config: DoctorConfig, world: World) -> Iterator[Finding]:
    """Yield what each check finds; every process makes the same ones."""
    yield machine.packages()
    yield machine.gpu(world)
    yield machine.cores()
    yield machine.memory(processes_here())
    yield machine.clock(world)
    yield machine.network(world)
    yield disk.run_directory(Path(config.runs), world)
    if config.data.shards:
        readable = trial.shards(Path(config.data.shards), config.samples, seed=world.rank)
        yield readable
        if not distributed.any_rank(readable.verdict is Verdict.fail)[0] and not config.quick:
            yield from _run_in_small(config, world)


def _run_in_small(config: DoctorConfig, world: World) -> Iterator[Finding]:
    """Yield what becomes of the run's first batches, of steps of every shape and of a checkpoint."""
    Path(config.runs).mkdir(parents=True, exist_ok=True)
    scratch = Path(distributed.from_main(tempfile.mkdtemp(prefix=".doctor-", dir=config.runs) if world.is_main else ""))
    try:
        parts = build(replace(config, run="trial", runs=str(scratch), overwrite=False), world)
        yield trial.images(parts.loader, config.batch_size // world.size)
        yield from trial.steps(parts.loader, parts.engine, parts.plans_ahead(TrainState()))
        yield trial.checkpoint(parts.engine, parts.checkpointer)
        parts.loader.close()
    finally:
        distributed.barrier()
        if world.is_main:
            shutil.rmtree(scratch, ignore_errors=True)


def _of_all(findings: list[Finding]) -> tuple[list[list[Finding]], list[str]]:
    """Return what every process found, and where each is."""
    everything: list[tuple[list[Finding], str]] = [([], "")] * distributed.world_size()
    if distributed.world_size() == 1:
        return [findings], [distributed.host()]
    dist.all_gather_object(everything, (findings, distributed.host()))
    by_rank, hosts = zip(*everything, strict=True)
    return list(by_rank), list(hosts)
