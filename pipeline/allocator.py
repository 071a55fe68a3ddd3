"""Memory on the CPU: what one step frees, the next one takes again."""

from __future__ import annotations

import ctypes

# Of glibc's <malloc.h>.
M_TRIM_THRESHOLD, M_MMAP_MAX = -1, -4


def keep_freed_memory() -> None:
    """Let glibc keep large blocks that are freed, instead of returning them to the kernel.

    By default every tensor above 32 MB is a mapping of its own, whose pages the kernel zeroes one by one each time:
    longer sequences then cost more per token than short ones, a third of the step at batch 256. The price is that a
    process keeps the memory of its largest step. Does nothing where the allocator is not glibc's.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        mallopt(M_MMAP_MAX, 0)
        mallopt(M_TRIM_THRESHOLD, -1)
