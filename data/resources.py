"""What a process may take of its machine."""

import os
from collections.abc import Sequence

from data.views import ViewSpec

_LARGE_BATCH_BYTES = 2**30


def share_of_cores() -> int:
    """Return the cores for this process: those that Slurm bound it to, else its share of the node's."""
    cores = len(os.sched_getaffinity(0))
    if "SLURM_PROCID" in os.environ and cores < (os.cpu_count() or 1):
        return cores
    return max(1, cores // processes_here())


def processes_here() -> int:
    """Return how many processes of this run share the node, as far as the launcher says."""
    # torchrun sets the one, DeepSpeed's launcher the other.
    return max(1, int(os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("LOCAL_SIZE") or "1"))


def usual_prefetch(batch_size: int, specs: Sequence[ViewSpec]) -> int:
    """Return how many batches to make ahead: two, but one where its float32 views take more than 1 GiB."""
    batch_bytes = 4 * 3 * batch_size * sum(spec.size**2 for spec in specs)
    return 1 if batch_bytes > _LARGE_BATCH_BYTES else 2
