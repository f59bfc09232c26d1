"""Keep freed memory for the next step instead of returning it to the kernel."""

from __future__ import annotations

import ctypes
import os

# Parameter numbers of mallopt(3).
_TRIM_THRESHOLD = -1
_TOP_PAD = -2
_MMAP_THRESHOLD = -3
_SETTINGS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 1 << 30, _TOP_PAD: 64 << 20}


def keep_freed_memory() -> bool:
    """Make glibc keep freed blocks of up to 32 MB, and a gigabyte in all; return whether it does.

    A step on a CPU allocates the same chunks again and again, and glibc maps large ones again each
    time: a quarter of a step of masked diffusion at V = 50257 went into page faults. Nothing
    changes with another C library, or if the user has set MALLOC_MMAP_THRESHOLD_.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ or os.name != "posix":
        return False
    try:
        mallopt = ctypes.CDLL(None).mallopt
    except AttributeError:  # not glibc
        return False
    return all(mallopt(name, value) == 1 for name, value in _SETTINGS.items())
