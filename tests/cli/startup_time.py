"""Limit of the CPU time with which a command starts, relative to the import of its libraries."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

LARGEST_RATIO = 3.5  # commands take two to three times as long as their libraries
TRIES = 5
_LIBRARIES = "import time, typer, pydantic, tomlkit; print(time.process_time())"


def is_fast(measure: Callable[[], float]) -> bool:
    """Return whether a new process takes little CPU time, in one of `TRIES` comparisons.

    `measure` starts the process and returns its CPU seconds. Every comparison has its own import of
    the libraries, because other load on the machine increases both times.
    """
    for _ in range(TRIES):
        done = subprocess.run(
            [sys.executable, "-c", _LIBRARIES], capture_output=True, text=True, check=True
        )
        if measure() < LARGEST_RATIO * float(done.stdout):
            return True
    return False
