"""Several processes of one command on this machine, found by one another through the environment, as torchrun has it.

`launch` starts the workers, hands signals on to all of them, and tells one error for all. It knows no torch: a worker is
the same command with `RANK`, `LOCAL_RANK`, `WORLD_SIZE`, `MASTER_ADDR` and `MASTER_PORT` set.
"""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from types import FrameType
from typing import IO, NamedTuple, NoReturn

from ddiff.errors import ArgumentError, shorten

MISTAKE = 2  # the exit code of a mistake that the caller can mend
GRACE = 5.0  # seconds that workers have to end by themselves after one of them has failed
_ALONE = "DDIFF_LAUNCH_CORES"  # the cores of a machine that workers were given equal shares of
_REPORTS = (
    "DDIFF_LAUNCH_REPORTS"  # the folder in which a worker leaves the message that it ends with
)


class Place(NamedTuple):
    """Where a process stands among those that were started with it; `local_rank` counts those of its machine."""

    rank: int
    local_rank: int
    world_size: int


def place() -> Place | None:
    """This process's place among those that torchrun or `launch` started; None when it stands alone."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return None
    rank, world_size = _count("RANK"), _count("WORLD_SIZE")
    local_rank = _count("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
    if rank >= world_size:
        raise ArgumentError(
            f"The environment variable RANK must be below WORLD_SIZE; got {rank} and {world_size}. Unset both (and "
            "MASTER_ADDR) to run one process, or start several with torchrun."
        )
    return Place(rank, local_rank, world_size)


def check_address() -> None:
    """Raises ArgumentError where MASTER_PORT, at which processes find one another, is no port."""
    port = _count("MASTER_PORT") if "MASTER_PORT" in os.environ else 0
    if not 0 < port < 65536:
        raise ArgumentError(
            f"The environment variable MASTER_PORT must be a port from 1 to 65535, as torchrun sets it; got "
            f"{port or 'none'}. Unset RANK, WORLD_SIZE and MASTER_ADDR to run one process."
        )


def _count(name: str) -> int:
    """The whole number in an environment variable; ArgumentError when it holds something else."""
    written = os.environ[name]
    if not written.isascii() or not written.strip().isdecimal():
        raise ArgumentError(
            f"The environment variable {name} must be a whole number from 0, as torchrun sets it; got "
            f"{shorten(written)!r}. Unset it to run one process."
        )
    return int(written)


def cores_alone() -> int | None:
    """How many threads a worker may use once the others have ended; None where nobody has divided them."""
    return int(os.environ[_ALONE]) if _ALONE in os.environ else None


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `ddiff ARGUMENTS` as `processes` workers on this machine; the exit code that one process would have had.

    Rank 0 writes to this process's own streams. When a worker fails, the others have five seconds to end, and the message
    of the one that failed first is told. Workers end with this process, however it ends.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    before = {number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)}
    with tempfile.TemporaryDirectory(prefix="ddiff-") as folder:
        port, reports = _free_port(), Path(folder)
        workers = [
            _start(arguments, Place(rank, rank, processes), port, reports)
            for rank in range(processes)
        ]
        try:
            _wait(workers, received)
            return _outcome(workers, reports)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            for number, handler in before.items():
                signal.signal(number, handler)


def end(message: str, code: int) -> NoReturn:
    """End this process with a message: told here, or by the launcher, once for all workers."""
    try:
        there = place()
    except ArgumentError:  # that is what is being told
        there = None
    reports = os.environ.get(_REPORTS)
    if there and reports:
        Path(reports, str(there.rank)).write_text(message, encoding="utf-8")
    else:
        print(message, file=sys.stderr)
    if there is None:
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(
        code
    )  # other ranks may wait in a collective: an orderly end would wait for them, or abort


def follow_launcher() -> None:
    """A worker of `launch` ends when its launcher does: the launcher holds the other end of its standard input."""
    if _REPORTS in os.environ:
        threading.Thread(target=_end_at_end_of_input, daemon=True).start()


def _end_at_end_of_input() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def _start(
    arguments: Sequence[str], there: Place, port: int, reports: Path
) -> subprocess.Popen[bytes]:
    environment = {
        **_shares_of_cores(there.world_size),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "RANK": str(there.rank),
        "LOCAL_RANK": str(there.local_rank),
        "WORLD_SIZE": str(there.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _REPORTS: str(reports),
    }
    command = [sys.executable, "-P", "-m", "ddiff", *arguments]
    log: IO[bytes] | None = None if there.rank == 0 else open(reports / f"{there.rank}.log", "wb")  # noqa: SIM115
    # A session of its own: a Ctrl-C reaches the workers once, through the launcher, and not from the terminal as well.
    worker = subprocess.Popen(
        command,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=log,
        stderr=log,
        start_new_session=True,
    )
    if log:
        log.close()
    return worker


def _wait(workers: Sequence[subprocess.Popen[bytes]], received: list[int]) -> None:
    """Until all have ended, or GRACE after one has failed; signals go to all."""
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        while received:
            number = received.pop(0)
            for worker in workers:
                worker.send_signal(number)
        if any(worker.returncode for worker in workers):
            deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.02)


def _outcome(workers: Sequence[subprocess.Popen[bytes]], reports: Path) -> int:
    """The exit code of the failure that came first, its message told; a mistake of the caller before its consequences."""
    failed = [rank for rank, worker in enumerate(workers) if worker.returncode]
    if not failed:
        return 0

    def order(rank: int) -> tuple[bool, int, int]:
        report = reports / str(
            rank
        )  # who was killed left none, and the others' are what came of it
        written = report.stat().st_mtime_ns if report.exists() else 0
        return workers[rank].returncode != MISTAKE, written, rank

    first = min(failed, key=order)
    code, report, log = workers[first].returncode, reports / str(first), reports / f"{first}.log"
    if report.exists():
        print(report.read_text(encoding="utf-8"), file=sys.stderr)
    elif code < 0:
        said = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
        print(
            f"{said}Worker {first} of {len(workers)} was ended by {signal.Signals(-code).name}, so all were; a machine "
            "without memory to spare does that with SIGKILL. The same command goes on from the newest checkpoint.",
            file=sys.stderr,
        )
    return 128 - code if code < 0 else code


def _shares_of_cores(workers: int) -> dict[str, str]:
    """Each worker's share, unless the caller has said how many threads there shall be."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, _cores() // workers)), _ALONE: str(_cores())}


def _free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _cores() -> int:
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
