"""Signals become a flag; a second Ctrl-C becomes an exception."""

import signal
from collections.abc import Iterator

import pytest

from pipeline.preemption import SIGNALS, StopRequest


@pytest.fixture
def stop() -> Iterator[StopRequest]:
    handlers = {number: signal.getsignal(number) for number in SIGNALS}
    yield StopRequest()
    for number, handler in handlers.items():
        signal.signal(number, handler)


@pytest.mark.parametrize("number", SIGNALS)
def test_the_first_signal_is_remembered(stop: StopRequest, number: signal.Signals) -> None:
    assert not stop.requested
    signal.raise_signal(number)
    signal.raise_signal(signal.SIGTERM)
    assert stop.requested
    assert stop.signal == number
    assert stop.exit_code == (130 if number == signal.SIGINT else 75)


def test_a_second_ctrl_c_does_not_wait(stop: StopRequest) -> None:
    signal.raise_signal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        signal.raise_signal(signal.SIGINT)
