"""Findings of `ddiff doctor`, and probes that run in another process."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from ddiff.errors import shorten

State = Literal["ok", "note", "problem"]


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: what was checked, such as "torch".
        state: "ok"; "note" for something that works only in part; "problem" for something that
            prevents usual commands.
        meaning: what was found, and what it means.
        remedy: how to change it; empty if there is nothing to do.
    """

    name: str
    state: State
    meaning: str
    remedy: str = ""

    def to_dict(self) -> dict[str, str]:
        return asdict(self)


class ProbeError(Exception):
    """Error about a probe that ended without a result. The message says how it ended."""


def start_probe(module: str, *arguments: str) -> subprocess.Popen[str]:
    """Start a module of this package as another Python process.

    A library that crashes or hangs when it is imported ends only that process.
    """
    command = [sys.executable, "-m", f"{__package__}.{module}", *arguments]
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
    )


def read_probe(process: subprocess.Popen[str], seconds: float) -> Any:
    """Wait for a probe, and return the JSON value in its last line.

    Raises ProbeError if the probe fails or takes longer than `seconds`. The process is then killed.
    """
    try:
        out, err = process.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        process.communicate()
        raise ProbeError(f"no answer within {seconds:.0f} s") from None
    if process.returncode < 0:
        raise ProbeError(f"the process died with signal {-process.returncode}")
    lines = out.splitlines()
    if process.returncode or not lines:
        raise ProbeError(_last_line(err.splitlines()) or f"exit code {process.returncode}")
    try:
        return json.loads(lines[-1])
    except ValueError as error:
        # a library that prints a line when the process ends
        raise ProbeError(f"its last line is no result: {shorten(lines[-1])}") from error


def _last_line(lines: Sequence[str]) -> str:
    """Return the last line with text; of a traceback, this is the error."""
    texts = [line.strip() for line in lines if line.strip()]
    return texts[-1] if texts else ""


def format_bytes(count: float) -> str:
    """Format a number of bytes, as in `2.1 GB`."""
    for unit in ("B", "kB", "MB", "GB"):
        # from 999.5 on, three digits would be 1e+03
        if count < 999.5:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
