"""What processes can tell each other while collectives do not answer: where each is, and why the run ends."""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from datetime import timedelta
from typing import Any, TypeVar

import torch.distributed as dist

from pipeline.distributed import World
from pipeline.heartbeat import Report
from pipeline.preemption import EXIT_HUNG

TIMEOUT = timedelta(seconds=10)
FAILURE = "failure"
T = TypeVar("T")


@dataclass(frozen=True)
class Failure:
    """Why a run ends: what happened to process `rank`, and with which exit code all leave."""

    rank: int
    code: int
    text: str
    # The process that found out first, and speaks for all.
    by: int
    # Nobody moves any more, and everybody says where it stands; else all but one leave quietly.
    hang: bool = False


class NoPeers:
    """One process alone."""

    def publish(self, report: Report) -> None:
        """Let the others know where this process is."""

    def reports(self) -> list[Report]:
        """Return the last report of every process, in rank order; none of nobody."""
        return []

    def fail(self, failure: Failure) -> Failure:
        """End the run for all, and return why: what was said first counts."""
        return failure

    def failure(self) -> Failure | None:
        """Return why the run ends, None while it goes on."""
        return None

    def leave(self, seconds: float) -> None:
        """Say no more; who keeps what all say first waits for the others, at most so long."""


class Peers(NoPeers):
    """The processes of a run, by way of the store in which they met, which the main process keeps."""

    def __init__(self, world: World) -> None:
        self._world = world
        self._lost = False
        self._store = _connect()

    def publish(self, report: Report) -> None:
        """Let the others know where this process is."""
        self._ask(lambda store: store.set(f"report/{report.rank}", json.dumps(asdict(report))), None)

    def reports(self) -> list[Report]:
        """Return the last report of every process, in rank order; an empty one of who never reported."""
        keys = [f"report/{rank}" for rank in range(self._world.size)]
        # One question instead of many, but for the time in which some have not reported yet.
        said: list[bytes] = self._ask(lambda store: store.multi_get(keys) if store.check(keys) else [], [])
        said = said or [self._get(key) for key in keys]
        return [Report(**json.loads(text)) if text else Report(rank) for rank, text in enumerate(said)]

    def fail(self, failure: Failure) -> Failure:
        """End the run for all, and return why: what was said first counts."""
        text = json.dumps(asdict(failure))
        first = self._ask(lambda store: store.compare_set(FAILURE, "", text), b"")
        return Failure(**json.loads(first)) if first else self._without_main()

    def failure(self) -> Failure | None:
        """Return why the run ends, None while it goes on. Without the store it does not go on."""
        said = self._get(FAILURE)
        if self._lost:
            return self._without_main()
        return Failure(**json.loads(said)) if said else None

    def leave(self, seconds: float) -> None:
        """Say no more; the main process, with which the store goes, waits for the others, at most so long."""
        self._ask(lambda store: store.set(f"left/{self._world.rank}", "1"), None)
        everybody = [f"left/{rank}" for rank in range(self._world.size)]
        end = time.monotonic() + seconds
        while self._world.is_main and time.monotonic() < end:
            if self._ask(lambda store: store.check(everybody), True):
                return
            time.sleep(0.05)

    def _get(self, key: str) -> bytes:
        # The store would wait for a key that is not there.
        return self._ask(lambda store: bytes(store.get(key)) if store.check([key]) else b"", b"")

    def _without_main(self) -> Failure:
        # Nobody is left to decide who speaks: one process of each node does.
        speaks = self._world.local_rank == 0 or self._world.rank == 1
        text = "process 0 ended without a word, and the store with it: it was killed, or its node is lost"
        return Failure(0, EXIT_HUNG, text, by=self._world.rank if speaks else 0)

    def _ask(self, question: Callable[[Any], T], without: T) -> T:
        """Return the store's answer, or `without` when it is gone for good."""
        if self._lost:
            return without
        try:
            return question(self._store)
        except RuntimeError:
            # After a timeout the old connection might bring the answer to the question before.
            return self._ask_anew(question, without)

    def _ask_anew(self, question: Callable[[Any], T], without: T) -> T:
        try:
            self._store = _connect()
            return question(self._store)
        except (RuntimeError, OSError):
            self._lost = True
            return without


def peers_of(world: World) -> NoPeers:
    """Return how a process talks to the others, if there are any."""
    return Peers(world) if world.size > 1 else NoPeers()


def _connect() -> Any:
    # A connection of its own: who waits for an answer keeps all others of a connection waiting.
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    # Where nobody listens, PyTorch would try again and again.
    socket.create_connection((address, port), TIMEOUT.total_seconds()).close()
    store = dist.TCPStore(address, port, is_master=False, timeout=TIMEOUT)  # type: ignore[attr-defined]
    # The store of torchrun outlives the processes that it starts again.
    life = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
    return dist.PrefixStore(f"watchdog/{life}", store)  # type: ignore[attr-defined]
