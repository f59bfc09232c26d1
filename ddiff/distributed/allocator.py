"""Setting of the C allocator that keeps freed memory for the next training step."""

from __future__ import annotations

import ctypes
import os

# Parameter numbers of mallopt(3).
_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_THRESHOLD = -3
_SETTINGS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 1 << 30, _TOP_PAD: 64 << 20}


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks of up to 32 MB, and 1 GB in total, for later allocations.

    Return whether the setting took effect. It has no effect with another C library, or if the user
    has set MALLOC_MMAP_THRESHOLD_.

    Every training step on a CPU allocates blocks of the same sizes. By default, glibc returns large
    blocks to the kernel and maps new pages in each step. The page faults took a quarter of the time
    of a step of masked diffusion with 50257 tokens.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or os.name != "posix":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    return all(mallopt(name, value) == 1 for name, value in _SETTINGS.items())
