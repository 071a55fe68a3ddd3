"""What saving costs a run, and what resuming does: the loop's stall, the time until the state is durable, its size."""

from __future__ import annotations

import shutil
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

from pipeline.benchmarks.cases import make_batch, make_engine, make_plan, seconds
from pipeline.benchmarks.report import Column, Report
from pipeline.benchmarks.resuming import Resume, resume
from pipeline.benchmarks.timing import Spread
from pipeline.checkpoint import CheckpointConfig, Checkpointer, TrainState
from pipeline.checkpoint_files import sync
from pipeline.compression import Compression
from pipeline.config import BenchConfig
from pipeline.distributed import World, any_rank, barrier, from_main
from pipeline.engine import Engine
from pipeline.engine_config import FSDP2

COLUMNS = (
    Column("case", "case"),
    Column("stall", "stall s", ".3f", better="less"),
    Column("stall_low", "low", ".3f"),
    Column("stall_high", "high", ".3f"),
    Column("stall_steps", "in steps", ".2f"),
    Column("durable", "durable s", ".2f", better="less"),
    Column("durable_low", "low", ".2f"),
    Column("durable_high", "high", ".2f"),
    Column("megabytes", "MB", ".0f", better="less"),
    Column("step_ratio", "step, writing / not", ".2f"),
    Column("resume", "resume s", ".1f", better="less"),
    Column("resume_low", "low", ".1f"),
    Column("resume_high", "high", ".1f"),
)
# Each starts Python, reads the checkpoint and builds the model anew.
RESUMES = 3


class Contest:
    """An engine that saves in turn as coldpress does and as DeepSpeed does."""

    def __init__(self, config: BenchConfig, world: World, scratch: Path) -> None:
        self._world, self._scratch = world, scratch
        engine, method = make_engine(config, world)
        assert isinstance(engine, Engine)
        self._engine = engine
        self._plan = make_plan(config, method, Compression(), 0)
        self._batch = make_batch(config, world, method)
        self._keeper = Checkpointer(scratch / "ours", CheckpointConfig(keep_last=1), {})
        self._state = TrainState()
        self.step_seconds: list[float] = []
        self.steps_while_writing: list[float] = []

    def step(self) -> float:
        """Train one step and return its seconds."""
        self._state.step += 1
        return seconds(self._engine, self._batch, self._plan, self._world)

    def ours(self) -> tuple[float, float]:
        """Save while training goes on; return seconds of stall, and until all of it is durable."""
        self.step_seconds.append(self.step())
        barrier()
        begin = time.perf_counter()
        self._keeper.save(self._engine, self._state, 0.0)
        stall, done = time.perf_counter() - begin, False
        while not done:
            self.steps_while_writing.append(self.step())
            done = bool(self._keeper.settle(*any_rank(*self._keeper.pending())))
        assert not self._keeper.failure, self._keeper.failure
        return stall, time.perf_counter() - begin

    def theirs(self) -> tuple[float, float]:
        """Save as DeepSpeed does, then sync what it wrote, which it does not; return the same."""
        self.step()
        folder = self._scratch / "theirs" / f"step{self._state.step}"
        barrier()
        begin = time.perf_counter()
        self._engine.save_as_deepspeed(folder)
        stall = time.perf_counter() - begin
        if self._world.is_main:
            for path in folder.iterdir():
                sync(path)
            sync(folder)
        barrier()
        return stall, time.perf_counter() - begin

    def forget(self) -> None:
        """Delete what DeepSpeed has written."""
        barrier()
        if self._world.is_main:
            shutil.rmtree(self._scratch / "theirs", ignore_errors=True)
        barrier()


def bench_checkpoint(config: BenchConfig, world: World) -> Report:
    """Measure saves beside training against DeepSpeed's own, in turn, and a resume in a process of its own.

    Raises:
        ValueError: an engine without saves of DeepSpeed's own.
    """
    if isinstance(config.engine, FSDP2):
        raise ValueError(
            "bench what=checkpoint measures against DeepSpeed's own saves, which engine=fsdp2 does not have; "
            "take engine=zero1 or another stage."
        )
    scratch = Path(from_main(tempfile.mkdtemp(prefix="coldpress-bench-", dir=_place(config)) if world.is_main else ""))
    try:
        return _measure(config, world, scratch)
    finally:
        if world.is_main:
            shutil.rmtree(scratch, ignore_errors=True)


def _measure(config: BenchConfig, world: World, scratch: Path) -> Report:
    contest = Contest(config, world, scratch)
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    # The first round maps memory and writes to a cold disk: for both.
    for round_ in range(config.rounds + 1):
        for save, kept in ((contest.ours, ours), (contest.theirs, theirs)):
            result = save()
            if round_:
                kept.append(result)
        their_bytes = _size(scratch / "theirs")
        contest.forget()
    step = Spread.of(contest.step_seconds).median
    rows = [
        _row("coldpress, beside training", ours, _size(scratch / "ours"), step),
        _row("DeepSpeed, synchronous", theirs, their_bytes, step),
    ]
    rows[0]["step_ratio"] = Spread.of(contest.steps_while_writing).median / step
    resumes = [resume(config, scratch / "ours") for _ in range(RESUMES)] if world.is_main else []
    rows[0] |= Spread.of([each.total for each in resumes]).fields("resume") if resumes else {}
    return Report(COLUMNS, rows, _notes(resumes), {"resumes": [asdict(each) for each in resumes]})


def _notes(resumes: list[Resume]) -> list[str]:
    """Say where a resume's time goes."""
    if not resumes:
        return []
    parts = {
        "Python and imports": [each.start for each in resumes],
        "network and engine": [each.build for each in resumes],
        "checksums and reading": [each.restore for each in resumes],
        "the first step": [each.step for each in resumes],
    }
    said = ", ".join(f"{name} {Spread.of(each).median:.1f}" for name, each in parts.items())
    return [f"resume: from the start of a process to the end of its first step, {len(resumes)} times; {said} s."]


def _row(case: str, times: list[tuple[float, float]], num_bytes: int, step: float) -> dict[str, object]:
    stalls, durables = (Spread.of(values) for values in zip(*times, strict=True))
    return {
        "case": case,
        **stalls.fields("stall"),
        "stall_steps": stalls.median / step,
        **durables.fields("durable"),
        "megabytes": num_bytes / 1e6,
    }


def _place(config: BenchConfig) -> Path:
    """Return where to write: beside the report, on the disk that a run would use."""
    return Path(config.output).absolute().parent if config.output else Path.cwd()


def _size(directory: Path) -> int:
    return sum(path.stat().st_size for path in directory.rglob("*") if path.is_file())
