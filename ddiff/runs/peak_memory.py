"""Peak memory of a computation: allocated bytes on a GPU, resident bytes on a CPU."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

import torch

STATUS = Path("/proc/self/status")
CLEAR_REFS = Path("/proc/self/clear_refs")


class MemoryRise:
    """Measurement of peak memory above the memory in use at construction."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._held = float(torch.cuda.memory_allocated(device))
        else:
            self._held = _reset_peak()

    def bytes(self) -> float:
        """Return the peak since construction minus the memory in use at construction."""
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._held
        return max(0.0, _resident_peak() - self._held)


def _reset_peak() -> float:
    """Reset the peak to the resident bytes in use, and return these bytes."""
    # malloc keeps freed memory, which would hide a rise of the same size. Only glibc has
    # malloc_trim.
    with suppress(OSError, AttributeError):
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR_REFS.write_text("5")  # 5 resets VmHWM, see proc(5)
        return _read_status("VmRSS")
    except OSError:  # not Linux: only the peak since the start of the process is known
        return _resident_peak()


def _resident_peak() -> float:
    try:
        return _read_status("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _read_status(field: str) -> float:
    """Read a memory size from /proc/self/status and return it in bytes."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(field):
            return float(line.split()[1]) * 1024.0
    raise OSError(f"{STATUS} has no {field}")
