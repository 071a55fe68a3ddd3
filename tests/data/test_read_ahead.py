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
    """Let every read take ``ratio.of`` times as long as the processor had to do with it; nobody grows impatient."""
    ratio, calls = SimpleNamespace(of=1.0), threading.local()

    def processor() -> float:
        calls.processor = getattr(calls, "processor", 0.0) + 1.0
        return float(calls.processor)

    def wall() -> float:
        calls.wall = getattr(calls, "wall", 0.0) + ratio.of
        return float(calls.wall)

    monkeypatch.setattr("data.read_ahead.time", SimpleNamespace(perf_counter=wall, thread_time=processor))
    # On a busy machine a read may be waited for without stalling.
    monkeypatch.setattr("data.read_ahead._PATIENCE", 60.0)
    return ratio


def test_results_are_in_the_order_of_the_samples() -> None:
    ahead = ReadAhead(Reads())
    first, second = ahead.start(range(100)), ahead.start(range(100, 130))
    assert ahead.collect(first) + ahead.collect(second) == list(range(0, 1300, 10))
    ahead.close()


@pytest.mark.parametrize("error", [ValueError("shard 3 is gone"), TimeoutError("the server does not answer")])
def test_an_error_reaches_who_waits_for_the_sample_and_reading_goes_on(error: Exception) -> None:
    def read(ids: Iterable[int]) -> list[int]:
        if 20 in ids:
            raise error
        return list(ids)

    ahead = ReadAhead(read)
    first, second, third = ahead.start(range(48))
    with pytest.raises(type(error), match=str(error)):
        ahead.collect([second])
    assert ahead.collect([first, third]) == [*range(16), *range(32, 48)]
    ahead.close()


@pytest.mark.parametrize(("of", "threads"), [(0.9, 1), (1.0, 1), (1.9, 1), (4.1, 4), (100.0, 8)])
def test_as_many_threads_read_as_hide_the_waiting(ratio: SimpleNamespace, of: float, threads: int) -> None:
    ratio.of, reads = of, Reads()
    ahead = ReadAhead(reads)
    for _ in range(3):
        ahead.collect(ahead.start(range(16 * 40)))
    assert max(reads.at_once) == threads
    ahead.close()


def test_threads_that_are_no_longer_needed_stop(ratio: SimpleNamespace) -> None:
    ratio.of, reads = 8.0, Reads()
    ahead = ReadAhead(reads)
    ahead.collect(ahead.start(range(16 * 60)))
    assert max(reads.at_once) >= 7
    ratio.of = 1.0
    reads.at_once.clear()
    ahead.collect(ahead.start(range(16 * 100)))
    assert max(reads.at_once[:10]) > 1
    assert max(reads.at_once[-40:]) == 1
    ahead.close()


def test_what_is_needed_first_is_read_first(ratio: SimpleNamespace) -> None:
    read: list[int] = []

    def append(ids: Iterable[int]) -> list[int]:
        read.extend(ids)
        return []

    ahead = ReadAhead(append)
    ahead.collect([*ahead.start(range(200)), *ahead.start(range(200, 400))])
    assert read == list(range(400))
    ahead.close()


def test_a_read_that_stalls_holds_up_no_other() -> None:
    read, goes_on = [], threading.Event()

    def stall(ids: Iterable[int]) -> list[int]:
        if 0 in ids:
            assert goes_on.wait(60)
        read.extend(ids)
        return list(ids)

    ahead = ReadAhead(stall)
    pieces = ahead.start(range(96))
    consumer = threading.Thread(target=ahead.collect, args=(pieces,))
    consumer.start()
    for piece in pieces[1:]:
        piece.result(60)
    assert not pieces[0].done()
    goes_on.set()
    consumer.join(60)
    assert sorted(read) == list(range(96))
    ahead.close()


def test_once_closed_it_begins_nothing() -> None:
    ahead = ReadAhead(Reads())
    ahead.close()
    for _ in range(2):
        with pytest.raises(RuntimeError):
            ahead.start(range(16))


def test_what_nobody_has_begun_is_left_when_it_closes() -> None:
    reads = Reads()
    ahead = ReadAhead(reads)
    futures = ahead.start(range(16 * 1000))
    ahead.close()
    assert len(reads.at_once) < 100
    with pytest.raises(CancelledError):
        futures[-1].result()
