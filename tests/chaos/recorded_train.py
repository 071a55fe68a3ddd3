"""`coldpress train` with witnesses: what every step was given, and what the networks were at the end.

    python -m chaos.recorded_train key=value ...

Where to write, and which faults to feign, stands in the variables of `Witness`.
"""

from __future__ import annotations

import json
import os
import sys
import time
import zlib
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from chaos.sabotage import SABOTAGES
from chaos.tiny_run import STEPS
from torch.distributed.tensor import DTensor

from pipeline import cli
from pipeline.methods import Method
from pipeline.methods.base import Batch
from pipeline.schedules import StepPlan
from pipeline.shards import is_cut
from pipeline.training_engine import StepResult, TrainingEngine

VARIABLE = "CHAOS_WITNESS"
_JUMP_AFTER = 2  # steps of a life


@dataclass(frozen=True)
class Witness:
    """What one process of one life writes down, and what it is made to suffer."""

    record: str
    networks: str
    clock_hours: float = 0.0
    # Of every fsync, so that a save takes long enough to be hit anywhere.
    sync_seconds: float = 0.0
    sabotage: str = ""

    def variables(self) -> dict[str, str]:
        """Return the environment that hands this to a process."""
        return {VARIABLE: json.dumps(asdict(self))}


def main(words: list[str]) -> int:
    """Run the command as it is, watched; return its exit code."""
    witness = Witness(**json.loads(os.environ[VARIABLE]))
    engines = _watch_steps(Path(witness.record), _clock(witness.clock_hours))
    _slow_down(witness.sync_seconds)
    if witness.sabotage:
        SABOTAGES[witness.sabotage]()
    code = _exit_code(["train", *words])
    if code == 0:
        dump_networks(engines[-1].method, Path(witness.networks))
    return code


def _exit_code(words: list[str]) -> int:
    try:
        cli.main(words)
    except SystemExit as leaving:
        return int(leaving.code or 0)
    raise AssertionError("the command line ends by leaving")


def dump_networks(method: Method, path: Path) -> None:
    """Write the final weights and momentum encoder, whatever checkpoints look like. Every process must call this."""
    import deepspeed  # not before the engine's module, which tells it where it runs

    followers = {name: each for encoder in method.momentum_encoders() for name, each in encoder.parameters.items()}
    with deepspeed.zero.GatheredParameters([*method.parameters(), *followers.values()]):
        # Of what is cut the state has a part; in fp32 the network's own parameters are the average.
        whole = {name: _whole(each) for name, each in followers.items() if is_cut(each)}
        weights = {name: _whole(each) for name, each in method.state_dict().items()}
        networks = {"weights": weights, "momentum": method.state() | whole}
        if os.environ["RANK"] == "0":
            temporary = path.with_suffix(".tmp")
            torch.save(networks, temporary)
            temporary.rename(path)


def _whole(tensor: torch.Tensor) -> torch.Tensor:
    """Gather what FSDP2 has cut."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor.detach()


def _watch_steps(path: Path, tick: Callable[[], None]) -> list[TrainingEngine]:
    """Write one line for every step before it is taken; return the list that the engines will be in."""
    engines: list[TrainingEngine] = []
    record = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    step, start = TrainingEngine.step, TrainingEngine.__init__

    def started(self: TrainingEngine, *args: Any, **kwargs: Any) -> None:
        start(self, *args, **kwargs)
        engines.append(self)

    def watched(self: TrainingEngine, batch: Batch, plan: StepPlan, *args: Any) -> StepResult:
        os.write(record, f"{json.dumps(_seen(batch, plan))}\n".encode())
        tick()
        return step(self, batch, plan, *args)

    TrainingEngine.__init__, TrainingEngine.step = started, watched  # type: ignore[method-assign]
    return engines


def _seen(batch: Batch, plan: StepPlan) -> dict[str, object]:
    # From the plan, not from the samples: the two must agree.
    step = round(plan.progress * STEPS)
    pixels = [[zlib.crc32(image.numpy().tobytes()) for image in view] for view in batch.views]
    return {"step": step, "places": batch.index.tolist(), "pixels": list(zip(*pixels, strict=True))}


def _clock(hours: float) -> Callable[[], None]:
    """Return what counts the steps after which the clock on the wall jumps; no other clock does."""
    real, real_ns = time.time, time.time_ns
    steps = 0

    def tick() -> None:
        nonlocal steps
        steps += 1
        if hours and steps == _JUMP_AFTER:
            time.time = lambda: real() + hours * 3600
            time.time_ns = lambda: real_ns() + int(hours * 3600e9)

    return tick


def _slow_down(seconds: float) -> None:
    if not seconds:
        return
    real = os.fsync

    def slow(descriptor: int) -> None:
        time.sleep(seconds)
        real(descriptor)

    os.fsync = slow  # type: ignore[assignment]


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
