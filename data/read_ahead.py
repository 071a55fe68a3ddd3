"""Threads that read samples before they are needed: as many at once as hide what the file system makes them wait."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from threading import Lock
from typing import Generic, TypeVar

_MOST_THREADS = 8
_SAMPLES_PER_READ = 16
_WEIGHT = 0.25  # of the last read in the moving average

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Call ``read`` on samples, in pieces, in threads of its own.

    A read that waits for three quarters of its time leaves room for three more. One that comes from memory does not
    wait, and threads beside it would only pass Python's lock around, which costs as much as the reading itself. So as
    many go on at once as the time of a read holds that of its processor: 1 at first, 8 at most.
    """

    def __init__(self, read: Callable[[Iterable[int]], list[T]]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="read")
        self._lock = Lock()
        self._waiting: deque[tuple[Future[list[T]], Sequence[int]]] = deque()
        self._reading = 0
        self._ratio = 1.0  # of a read's time to that of its processor, on the average

    def start(self, ids: Sequence[int]) -> list[Future[list[T]]]:
        """Begin to read; the results are in the order of the ids."""
        pieces = [ids[k : k + _SAMPLES_PER_READ] for k in range(0, len(ids), _SAMPLES_PER_READ)]
        futures: list[Future[list[T]]] = [Future() for _ in pieces]
        with self._lock:
            self._waiting.extend(zip(futures, pieces, strict=True))
        self._call_threads()
        return futures

    def close(self) -> None:
        """Stop the threads; whoever waits for what none of them has begun gets a CancelledError."""
        with self._lock:
            for future, _ in self._waiting:
                future.cancel()
            self._waiting.clear()
        self._pool.shutdown()

    def _call_threads(self) -> None:
        """Set as many threads to work as are wanted and have something to do."""
        with self._lock:
            more = min(self._wanted() - self._reading, len(self._waiting))
            for _ in range(more):
                self._reading += 1
                self._pool.submit(self._work)

    def _work(self) -> None:
        """Read one piece after the other, until none is left or fewer threads will do."""
        while True:
            with self._lock:
                if not self._waiting or self._reading > self._wanted():
                    self._reading -= 1
                    return
                future, ids = self._waiting.popleft()
            began, busy = time.perf_counter(), time.thread_time()
            try:
                future.set_result(self._read(ids))
            except BaseException as error:  # whoever waits for it shall know
                future.set_exception(error)
            busy, took = time.thread_time() - busy, time.perf_counter() - began
            with self._lock:
                # One read that waits for minutes says no more than one that waits for long.
                self._ratio += _WEIGHT * (min(took / max(busy, 1e-9), 2 * _MOST_THREADS) - self._ratio)
            self._call_threads()

    def _wanted(self) -> int:
        return min(int(self._ratio), _MOST_THREADS)
