"""How far memory rises while something runs: the allocator's figure on a GPU, the process's own on a CPU."""

from __future__ import annotations

import ctypes
import resource
from contextlib import suppress
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")


class Rise:
    """From its making to `bytes`, above what was held when it was made."""

    def __init__(self, device: torch.device) -> None:
        self.device = device
        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(device)
            self._held = float(torch.cuda.memory_allocated(device))
        else:
            self._held = _resident()

    def bytes(self) -> float:
        if self.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self.device) - self._held
        return max(0.0, _highest() - self._held)


def _resident() -> float:
    """Bytes that the process holds now, what was freed given back first; from here on `_highest` is counted anew."""
    with suppress(OSError, AttributeError):  # glibc has it
        ctypes.CDLL(None).malloc_trim(0)
    try:
        CLEAR.write_text("5")
        return _field("VmRSS")
    except OSError:  # no Linux: the highest so far is all that is known
        return _highest()


def _highest() -> float:
    try:
        return _field("VmHWM")
    except OSError:
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024.0


def _field(name: str) -> float:
    line = next(line for line in STATUS.read_text().splitlines() if line.startswith(name))
    return float(line.split()[1]) * 1024.0
