"""Spread independent tasks over processes that stop when their parent does."""

import multiprocessing
import os
import signal
import sys
import threading
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from itertools import islice
from multiprocessing.connection import Connection
from types import ModuleType
from typing import TypeVar

Task = TypeVar("Task")
Result = TypeVar("Result")

TASKS_AHEAD = 2  # per process: one at work, one waiting


def run_tasks(
    function: Callable[[Task], Result], tasks: Iterable[Task], processes: int = 0
) -> Generator[Result, None, None]:
    """Yield the results of a function of an importable module as they come, in any order; 0 processes = all cores.

    Tasks are taken as processes get free, a few ahead, so that there may be more of them than memory holds.
    Whatever ends it early (an exception of a task, Ctrl-C, the generator being closed) stops the processes at once,
    wherever they are; they are gone when it returns. Hold it in `contextlib.closing`: a for loop that an exception
    leaves does not close it. Raises ValueError when a process is killed.
    """
    processes = processes or len(os.sched_getaffinity(0))
    if processes == 1:
        yield from map(function, tasks)
        return
    # Spawned, not forked: a forked child would inherit whatever threads and locks the caller has.
    context = multiprocessing.get_context("spawn")
    held_by_workers, held_here = context.Pipe(duplex=False)
    pool = ProcessPoolExecutor(processes, mp_context=context, initializer=_enter_worker, initargs=(held_by_workers,))
    try:
        yield from _results(pool, function, iter(tasks), TASKS_AHEAD * processes)
    except BrokenProcessPool:
        raise ValueError(
            "workers: a worker process was killed, most often for memory; use fewer workers and run the same "
            "command again."
        ) from None
    except BaseException:
        held_here.close()
        raise
    finally:
        pool.shutdown(cancel_futures=True)
        held_here.close()
        held_by_workers.close()


def _results(
    pool: ProcessPoolExecutor, function: Callable[[Task], Result], queue: Iterator[Task], ahead: int
) -> Iterator[Result]:
    pending = _submit(pool, function, islice(queue, ahead))
    while pending:
        done, pending = wait(pending, return_when=FIRST_COMPLETED)
        pending |= _submit(pool, function, islice(queue, len(done)))
        for future in done:
            yield future.result()


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
    """Start workers that need no main module, which with a command is all of torch, and that never see a Ctrl-C.

    Ctrl-C reaches the whole process group, and a worker's first moments, too, when it still imports; blocked
    signals stay so in what is started.
    """
    main, unblocked = sys.modules["__main__"], signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        signal.pthread_sigmask(signal.SIG_SETMASK, unblocked)


def _enter_worker(held_by_parent: Connection) -> None:
    threading.Thread(target=_exit_when_told, args=(held_by_parent,), daemon=True).start()


def _exit_when_told(held_by_parent: Connection) -> None:
    """Leave at once when the parent closes its end, or is gone; a pool's worker would otherwise wait for ever."""
    held_by_parent.poll(None)
    os._exit(1)
