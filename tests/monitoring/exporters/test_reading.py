import threading

import pytest

from monitoring.exporters.reading import Cached, Reading
from monitoring.metrics import GPUS


def value(collector):
    return [sample.value for family in collector.collect() for sample in family.samples]


def reading(number):
    found = Reading(GPUS)
    found.add("node_gpu_read_timestamp_seconds", number)
    return found


@pytest.fixture
def clock(monkeypatch):
    now = [100.0]
    monkeypatch.setattr("monitoring.exporters.reading.time.monotonic", lambda: now[0])
    return now


def test_names_and_labels_are_those_of_the_catalogue():
    with pytest.raises(KeyError, match="node_gpu_fan"):
        Reading(GPUS).add("node_gpu_fan", 1.0)
    with pytest.raises(AssertionError, match=r"node_gpu_up has the labels \('gpu',\)"):
        Reading(GPUS).add("node_gpu_up", 1.0)


def test_however_many_scrapes_there_are_it_reads_once_in_a_while(clock):
    numbers = iter(range(10))
    cached = Cached(lambda: reading(next(numbers)), 5)
    assert [value(cached) for _ in range(3)] == [[0], [0], [0]]
    clock[0] += 4.9
    assert value(cached) == [0]
    clock[0] += 0.2
    assert value(cached) == [1]


def test_a_reading_that_hangs_holds_up_one_scrape_only(clock):
    reached, released = threading.Event(), threading.Event()
    numbers = iter(range(10))

    def read():
        number = next(numbers)
        if number:
            reached.set()
            assert released.wait(20)
        return reading(number)

    cached = Cached(read, 5)
    assert value(cached) == [0]
    clock[0] += 6
    hanging = threading.Thread(target=lambda: value(cached))
    hanging.start()
    assert reached.wait(20)
    assert value(cached) == [0]
    released.set()
    hanging.join(20)
    assert value(cached) == [1]


def test_one_that_fails_leaves_the_next_to_try_again(clock):
    answers = iter([OSError("no"), 7])

    def read():
        answer = next(answers)
        if isinstance(answer, OSError):
            raise answer
        return reading(answer)

    cached = Cached(read, 5)
    with pytest.raises(OSError, match="no"):
        value(cached)
    assert value(cached) == [7]
