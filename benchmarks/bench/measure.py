"""Measurements of CPU time and peak memory, for functions of ddiff and alternatives to them."""

from __future__ import annotations

import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

BENCH = Path(__file__).parent
Seconds = dict[str, list[float]]


def seconds_of(run: Callable[[], object]) -> float:
    """Return the CPU seconds of a call of `run`, summed over all threads.

    CPU seconds depend less on other processes than wall-clock seconds.
    """
    began = time.process_time()
    run()
    return time.process_time() - began


def time_alternating(
    sides: Mapping[str, Callable[[], object]], rounds: int, warm: bool = True
) -> Seconds:
    """Call the functions `sides` in turn, `rounds` times each; return their CPU seconds by name.

    `warm`: call each function once before, without measuring it.
    """
    if warm:
        for run in sides.values():
            run()
    seconds: Seconds = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            seconds[name].append(seconds_of(run))
    return seconds


def ratios(above: Sequence[float], below: Sequence[float]) -> dict[str, float]:
    """Return the least, median and greatest of the ratios above[i] / below[i]."""
    each = [a / b for a, b in zip(above, below, strict=True)]
    return {"least": min(each), "median": statistics.median(each), "greatest": max(each)}


def measure_memory_rise(run: Callable[[], object]) -> float:
    """Return by how many MB a call of `run` raises the peak resident memory of this process."""
    try:
        Path("/proc/self/clear_refs").write_text("5")  # reset the peak
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1024
    except OSError:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        run()
        return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


def _status(name: str) -> int:
    """Return the field `name` of /proc/self/status, in kB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def in_process(work: str, **arguments: Any) -> Any:
    """Call the function `work` of workers.py in a new process and return its result."""
    command = [sys.executable, str(BENCH / "workers.py"), work, json.dumps(arguments)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(
            f"{work} {arguments} failed with exit code {done.returncode}:\n{done.stderr}"
        )
    return json.loads(done.stdout.splitlines()[-1])


def environment(**more: str) -> dict[str, str]:
    path = os.pathsep.join([str(BENCH), *filter(None, [os.environ.get("PYTHONPATH")])])
    return {**os.environ, "PYTHONPATH": path, **more}


def machine(threads: int) -> dict[str, Any]:
    return {
        "processor": _processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "system": f"{platform.system()} {platform.machine()}",
        "vector instructions": torch.backends.cpu.get_cpu_capability(),
        "load before": round(os.getloadavg()[0], 2),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        found = {
            name.strip(): value.strip()
            for name, _, value in (line.partition(":") for line in lines)
        }
        family = found.get("cpu family", "?")
        return f"{found['model name']} (family {family}, model {found.get('model', '?')})"
    except (OSError, KeyError):
        return platform.processor()
