"""Spread independent tasks over processes that stop when their parent does."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from types import ModuleType
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_AHEAD = 2  # per process: one at work, one waiting


def run_tasks(function: Callable[[Task], Result], tasks: Iterable[Task], processes: int = 0) -> Iterator[Result]:
    """Yield the results of a function of an importable module as they come, in any order; 0 processes = all cores.

    Tasks are taken as processes get free, a few ahead, so that there may be more of them than memory holds.
    The first exception of a task cancels those not yet begun. Raises ValueError when a process is killed.
    """
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: a forked child would inherit whatever threads and locks the caller has.
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_enter_worker)
    try:
        queue = iter(tasks)
        pending = _submit(pool, function, islice(queue, TASKS_AHEAD * processes))
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            pending |= _submit(pool, function, islice(queue, len(done)))
            for future in done:
                yield future.result()
    except BrokenProcessPool:
        raise ValueError(
            "workers: a worker process was killed, most often for memory; use fewer workers and run the same "
            "command again."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


def _submit(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], tasks: Iterable[Task]
) -> set[Future[Result]]:
    futures = set()
    for task in tasks:
        with _light_start():  # a pool starts its processes one by one, as it is given tasks
            futures.add(pool.submit(function, task))
    return futures


@contextmanager
def _light_start() -> Iterator[None]:
    """Hide the main module from starting workers: they would import it, and with a command that is all of torch."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _enter_worker() -> None:
    # Ctrl-C reaches the whole process group; only the parent reacts and lets the running tasks end.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_exit_with_parent, daemon=True).start()


def _exit_with_parent() -> None:
    """Leave at once when the parent is gone; a pool's worker would otherwise wait for tasks for ever."""
    parent = multiprocessing.parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)
