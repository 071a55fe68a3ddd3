"""Commands that start commands: what becomes of the second when the first is told to stop."""

import os
import signal
import subprocess
import sys

import pytest

# A command that says its process id and sleeps, in the place of a training.
PARENT = """
import subprocess, sys
from pipeline import children
SLEEP = "import os, time; print(os.getpid(), flush=True); time.sleep(60)"
children.start = lambda *words: subprocess.Popen([sys.executable, "-c", SLEEP])
children.coldpress("train")
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_command_does_not_outlive_the_one_that_started_it(number: signal.Signals) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    if number == signal.SIGINT:
        # A terminal sends it to both.
        os.kill(child, number)
    parent.send_signal(number)
    assert parent.wait(timeout=30) == (143 if number == signal.SIGTERM else -signal.SIGINT)
    with pytest.raises(ProcessLookupError):
        os.kill(child, 0)
