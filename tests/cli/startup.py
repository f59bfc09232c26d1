"""What a command does before it answers: its function calls, and the modules that it imports.

Work is counted in calls, not in seconds: the number of calls is the same in every run, while a time
depends on what else the machine does.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

LARGEST_RATIO = 5.0  # commands make three to four times as many calls as the import of libraries
_COUNT = """
import atexit, json, sys
calls = 0
def count(frame, event, argument):
    global calls
    calls += 1
def report():
    sys.setprofile(None)
    print(json.dumps([calls, sorted(sys.modules)]), file=sys.stderr)
atexit.register(report)
sys.setprofile(count)
"""
_LIBRARIES = "import typer, pydantic, tomlkit"
# arguments are passed, because `main` without them may end the process before it reports
_DDIFF = "sys.argv[0] = 'ddiff'; from ddiff.cli import main; main(sys.argv[1:])"


class Start(NamedTuple):
    code: int
    calls: int
    modules: set[str]
    stderr: str


def start_command(*arguments: str, folder: Path | None = None, **variables: str) -> Start:
    """Run `ddiff` in a new process that counts its function calls."""
    return _start(_DDIFF, arguments, folder, variables)


def is_fast(start: Start) -> bool:
    """Return whether a command makes few calls, relative to the import of its libraries."""
    return start.calls < LARGEST_RATIO * _count_calls_of_libraries()


@functools.cache
def _count_calls_of_libraries() -> int:
    return _start(_LIBRARIES, (), None, {}).calls


def _start(
    code: str, arguments: tuple[str, ...], folder: Path | None, variables: dict[str, str]
) -> Start:
    done = subprocess.run(
        [sys.executable, "-c", _COUNT + code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | variables,
        timeout=120,
        check=False,
    )
    *lines, report = done.stderr.splitlines()
    calls, modules = json.loads(report)
    return Start(done.returncode, calls, set(modules), "\n".join(lines))
