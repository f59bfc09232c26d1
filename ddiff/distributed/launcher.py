"""Start several worker processes of one command on this machine, as torchrun does.

`launch` starts the workers, passes signals on to all of them and prints one error for all. A worker
is the same command with RANK, LOCAL_RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT set. This module
imports no torch.
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

MISTAKE = 2  # exit code of a mistake that the user can fix
GRACE = 5.0  # seconds that workers have to end by themselves after one of them has failed
_CORES = "DDIFF_LAUNCH_CORES"  # cores of the machine, of which each worker got an equal share
_REPORTS = "DDIFF_LAUNCH_REPORTS"  # folder in which a worker leaves its last message


class RankInfo(NamedTuple):
    """Rank of a process among those started together; `local_rank` counts within its machine."""

    rank: int
    local_rank: int
    world_size: int


def get_rank_info() -> RankInfo | None:
    """Return the rank that torchrun or `launch` gave this process; None if it is the only one."""
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return None
    rank = _read_number("RANK")
    world_size = _read_number("WORLD_SIZE")
    local_rank = _read_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
    if rank >= world_size:
        raise ArgumentError(
            f"The environment variable RANK must be below WORLD_SIZE; got {rank} and {world_size}. "
            "Unset both (and MASTER_ADDR) to run one process, or start several with torchrun."
        )
    return RankInfo(rank, local_rank, world_size)


def check_address() -> None:
    """Raise ArgumentError unless MASTER_PORT, where processes find one another, is a port."""
    port = _read_number("MASTER_PORT") if "MASTER_PORT" in os.environ else 0
    if not 0 < port < 65536:
        raise ArgumentError(
            "The environment variable MASTER_PORT must be a port from 1 to 65535, as torchrun sets "
            f"it; got {port or 'none'}. Unset RANK, WORLD_SIZE and MASTER_ADDR to run one process."
        )


def _read_number(name: str) -> int:
    """Read a whole number from an environment variable; ArgumentError if it is none."""
    written = os.environ[name]
    if not written.isascii() or not written.strip().isdecimal():
        raise ArgumentError(
            f"The environment variable {name} must be a whole number from 0, as torchrun sets it; "
            f"got {shorten(written)!r}. Unset it to run one process."
        )
    return int(written)


def get_machine_cores() -> int | None:
    """Return the number of threads for a worker after the others ended; None if not divided."""
    return int(os.environ[_CORES]) if _CORES in os.environ else None


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `ddiff ARGUMENTS` as `processes` workers; return the exit code of a single process.

    Rank 0 writes to the streams of this process. When a worker fails, the others have five seconds
    to end, and the message of the one that failed first is printed. Workers end with this process,
    however it ends.
    """
    received: list[int] = []

    def receive(number: int, frame: FrameType | None) -> None:
        received.append(number)

    previous = {
        number: signal.signal(number, receive) for number in (signal.SIGINT, signal.SIGTERM)
    }
    with tempfile.TemporaryDirectory(prefix="ddiff-") as folder:
        port = _find_free_port()
        reports = Path(folder)
        workers = [
            _start_worker(arguments, RankInfo(rank, rank, processes), port, reports)
            for rank in range(processes)
        ]
        try:
            _wait_for_workers(workers, received)
            return _report_outcome(workers, reports)
        finally:
            for worker in workers:
                worker.kill()
                worker.wait()
            for number, handler in previous.items():
                signal.signal(number, handler)


def exit_with_message(message: str, code: int) -> NoReturn:
    """End this process with a message, which the launcher prints once for all workers."""
    try:
        info = get_rank_info()
    except ArgumentError:  # the message is about these variables
        info = None
    reports = os.environ.get(_REPORTS)
    if info and reports:
        Path(reports, str(info.rank)).write_text(message, encoding="utf-8")
    else:
        print(message, file=sys.stderr)
    if info is None:
        raise SystemExit(code)
    sys.stdout.flush()
    sys.stderr.flush()
    # Other ranks may wait in a collective: an orderly exit would wait for them, or abort.
    os._exit(code)


def exit_with_launcher() -> None:
    """Make a worker of `launch` end when its launcher ends.

    The launcher holds the other end of the worker's standard input, which is closed when it ends.
    """
    if _REPORTS in os.environ:
        threading.Thread(target=_exit_at_end_of_input, daemon=True).start()


def _exit_at_end_of_input() -> None:
    while os.read(0, 1024):
        pass
    os._exit(1)


def _start_worker(
    arguments: Sequence[str], info: RankInfo, port: int, reports: Path
) -> subprocess.Popen[bytes]:
    environment = {
        **_divide_cores(info.world_size),
        **os.environ,
        "PYTHONPATH": os.pathsep.join(map(os.path.abspath, sys.path)),
        "RANK": str(info.rank),
        "LOCAL_RANK": str(info.local_rank),
        "WORLD_SIZE": str(info.world_size),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
        _REPORTS: str(reports),
    }
    command = [sys.executable, "-P", "-m", "ddiff", *arguments]
    log: IO[bytes] | None = None
    if info.rank > 0:
        log = open(reports / f"{info.rank}.log", "wb")  # noqa: SIM115
    # In a session of its own a worker gets a Ctrl-C once, from the launcher, and not from the
    # terminal as well.
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


def _wait_for_workers(workers: Sequence[subprocess.Popen[bytes]], received: list[int]) -> None:
    """Wait until all have ended, or GRACE after one has failed; pass signals on to all."""
    deadline = float("inf")
    while any(worker.poll() is None for worker in workers) and time.monotonic() < deadline:
        while received:
            number = received.pop(0)
            for worker in workers:
                worker.send_signal(number)
        if any(worker.returncode for worker in workers):
            deadline = min(deadline, time.monotonic() + GRACE)
        time.sleep(0.02)


def _report_outcome(workers: Sequence[subprocess.Popen[bytes]], reports: Path) -> int:
    """Print the message of the first failure and return its exit code, 0 without a failure."""
    failed = [rank for rank, worker in enumerate(workers) if worker.returncode]
    if not failed:
        return 0
    first = min(failed, key=lambda rank: _failure_order(workers[rank], reports, rank))
    code = workers[first].returncode
    report = reports / str(first)
    if report.exists():
        print(report.read_text(encoding="utf-8"), file=sys.stderr)
    elif code < 0:
        log = reports / f"{first}.log"
        output = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
        print(
            f"{output}Worker {first} of {len(workers)} was ended by {signal.Signals(-code).name}, "
            "so all were; a machine without memory to spare does that with SIGKILL. The same "
            "command resumes from the newest checkpoint.",
            file=sys.stderr,
        )
    return 128 - code if code < 0 else code


def _failure_order(
    worker: subprocess.Popen[bytes], reports: Path, rank: int
) -> tuple[bool, int, int]:
    """Sort key of a failure: mistakes of the user before their consequences, then by time.

    A worker that was killed left no report, and the other failures are its consequences: it has
    time 0.
    """
    report = reports / str(rank)
    written = report.stat().st_mtime_ns if report.exists() else 0
    return worker.returncode != MISTAKE, written, rank


def _divide_cores(workers: int) -> dict[str, str]:
    """Give each worker its share of the cores, unless the user has set the number of threads."""
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    cores = _count_cores()
    return {"OMP_NUM_THREADS": str(max(1, cores // workers)), _CORES: str(cores)}


def _find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def _count_cores() -> int:
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))  # containers restrict it
    return os.cpu_count() or 1
