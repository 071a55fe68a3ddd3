"""Ratios and medians by hand; the CPU clock sees threads and worker processes."""

import math
import multiprocessing
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pipeline.benchmarks import timing
from pipeline.benchmarks.timing import Round, Spread, Stream, alternate, cpu_seconds, fastest, measure, ratios, settled


def burn(seconds: float) -> None:
    end = time.process_time() + seconds
    while time.process_time() < end:
        pass


def burning(seconds: float) -> Stream:
    while True:
        burn(seconds)
        yield None


def rounds(*cpu_seconds: float) -> list[Round]:
    return [Round(images=10, cpu_seconds=cpu, wall_seconds=2 * cpu) for cpu in cpu_seconds]


def test_a_round_per_image() -> None:
    (one,) = rounds(0.05)
    assert one.cpu_milliseconds == pytest.approx(5.0)
    assert one.images_per_second == pytest.approx(100.0)


def test_spread_is_median_smallest_and_largest() -> None:
    assert Spread.of([3.0, 1.0, 10.0, 2.0]) == Spread(2.5, 1.0, 10.0)


def test_ratios_pair_rounds_that_ran_side_by_side() -> None:
    # The ratio of the medians would be 1.5 as well, but with the spread of the machine, not of the contenders.
    assert ratios(rounds(3.0, 6.0, 12.0), rounds(2.0, 4.0, 8.0)) == Spread(1.5, 1.5, 1.5)
    assert ratios(rounds(3.0, 4.0), rounds(1.0, 4.0)) == Spread(2.0, 1.0, 3.0)


def test_ratios_need_equally_many_rounds() -> None:
    with pytest.raises(ValueError, match="zip"):
        ratios(rounds(1.0, 2.0), rounds(1.0))


def test_the_fastest_has_the_smallest_median_not_the_smallest_round() -> None:
    assert fastest({"lucky once": rounds(1.0, 9.0, 9.0), "steady": rounds(5.0, 5.0, 5.0)}) == "steady"


def test_a_round_costs_what_its_batches_cost() -> None:
    result = measure(burning(0.05), batches=4, batch_size=10)
    assert result.images == 40
    # Clocks of threads and of the wall differ by a tick.
    assert 0.19 <= result.cpu_seconds < 0.4
    assert result.wall_seconds >= 0.19


def test_streams_take_turns_and_are_closed() -> None:
    turns: list[str] = []

    def stream(name: str) -> Stream:
        try:
            while True:
                turns.append(name)
                yield None
        finally:
            turns.append(f"{name} closed")

    streams = {"a": stream("a"), "b": stream("b")}
    measured = alternate(streams, rounds=2, batches=2, batch_size=1)
    assert turns == [*"aabb" * 3, "a closed", "b closed"]
    assert [len(each) for each in measured.values()] == [2, 2]


def test_streams_are_closed_when_one_fails() -> None:
    closed: list[str] = []

    def failing() -> Stream:
        yield None
        raise RuntimeError("broken")

    def patient() -> Stream:
        try:
            while True:
                yield None
        finally:
            closed.append("patient")

    streams = {"patient": patient(), "failing": failing()}
    with pytest.raises(RuntimeError, match="broken"):
        alternate(streams, rounds=2, batches=1, batch_size=1)
    assert closed == ["patient"]


def test_a_process_that_never_rests_is_no_endless_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "_PATIENCE_SECONDS", 0.3)
    over = threading.Event()
    busy = threading.Thread(target=lambda: [burn(0.01) for _ in iter(over.is_set, True)])
    busy.start()
    try:
        with pytest.raises(RuntimeError, match="still busy"):
            measure(burning(0.01), batches=1, batch_size=1)
    finally:
        over.set()
        busy.join()


def test_a_worker_that_gets_no_core_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its CPU time may stand still for longer than a rest would last."""
    monkeypatch.setattr(timing, "_BUSY_SHARE", math.inf)
    monkeypatch.setattr(timing, "_QUIET_SECONDS", 0.06)
    process = multiprocessing.get_context("fork").Process(target=burn, args=(1.0,))
    process.start()
    _, ended = settled()
    assert not process.is_alive() or timing._state(Path(f"/proc/{process.pid}/task/{process.pid}")) in ("Z", "X", "")
    assert cpu_seconds() >= 1.0
    assert ended <= time.perf_counter()
    process.join()


def burn_and_wait(pipe: Any) -> None:
    burn(0.2)
    pipe.send("burned")
    pipe.recv()


@pytest.fixture
def worker() -> Iterator[Any]:
    """Start a process that burns 0.2 s of CPU time, says so, and waits."""
    here, there = multiprocessing.Pipe()
    process = multiprocessing.get_context("fork").Process(target=burn_and_wait, args=(there,))
    before = cpu_seconds()
    process.start()
    yield here, process, before
    process.kill()


def test_workers_count_while_they_live_and_after_they_ended(worker: Any) -> None:
    pipe, process, before = worker
    assert pipe.recv() == "burned"
    living = cpu_seconds() - before
    assert living >= 0.2
    pipe.send("go")
    process.join()
    assert cpu_seconds() - before >= living
    assert cpu_seconds() - before < living + 0.2
