"""Spread independent tasks over processes that stop when their parent does."""

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")


def run_tasks(function: Callable[[Task], Result], tasks: Iterable[Task], processes: int = 0) -> Iterator[Result]:
    """Yield the results of a picklable function as they come, in any order; 0 processes = all cores.

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
        for future in as_completed([pool.submit(function, task) for task in tasks]):
            yield future.result()
    except BrokenProcessPool:
        raise ValueError(
            "workers: a worker process was killed, most often for memory; use fewer workers and run the same "
            "command again."
        ) from None
    finally:
        pool.shutdown(cancel_futures=True)


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
