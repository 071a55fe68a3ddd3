"""Where the time of a step goes: seconds of its parts, each without those inside it."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from typing import Any

import torch
from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

from pipeline.benchmarks.cases import synchronize
from pipeline.benchmarks.collectives import around_collectives, replaced
from pipeline.benchmarks.report import Column
from pipeline.benchmarks.timing import Spread
from pipeline.distributed import World
from pipeline.heartbeat import Phase, Unwatched
from pipeline.methods.base import Batch
from pipeline.schedules import StepPlan
from pipeline.training_engine import TrainingEngine

FORWARD, GATHERS, BACKWARD, REDUCTION = "forward", "gathers", "backward", "reduction"
OPTIMIZER, ENGINE, MOMENTUM = "optimizer", "engine", "momentum"
# In the order in which a step has them. Of the engine: norms, clipping, copies, whatever it does beside AdamW.
PARTS = (FORWARD, GATHERS, BACKWARD, REDUCTION, OPTIMIZER, ENGINE, MOMENTUM)
_OF_PHASE = {Phase.forward: FORWARD, Phase.backward: BACKWARD, Phase.step: ENGINE}


class Stopwatch(Unwatched):
    """Gives every moment to the innermost part that is open; at each change it waits until the device is done.

    So nothing overlaps, and on a GPU the parts add up to more than a step that is left alone.
    """

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.seconds = dict.fromkeys(PARTS, 0.0)
        # Of all collectives, of the whole sums and gathers.
        self.num_bytes = 0
        self._device = device
        self._open = [ENGINE]
        synchronize(device)
        self._since = time.perf_counter()

    def enter(self, phase: Phase) -> None:
        """Go on to a phase, as who runs a step says."""
        self._charge()
        self._open = [_OF_PHASE[phase]]

    def open(self, part: str) -> None:
        """Begin a part inside the one that is open."""
        self._charge()
        self._open.append(part)

    def close(self) -> None:
        """End the innermost part."""
        self._charge()
        self._open.pop()

    @contextmanager
    def part(self, part: str) -> Iterator[None]:
        """Begin a part and end it."""
        self.open(part)
        yield
        self.close()

    @contextmanager
    def watching(self, owner: object, momentum: str) -> Iterator[None]:
        """Tell apart what no phase does: AdamW, collectives, and the momentum update, a method of its owner."""
        update = getattr(owner, momentum)

        def timed(*arguments: Any) -> None:
            with self.part(MOMENTUM):
                update(*arguments)

        with ExitStack() as stack:
            hooks = (
                register_optimizer_step_pre_hook(lambda *_: self.open(OPTIMIZER)),
                register_optimizer_step_post_hook(lambda *_: self.close()),
            )
            for hook in hooks:
                stack.callback(hook.remove)
            stack.enter_context(replaced(owner, momentum, timed))
            stack.enter_context(around_collectives(self._collective))
            yield

    def stop(self) -> dict[str, float]:
        """Return the seconds of each part."""
        self._charge()
        return self.seconds

    def _collective(self, name: str, num_bytes: int) -> AbstractContextManager[None]:
        """Begin and end what a collective is for: in a forward others' rows or weights are needed."""
        self.num_bytes += num_bytes
        return self.part(GATHERS if self._open[0] == FORWARD else REDUCTION)

    def _charge(self) -> None:
        synchronize(self._device)
        now = time.perf_counter()
        self.seconds[self._open[-1]] += now - self._since
        self._since = now


def split(engine: TrainingEngine, batch: Batch, plan: StepPlan, world: World) -> dict[str, float]:
    """Take a step and return the seconds of its parts."""
    watch = Stopwatch(world.device)
    with watch.watching(engine.method, "after_step"):
        engine.step(batch, plan, watch)
        return watch.stop()


def part_fields(splits: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return milliseconds of each part over several steps, and of all together, as fields of a row."""
    fields: dict[str, float] = {}
    for part in PARTS:
        fields |= Spread.of([1e3 * each[part] for each in splits]).fields(f"{part}_ms")
    return fields | Spread.of([1e3 * sum(each.values()) for each in splits]).fields("split_ms")


# A table of its own: what `part_fields` returns, and what is known of a step beside it.
PART_COLUMNS = (
    Column("case", "ms of"),
    *(Column(f"{part}_ms", part, ".1f", better="less") for part in PARTS),
    Column("split_ms", "together", ".1f"),
    Column("host_ms", "host at most", ".1f"),
    Column("data_ms", "data", ".1f"),
)
