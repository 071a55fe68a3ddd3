"""Reading ahead: the order of what comes back, and how many threads take part."""

import threading
import time
from collections.abc import Iterable
from concurrent.futures import CancelledError
from types import SimpleNamespace

import pytest

from data.read_ahead import ReadAhead


class Reads:
    """A read that says how many of it went on at once."""

    def __init__(self) -> None:
        self.at_once: list[int] = []
        self._lock, self._going_on = threading.Lock(), 0

    def __call__(self, ids: Iterable[int]) -> list[int]:
        with self._lock:
            self._going_on += 1
            self.at_once.append(self._going_on)
        time.sleep(0.005)
        with self._lock:
            self._going_on -= 1
        return [10 * each for each in ids]


@pytest.fixture
def ratio(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Let every read take ``ratio.of`` times as long as the processor had to do with it."""
    ratio, calls = SimpleNamespace(of=1.0), threading.local()

    def processor() -> float:
        calls.processor = getattr(calls, "processor", 0.0) + 1.0
        return float(calls.processor)

    def wall() -> float:
        calls.wall = getattr(calls, "wall", 0.0) + ratio.of
        return float(calls.wall)

    monkeypatch.setattr("data.read_ahead.time", SimpleNamespace(perf_counter=wall, thread_time=processor))
    return ratio


def test_results_are_in_the_order_of_the_samples() -> None:
    ahead = ReadAhead(Reads())
    both = [ahead.start(range(100)), ahead.start(range(100, 130))]
    assert [each for futures in both for future in futures for each in future.result()] == list(range(0, 1300, 10))
    ahead.close()


def test_an_error_reaches_who_waits_for_the_sample_and_reading_goes_on() -> None:
    def read(ids: Iterable[int]) -> list[int]:
        if 20 in ids:
            raise ValueError("shard 3 is gone")
        return list(ids)

    ahead = ReadAhead(read)
    first, second, third = ahead.start(range(48))
    with pytest.raises(ValueError, match="shard 3 is gone"):
        second.result()
    assert (first.result(), third.result()) == (list(range(16)), list(range(32, 48)))
    ahead.close()


@pytest.mark.parametrize(("of", "threads"), [(1.0, 1), (1.9, 1), (4.1, 4), (100.0, 8)])
def test_as_many_threads_read_as_hide_the_waiting(ratio: SimpleNamespace, of: float, threads: int) -> None:
    ratio.of, reads = of, Reads()
    ahead = ReadAhead(reads)
    for _ in range(3):
        for future in ahead.start(range(16 * 40)):
            future.result()
    assert reads.at_once[0] == 1
    assert max(reads.at_once) == threads
    ahead.close()


def test_threads_that_are_no_longer_needed_stop(ratio: SimpleNamespace) -> None:
    ratio.of, reads = 8.0, Reads()
    ahead = ReadAhead(reads)
    for future in ahead.start(range(16 * 60)):
        future.result()
    assert max(reads.at_once) >= 7
    ratio.of = 1.0
    reads.at_once.clear()
    for future in ahead.start(range(16 * 80)):
        future.result()
    assert max(reads.at_once[:10]) > 1
    assert max(reads.at_once[-40:]) == 1
    ahead.close()


def test_what_is_needed_first_is_read_first(ratio: SimpleNamespace) -> None:
    read: list[int] = []

    def append(ids: Iterable[int]) -> list[int]:
        read.extend(ids)
        return []

    ahead = ReadAhead(append)
    for future in [*ahead.start(range(200)), *ahead.start(range(200, 400))]:
        future.result()
    assert read == list(range(400))
    ahead.close()


def test_what_nobody_has_begun_is_left_when_it_closes() -> None:
    reads = Reads()
    ahead = ReadAhead(reads)
    futures = ahead.start(range(16 * 1000))
    ahead.close()
    assert len(reads.at_once) < 100
    with pytest.raises(CancelledError):
        futures[-1].result()
