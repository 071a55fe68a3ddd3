import operator
import os
import signal
import subprocess
import sys
import time
from contextlib import closing
from functools import partial
from pathlib import Path

import pytest

from data.workers import TASKS_AHEAD, run_tasks

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("processes", [0, 1, 2])
def test_every_task_gives_its_result(processes):
    assert sorted(run_tasks(abs, range(-20, 0), processes)) == list(range(1, 21))


@pytest.mark.parametrize("processes", [1, 2])
def test_an_error_of_a_task_reaches_the_caller(processes):
    with pytest.raises(ValueError, match="invalid literal"):
        list(run_tasks(int, ["1", "two", "3"], processes))


def test_a_killed_worker_is_one_sentence():
    with pytest.raises(ValueError, match=r"a worker process was killed.*use fewer workers"):
        list(run_tasks(os._exit, [9, 9], 2))


def test_workers_do_not_import_the_main_module(tmp_path):
    # The main module of a command imports torch; here it would wait, and say so.
    (tmp_path / "main.py").write_text(
        "from data.workers import run_tasks\n"
        "print('main imported')\n"
        "if __name__ == '__main__':\n"
        "    print(sorted(run_tasks(abs, [-1, -2], 2)))\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(
        [sys.executable, tmp_path / "main.py"], env=environment, capture_output=True, text=True, check=True
    )
    assert result.stdout.splitlines() == ["main imported", "[1, 2]"]


def test_the_main_module_is_back_after_the_start():
    main = sys.modules["__main__"]
    results = run_tasks(time.sleep, [0.0], 2)
    next(results)
    assert sys.modules["__main__"] is main


@pytest.mark.parametrize("processes", [1, 2])
def test_tasks_are_taken_a_few_ahead(processes):
    taken = []

    def tasks():
        for number in range(50):
            taken.append(number)
            yield number

    for done, _ in enumerate(run_tasks(abs, tasks(), processes), start=1):
        assert len(taken) <= done + 2 * TASKS_AHEAD * processes
    assert len(taken) == done == 50


def test_workers_never_see_ctrl_c():
    blocked = partial(signal.pthread_sigmask, signal.SIG_BLOCK, [])  # returns what is blocked already
    assert [signal.SIGINT in each for each in run_tasks(operator.call, [blocked] * 2, 2)] == [True, True]
    assert signal.SIGINT not in blocked()


LEFT_EARLY = """
import multiprocessing, time
from contextlib import closing, suppress
from data.workers import run_tasks

class Leaving(Exception):
    pass

with suppress(Leaving), closing(run_tasks(time.sleep, [0.0] + 9 * [600.0], 2)) as results:
    for result in results:
        raise Leaving
print(len(multiprocessing.active_children()))
with suppress(ValueError):
    list(run_tasks(time.sleep, [-1.0] + 9 * [600.0], 2))
print(len(multiprocessing.active_children()))
"""


def test_what_is_left_early_does_not_wait_for_tasks():
    result = subprocess.run(
        [sys.executable, "-c", LEFT_EARLY],
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
        timeout=60,
        check=True,
    )
    assert (result.stdout.split(), result.stderr) == (["0", "0"], "")


def test_tasks_larger_than_a_pipe_can_be_left(tmp_path):
    # Those that wait for a process are on their way to it, and nobody reads them any more.
    with closing(run_tasks(len, [bytes(10**6)] * 50, 2)) as results:
        assert next(results) == 10**6
