"""Run all checks of `ddiff doctor` at the same time, with a time limit."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterable, Mapping

from ddiff.plugin.registry import describe_error
from ddiff.runs.doctor.findings import Finding
from ddiff.runs.doctor.libraries import (
    check_gloo,
    check_installation,
    check_optional,
    check_plugins,
    check_torch,
)
from ddiff.runs.doctor.machine import check_caches, check_folders, check_memory, check_variables

Check = Callable[[], Iterable[Finding]]

CHECKS: dict[str, Check] = {
    "ddiff": check_installation,
    "torch": check_torch,
    "memory": check_memory,
    "folders": check_folders,
    "caches": check_caches,
    "downloads": check_variables,
    "gloo": check_gloo,
    "plugins": check_plugins,
    "packages": check_optional,
}
"""Name -> check, in the order of the output."""

LIMIT = 270.0  # seconds for all checks together


def examine(checks: Mapping[str, Check] = CHECKS, limit: float = LIMIT) -> list[Finding]:
    """Run the checks, and return their findings in the order of the checks.

    A check that fails, or that takes longer than `limit` seconds, is a problem. It may hang in the
    operating system, for example on a network disk that does not answer. Its thread then
    ends with the process.
    """
    findings: dict[str, list[Finding]] = {}
    threads = {}
    for name, check in checks.items():
        thread = threading.Thread(target=_run, args=(name, check, findings), daemon=True)
        thread.start()
        threads[name] = thread
    deadline = time.monotonic() + limit
    found = []
    for name, thread in threads.items():
        thread.join(max(0.0, deadline - time.monotonic()))
        if thread.is_alive():
            remedy = "Check the disks and the network, and repeat the command."
            late = Finding(name, "problem", f"the check took more than {limit:.0f} s", remedy)
            found.append(late)
        else:
            found += findings[name]
    return found


def _run(name: str, check: Check, findings: dict[str, list[Finding]]) -> None:
    try:
        findings[name] = list(check())
    except Exception as error:  # the other checks are reported all the same
        meaning = f"the check failed: {describe_error(error)}"
        findings[name] = [Finding(name, "problem", meaning, "Please report this error.")]
