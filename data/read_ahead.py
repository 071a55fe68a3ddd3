"""Threads that read samples before they are needed: as many at once as hide what the file system makes them wait."""

import time
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from threading import Lock
from typing import Generic, TypeVar

_MOST_THREADS = 8
_SAMPLES_PER_READ = 16
_FORGOTTEN = 1 / 16  # of the moving sums, with each read
_PATIENCE = 0.05  # seconds that somebody waits for a read before others are begun beside it

T = TypeVar("T")


class ReadAhead(Generic[T]):
    """Call ``read`` on samples, in pieces, in threads of its own.

    A read that waits for three quarters of its time leaves room for three more. One that comes from memory does not
    wait, and threads beside it would only pass Python's lock around, which costs as much as the reading itself. So as
    many go on at once as the time of a read holds that of its processor: 1 at first, 8 at most, and more than there
    are as soon as somebody has to wait for one that stalls.
    """

    def __init__(self, read: Callable[[Iterable[int]], list[T]]) -> None:
        self._read = read
        self._pool = ThreadPoolExecutor(_MOST_THREADS, thread_name_prefix="read")
        self._lock = Lock()
        self._waiting: deque[tuple[Future[list[T]], Sequence[int]]] = deque()
        self._threads = 0  # at work
        # Moving sums of seconds: what reads took, and what of it they had a processor.
        self._took = self._busy = 0.0

    def start(self, ids: Sequence[int]) -> list[Future[list[T]]]:
        """Begin to read; `collect` takes what this returns. Raises RuntimeError once closed."""
        pieces = [ids[k : k + _SAMPLES_PER_READ] for k in range(0, len(ids), _SAMPLES_PER_READ)]
        futures: list[Future[list[T]]] = [Future() for _ in pieces]
        with self._lock:
            self._waiting.extend(zip(futures, pieces, strict=True))
            self._call_threads()
        return futures

    def collect(self, pieces: Iterable[Future[list[T]]]) -> list[T]:
        """Wait for what was begun and return it in the order of its ids. Raises what the read raised."""
        return [each for piece in pieces for each in self._result(piece)]

    def close(self) -> None:
        """Stop the threads; whoever waits for what none of them has begun gets a CancelledError."""
        with self._lock:
            for future, _ in self._waiting:
                future.cancel()
            self._waiting.clear()
        self._pool.shutdown()

    def _result(self, piece: Future[list[T]]) -> list[T]:
        while True:
            try:
                return piece.result(_PATIENCE)
            except TimeoutError:
                if piece.done():  # the error is the read's own
                    raise
            # A read that stalls tells how long only when it is over.
            with self._lock, suppress(RuntimeError):
                self._took += _PATIENCE
                self._call_threads()

    def _call_threads(self) -> None:
        """Set as many threads to work as are wanted and have something to do. The lock is held."""
        for _ in range(min(self._wanted() - self._threads, len(self._waiting))):
            self._pool.submit(self._work)
            self._threads += 1

    def _work(self) -> None:
        """Read one piece after the other, until none is left or fewer threads will do."""
        while piece := self._next_piece():
            future, ids = piece
            began, busy = time.perf_counter(), time.thread_time()
            try:
                future.set_result(self._read(ids))
            except BaseException as error:  # whoever waits for it shall know
                future.set_exception(error)
            self._account(time.perf_counter() - began, time.thread_time() - busy)

    def _next_piece(self) -> tuple[Future[list[T]], Sequence[int]] | None:
        with self._lock:
            if self._waiting and self._threads <= self._wanted():
                return self._waiting.popleft()
            self._threads -= 1
            return None

    def _account(self, took: float, busy: float) -> None:
        with self._lock, suppress(RuntimeError):  # a system that gives no more threads: those there are go on
            self._took += took - _FORGOTTEN * self._took
            self._busy += busy - _FORGOTTEN * self._busy
            self._call_threads()

    def _wanted(self) -> int:
        # Never none: clocks differ, so that a read may seem to take less time than its processor.
        return max(1, min(int(self._took / max(self._busy, 1e-9)), _MOST_THREADS))
