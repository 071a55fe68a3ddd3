"""What two processes tell each other through a store, and what is left when the store is gone."""

import threading
import time
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist

from pipeline.distributed import World
from pipeline.heartbeat import Report
from pipeline.peers import Failure, NoPeers, Peers, peers_of
from pipeline.preemption import EXIT_HUNG

CPU = torch.device("cpu")
FAILURE = Failure(1, 1, "the dog ate it", by=1)


@pytest.fixture
def stores(monkeypatch: pytest.MonkeyPatch) -> list[object]:
    """Return the only reference to the store in which processes meet."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", str(store.port))
    return [store]


@pytest.fixture
def pair(stores: list[object]) -> tuple[Peers, Peers]:
    return Peers(World(0, 0, 2, CPU)), Peers(World(1, 1, 2, CPU))


def test_reports_come_in_rank_order_and_empty_from_who_never_reported(pair: tuple[Peers, Peers]) -> None:
    second = Report(1, "b", 12, 3, "forward", 7, True, 1.5, 2.5)
    pair[1].publish(second)
    assert pair[0].reports() == [Report(0), second]
    first = Report(0, "a", 11, time=3.0)
    pair[0].publish(first)
    pair[1].publish(replace(second, step=4))
    assert pair[0].reports() == pair[1].reports() == [first, replace(second, step=4)]


def test_what_was_said_first_counts(pair: tuple[Peers, Peers]) -> None:
    assert pair[0].failure() is None
    assert pair[1].fail(FAILURE) == FAILURE
    assert pair[0].fail(Failure(0, 2, "so did mine", by=0)) == FAILURE
    assert pair[0].failure() == pair[1].failure() == FAILURE


def test_a_process_started_again_by_torchrun_does_not_hear_of_its_last_life(
    pair: tuple[Peers, Peers], monkeypatch: pytest.MonkeyPatch
) -> None:
    pair[1].fail(FAILURE)
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert Peers(World(0, 0, 2, CPU)).failure() is None


def test_the_main_process_leaves_last_but_does_not_wait_for_ever(pair: tuple[Peers, Peers]) -> None:
    begin = time.monotonic()
    pair[0].leave(0.3)
    assert 0.3 <= time.monotonic() - begin < 2
    later = threading.Timer(0.3, pair[1].leave, [10])
    later.start()
    pair[0].leave(10)
    assert 0.6 <= time.monotonic() - begin < 5
    later.join()


@pytest.mark.parametrize(("rank", "local_rank", "by"), [(1, 1, 1), (2, 2, 0), (8, 0, 8)])
def test_without_the_store_one_process_of_each_node_says_that_the_main_one_is_gone(
    rank: int, local_rank: int, by: int, stores: list[object]
) -> None:
    peers = Peers(World(rank, local_rank, 16, CPU))
    peers.fail(FAILURE)
    del stores[0]
    begin = time.monotonic()
    failure = peers.failure()
    assert failure is not None
    assert (failure.rank, failure.code, failure.by) == (0, EXIT_HUNG, by)
    assert peers.fail(FAILURE) == failure
    peers.publish(Report(rank))
    peers.leave(10)
    assert time.monotonic() - begin < 5


def test_one_process_has_no_peers() -> None:
    peers = peers_of(World(0, 0, 1, CPU))
    assert type(peers) is NoPeers
    assert peers.fail(FAILURE) == FAILURE
    assert peers.failure() is None
    assert peers.reports() == []
