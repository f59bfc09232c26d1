"""Count the function calls of a `ddiff` command, and list the modules that it loads.

Work is measured in calls, not in seconds: their number barely changes between runs, while a time
depends on the other load of the machine. A call and its return are one event of `sys.setprofile`
each. The import of a module without cached bytecode makes some more calls.
"""

from __future__ import annotations

import functools
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

LARGEST_RATIO = 5.5  # commands make 3 to 4.5 times as many calls as the import of their libraries
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
# with arguments, because `main()` may end the process without `report`
_DDIFF = "sys.argv[0] = 'ddiff'; from ddiff.cli import main; main(sys.argv[1:])"


class Start(NamedTuple):
    """Exit code, number of calls and returns, loaded modules, and standard error of a process."""

    code: int
    calls: int
    modules: set[str]
    stderr: str


def run_script(
    code: str, *arguments: str, folder: Path | None = None, check: bool = True, **variables: str
) -> subprocess.CompletedProcess[str]:
    """Run Python code in a new process, which must exit with 0 if `check` is True."""
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        capture_output=True,
        text=True,
        cwd=folder,
        env=os.environ | variables,
        timeout=120,
        check=check,
    )


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
    done = run_script(_COUNT + code, *arguments, folder=folder, check=False, **variables)
    *lines, report = done.stderr.splitlines()
    calls, modules = json.loads(report)
    return Start(done.returncode, calls, set(modules), "\n".join(lines))
