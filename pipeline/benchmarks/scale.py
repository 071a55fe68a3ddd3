"""A step on several numbers of processes, which the command starts and which take turns: weak and strong scaling."""

from __future__ import annotations

import multiprocessing
import os
import socket
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from multiprocessing.connection import Connection
from typing import Any

import torch

from data.resources import share_of_cores
from pipeline import accumulation
from pipeline.benchmarks.cases import WARMUP, make_batch, make_engine, make_plan, seconds
from pipeline.benchmarks.report import Column, Report
from pipeline.benchmarks.split import PART_COLUMNS, PARTS, Stopwatch, part_fields
from pipeline.benchmarks.timing import Spread
from pipeline.compression import Compression
from pipeline.config import BenchConfig
from pipeline.distributed import World, barrier, start
from pipeline.methods import Method, build_method
from pipeline.models.vit import ViT
from pipeline.preemption import ProcessFailedError
from pipeline.traffic import step_traffic, total

WEAK, STRONG = "weak", "strong"
COLUMNS = (
    Column("case", "case"),
    Column("processes", "processes", "d"),
    Column("batch", "batch", "d"),
    Column("milliseconds", "ms/step", ".1f", better="less"),
    Column("milliseconds_low", "min", ".1f"),
    Column("milliseconds_high", "max", ".1f"),
    Column("samples_per_second", "samples/s", ".1f"),
    Column("efficiency", "efficiency", ".2f", better="more"),
    Column("efficiency_low", "min", ".2f"),
    Column("efficiency_high", "max", ".2f"),
    Column("megabytes", "MB sent", ".3f", better="less"),
    Column("expected_megabytes", "by shapes", ".3f"),
)
NOTES = (
    "weak: each process keeps its batch; strong: the whole batch stays. Every process has as many threads.",
    "efficiency: a process's samples/s over those of the first row, round by round.",
    "MB sent: whole sums and gathers of a step, as they are called, and by shapes, as `coldpress plan ranks=[...]` has "
    "them; parts: mean over processes.",
)
Case = tuple[int, str]
Answer = dict[str, float]


def bench_scale(config: BenchConfig, world: World) -> Report:
    """Measure steps on the numbers of processes in `ranks`, the first of which has `batch_size` samples.

    Raises:
        ValueError: a launcher that has started several processes, batches that cannot be shared, too few GPUs.
        ProcessFailedError: one of the processes has ended.
    """
    numbers = sorted(set(config.ranks))
    _check(config, world, numbers)
    sizes = batches(config.batch_size, numbers)
    threads = max(1, share_of_cores() // numbers[-1])
    cases = [_Measured(*case, size) for case, size in sizes.items()]
    with ExitStack() as stack:
        crews = {number: stack.enter_context(_Crew(config, number, sizes, threads)) for number in numbers}
        for round_ in range(WARMUP + config.rounds):
            for each in cases:
                answers = crews[each.processes].ask((each.processes, each.scaling))
                if round_ >= WARMUP:
                    each.rounds.append(answers)
    rows = [_row(config, each, cases[0]) for each in cases]
    return Report(COLUMNS, rows, NOTES, {"threads": threads}, further=(PART_COLUMNS,))


def batches(batch_size: int, numbers: Sequence[int]) -> dict[Case, int]:
    """Return the whole batch of each case; at the fewest processes weak and strong scaling begin alike."""
    first = numbers[0]
    sizes = {(first, ""): batch_size}
    for number in numbers[1:]:
        sizes |= {(number, WEAK): batch_size // first * number, (number, STRONG): batch_size}
    return sizes


@dataclass(frozen=True)
class _Measured:
    """Some processes with a whole batch, and what each of them said of every round."""

    processes: int
    scaling: str
    batch: int
    rounds: list[list[Answer]] = field(default_factory=list)

    @property
    def name(self) -> str:
        """Return the name of a row."""
        plural = "es" if self.processes > 1 else ""
        return f"{self.processes} process{plural}" + (f", {self.scaling}" if self.scaling else "")

    @property
    def local(self) -> int:
        """Return the samples of each process."""
        return self.batch // self.processes

    @property
    def seconds(self) -> list[float]:
        """Return how long a step took, which is over when the last process is done."""
        return [max(each["seconds"] for each in answers) for answers in self.rounds]


class _Crew:
    """Some processes that measure when they are asked to, and rest otherwise."""

    def __init__(self, config: BenchConfig, number: int, sizes: dict[Case, int], threads: int) -> None:
        context = multiprocessing.get_context("spawn")
        cases = {case: replace(config, batch_size=size) for case, size in sizes.items() if case[0] == number}
        port = _free_port()
        self._pipes: list[Connection] = []
        self._processes = []
        for rank in range(number):
            ours, theirs = context.Pipe()
            process = context.Process(target=_work, args=(cases, rank, number, port, threads, theirs), daemon=True)
            process.start()
            theirs.close()
            self._pipes.append(ours)
            self._processes.append(process)

    def __enter__(self) -> _Crew:
        return self

    def __exit__(self, error: object, *_: object) -> None:
        for pipe in self._pipes:
            pipe.close()
        for process in self._processes:
            if error:
                # It may wait for one that has ended.
                process.terminate()
            process.join()

    def ask(self, case: Case) -> list[Answer]:
        """Return what each process says of a step that all of them take.

        Raises:
            ProcessFailedError: one of them has ended.
        """
        try:
            for pipe in self._pipes:
                pipe.send(case)
            return [pipe.recv() for pipe in self._pipes]
        except (EOFError, BrokenPipeError, ConnectionResetError) as error:
            raise ProcessFailedError("a process of what=scale has ended; its own message stands above.") from error


def _work(cases: dict[Case, BenchConfig], rank: int, number: int, port: int, threads: int, pipe: Connection) -> None:
    names = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": number, "LOCAL_WORLD_SIZE": number, "MASTER_PORT": port}
    os.environ.update({name: str(value) for name, value in names.items()}, MASTER_ADDR="127.0.0.1")
    torch.set_num_threads(threads)
    world = start()
    runners = {case: _Runner(config, world) for case, config in cases.items()}
    while True:
        try:
            case = pipe.recv()
        except EOFError:
            break
        pipe.send(runners[case].step())
    barrier()
    # ZeRO 3 over gloo aborts now and then when the interpreter ends.
    os._exit(0)


class _Runner:
    """An engine with its share of a batch."""

    def __init__(self, config: BenchConfig, world: World) -> None:
        self._config, self._world = config, world
        self._engine, self._method = make_engine(config, world)
        self._plan = make_plan(config, self._method, Compression(), 0)

    def step(self) -> Answer:
        """Take a step that is timed as a whole, and one whose parts are; return the seconds, and the bytes it sent."""
        batch = make_batch(self._config, self._world, self._method)
        barrier()
        whole = seconds(self._engine, batch, self._plan, self._world)
        barrier()
        watch = Stopwatch(self._world.device)
        with watch.watching(self._method, "after_step"):
            self._engine.step(batch, self._plan, watch)
            return {"seconds": whole, **watch.stop(), "bytes": watch.num_bytes}


def _row(config: BenchConfig, own: _Measured, first: _Measured) -> dict[str, Any]:
    # Samples a second and process, of rounds that ran side by side.
    share = own.local / first.local
    efficiency = [share * a / b for a, b in zip(first.seconds, own.seconds, strict=True)]
    parts = [{part: statistics.mean(each[part] for each in answers) for part in PARTS} for answers in own.rounds]
    return {
        "case": own.name,
        "processes": own.processes,
        "batch": own.batch,
        **Spread.of([1e3 * each for each in own.seconds]).fields("milliseconds"),
        "samples_per_second": own.batch / Spread.of(own.seconds).median,
        **Spread.of(efficiency).fields("efficiency"),
        "rounds": own.seconds,
        **(_sent(config, own) if own.processes > 1 else {}),
        **part_fields(parts),
    }


def _sent(config: BenchConfig, own: _Measured) -> dict[str, float]:
    """Return what the first process counted, and what shapes say. (Alone DeepSpeed calls collectives, too.)"""
    counted = Spread.of([answers[0]["bytes"] for answers in own.rounds]).median
    return {"megabytes": counted / 1e6, "expected_megabytes": _expected_bytes(config, own) / 1e6}


def _expected_bytes(config: BenchConfig, measured: _Measured) -> int:
    method = _imagined(config)
    plan = make_plan(config, method, Compression(), 0)
    return total(step_traffic(method, plan, config.engine, measured.processes, measured.local))


def _imagined(config: BenchConfig) -> Method:
    """Return the method without weights."""
    with torch.device("meta"):
        return build_method(config.method, ViT(replace(config.model, weights=""), 0))


def _check(config: BenchConfig, world: World, numbers: Sequence[int]) -> None:
    if world.size > 1:
        raise ValueError(f"what=scale starts its own processes, and runs in {world.size}; start it without a launcher.")
    uneven = [number for number in numbers if config.batch_size % number]
    if uneven:
        raise ValueError(
            f"batch_size must be divisible by the numbers of processes, got {config.batch_size} and ranks={numbers}; "
            f"take a multiple of {uneven[-1]}."
        )
    method = _imagined(config)
    for (number, _), size in batches(config.batch_size, numbers).items():
        accumulation.check(config.engine.micro_batch, size // number, method)
    devices = torch.cuda.device_count()
    if world.device.type == "cuda" and numbers[-1] > devices:
        raise ValueError(f"ranks must not be above the {devices} GPUs of this machine, got {numbers}; say fewer.")


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
