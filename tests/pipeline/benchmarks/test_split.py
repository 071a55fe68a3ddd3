"""Every moment of a step belongs to one part, and what watches it leaves no trace."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
import torch.distributed as dist

from pipeline import distributed
from pipeline.benchmarks import split as split_module
from pipeline.benchmarks.cases import make_batch, make_engine, make_plan
from pipeline.benchmarks.collectives import around_collectives, replaced, whole_bytes
from pipeline.benchmarks.fed import fed_fields, fed_steps
from pipeline.benchmarks.split import PARTS, Stopwatch, part_fields, split
from pipeline.compose import load
from pipeline.compression import Compression
from pipeline.heartbeat import Phase

CPU = torch.device("cpu")
SMALL = ["model.name=vit_tiny_patch16_224", "model.image_size=32", "model.patch_size=8", "model.depth=2"]
SMALL += ["method.hidden_dim=32", "method.out_dim=16", "engine.precision=fp32", "batch_size=4"]


class Clock:
    """A clock that is set by hand."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(split_module.time, "perf_counter", lambda: self.now)


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    return Clock(monkeypatch)


class Owner:
    """Has a momentum update."""

    def __init__(self, clock: Clock) -> None:
        self._clock = clock

    def follow(self, seconds: float) -> None:
        """Take some time."""
        self._clock.now += seconds


def only(**seconds: float) -> dict[str, float]:
    return dict.fromkeys(PARTS, 0.0) | seconds


def test_the_innermost_part_has_the_time(clock: Clock) -> None:
    watch = Stopwatch(CPU)
    clock.now += 1
    watch.enter(Phase.forward)
    clock.now += 2
    with watch.part("gathers"):
        clock.now += 4
    clock.now += 8
    watch.enter(Phase.backward)
    clock.now += 16
    with watch.part("reduction"):
        clock.now += 32
    watch.enter(Phase.step)
    clock.now += 64
    assert watch.stop() == only(engine=1 + 64, forward=2 + 8, gathers=4, backward=16, reduction=32)


def test_optimizers_and_momentum_updates_are_told_apart(clock: Clock) -> None:
    class Slow(torch.optim.SGD):
        def step(self, closure: object = None) -> None:  # type: ignore[override]
            clock.now += 2

    owner, weight = Owner(clock), torch.nn.Parameter(torch.ones(1))
    optimizer = Slow([weight], lr=0.1)
    watch = Stopwatch(CPU)
    with watch.watching(owner, "follow"):
        clock.now += 1
        optimizer.step()
        owner.follow(4)
        clock.now += 8
    optimizer.step()
    owner.follow(16)
    assert watch.stop() == only(engine=1 + 8 + 2 + 16, optimizer=2, momentum=4)


@pytest.fixture
def group() -> None:
    distributed.start()


@pytest.mark.usefixtures("group")
def test_collectives_of_a_forward_gather_and_all_others_reduce() -> None:
    watch = Stopwatch(CPU)
    original = dist.ProcessGroup.allreduce
    numbers = torch.ones(1000)
    with watch.watching(Owner, "follow"):
        for phase in (Phase.forward, Phase.backward, Phase.step):
            watch.enter(phase)
            dist.all_reduce(numbers)
        dist.all_gather([torch.empty(500)], torch.ones(500))
    seconds = watch.stop()
    assert seconds["gathers"] > 0
    assert seconds["reduction"] > 0
    # Whole sums, and what is gathered.
    assert watch.num_bytes == 3 * 4000 + 2000
    assert dist.ProcessGroup.allreduce is original


def test_a_collective_is_over_when_its_context_ends() -> None:
    """On several processes it goes on after the call that began it."""
    happened = []

    class Work:
        def wait(self) -> None:
            happened.append("waited")

    @contextmanager
    def around(name: str, num_bytes: int) -> Iterator[None]:
        happened.append(f"{name} of {num_bytes}")
        yield
        happened.append("over")

    class Group:
        def allreduce(self, tensors: list[torch.Tensor]) -> Work:
            return Work()

    with replaced(dist, "ProcessGroup", Group), around_collectives(around):
        Group().allreduce([torch.ones(10)])
    Group().allreduce([torch.ones(10)])
    assert happened == ["allreduce of 40", "waited", "over"]


def test_bytes_of_nested_lists() -> None:
    assert whole_bytes([[torch.ones(3), torch.ones(2)], (torch.ones(1, dtype=torch.bfloat16), "x", None)]) == 22


@pytest.mark.usefixtures("group")
def test_a_step_in_parts_changes_nothing_of_the_step() -> None:
    losses = []
    for in_parts in (False, True):
        config = load("bench", SMALL)
        engine, method = make_engine(config, distributed.start())
        world, plan = distributed.start(), make_plan(config, method, Compression(), 0)
        torch.manual_seed(1)
        batch = make_batch(config, world, method)
        for _ in range(2):
            if in_parts:
                split(engine, batch, plan, world)
            else:
                engine.step(batch, plan)
        losses.append(float(engine.step(batch, plan).loss))
        # What was put in the place of the method's own is gone.
        assert "after_step" not in vars(method)
    assert losses[0] == losses[1]


def test_parts_as_fields_are_medians_in_milliseconds() -> None:
    fields = part_fields([only(forward=0.001, backward=0.002), only(forward=0.003), only(forward=0.002)])
    assert (fields["forward_ms"], fields["forward_ms_low"], fields["forward_ms_high"]) == pytest.approx((2, 1, 3))
    assert (fields["backward_ms"], fields["split_ms"]) == pytest.approx((0, 3))


def test_the_first_steps_that_find_full_queues_do_not_count(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = Clock(monkeypatch)

    def batches() -> Iterator[int]:
        for number in range(100):
            clock.now += 0.0 if number < 3 else 0.25
            yield number

    taken: list[int] = []

    def step(batch: int) -> None:
        taken.append(batch)
        clock.now += 0.75

    steps = fed_steps(batches(), step, CPU, skip=3, steps=2)
    assert taken == [0, 1, 2, 3, 4]
    assert steps == [(1.0, 0.25), (1.0, 0.25)]
    fields = fed_fields(steps)
    assert (fields["fed_ms"], fields["data_ms"], fields["waiting"]) == (1000, 250, 0.25)
