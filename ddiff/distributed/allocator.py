"""Freed memory that is kept for the next step, in place of being given back to the kernel and taken anew."""

from __future__ import annotations

import ctypes
import os

_TRIM_THRESHOLD, _TOP_PAD, _MMAP_THRESHOLD = -1, -2, -3  # of mallopt(3)
_SETTINGS = {_MMAP_THRESHOLD: 32 << 20, _TRIM_THRESHOLD: 1 << 30, _TOP_PAD: 64 << 20}


def keep_freed_memory() -> bool:
    """Tell glibc to keep freed blocks of up to 32 MB (its own limit) and a gigabyte in all; whether it was told.

    A step on a CPU allocates the same chunks again and again, and glibc maps each anew: of a step of masked diffusion at
    V = 50257 a quarter were page faults. Another C library, and whoever has set MALLOC_MMAP_THRESHOLD_, is left alone.
    """
    if "MALLOC_MMAP_THRESHOLD_" in os.environ:
        return False
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None) if os.name == "posix" else None
    return mallopt is not None and all(
        mallopt(name, value) == 1 for name, value in _SETTINGS.items()
    )
