"""Commands that start commands: what becomes of the second when the first is told to stop."""

import os
import signal
import subprocess
import sys

import pytest

# In the place of a training: says its process id, and takes longer to leave than Popen waits by itself.
SLOW = """
import os, signal, sys, time
def save(*_):
    time.sleep(1.5)
    sys.exit()
signal.signal(signal.SIGINT, save)
signal.signal(signal.SIGTERM, save)
print(os.getpid(), flush=True)
time.sleep(60)
"""
PARENT = f"""
import signal, subprocess, sys
from pipeline import children
# Where tests run in the background it is ignored.
signal.signal(signal.SIGINT, signal.default_int_handler)
children.start = lambda *words: subprocess.Popen([sys.executable, "-c", {SLOW!r}])
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
