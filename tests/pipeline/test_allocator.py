"""Large tensors that are freed and made again cost no page faults."""

import subprocess
import sys

FAULTS = """
import resource
import torch
from pipeline.allocator import keep_freed_memory

if {keep}:
    keep_freed_memory()
# glibc's memalign needs a few rounds until a freed block fits.
for _ in range(20):
    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    torch.ones(2**24)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(keep: bool) -> int:
    """Return the page faults of making 64 MB once more, in a process of its own."""
    command = [sys.executable, "-c", FAULTS.format(keep=keep)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def test_memory_of_freed_tensors_is_kept() -> None:
    # 16,384 pages of 4 KB; without the setting all of them are mapped again.
    assert faults(keep=True) < 2000 < faults(keep=False)
