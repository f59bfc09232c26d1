"""Launcher of several worker processes for one command on this machine, like torchrun.

`launch` starts the workers, forwards signals to all workers and prints one error message for all of
them. A worker runs the same command with the environment variables RANK, LOCAL_RANK, WORLD_SIZE,
MASTER_ADDR and MASTER_PORT. This module does not import torch.
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

MISTAKE = 2  # exit code for an error that the user can fix
GRACE = 5.0  # seconds until the other workers are killed after one worker has failed
_REPORTS = "DDIFF_LAUNCH_REPORTS"  # folder in which a worker writes its error message


class RankInfo(NamedTuple):
    """Rank of a process among all `world_size` processes, and rank on its machine."""

    rank: int
    local_rank: int
    world_size: int


def get_rank_info() -> RankInfo | None:
    """Return the rank that torchrun or `launch` assigned to this process.

    Return None if the process was started without a launcher. Raises ArgumentError if the
    environment variables are invalid.
    """
    if not {"RANK", "WORLD_SIZE", "MASTER_ADDR"} <= os.environ.keys():
        return None
    rank = _read_number("RANK")
    world_size = _read_number("WORLD_SIZE")
    local_rank = _read_number("LOCAL_RANK") if "LOCAL_RANK" in os.environ else rank
    if rank >= world_size:
        raise ArgumentError(
            "The environment variable RANK must be less than WORLD_SIZE; got RANK = "
            f"{rank} and WORLD_SIZE = {world_size}. Unset RANK, WORLD_SIZE and MASTER_ADDR to run "
            "one process, or start several processes with torchrun."
        )
    return RankInfo(rank, local_rank, world_size)


def check_address() -> None:
    """Raise ArgumentError unless the environment variable MASTER_PORT is a port from 1 to 65535."""
    port = _read_number("MASTER_PORT") if "MASTER_PORT" in os.environ else 0
    if not 0 < port < 65536:
        raise ArgumentError(
            "The environment variable MASTER_PORT, which torchrun sets, must be a port from 1 to "
            f"65535; got {port or 'none'}. Unset RANK, WORLD_SIZE and MASTER_ADDR to run one "
            "process."
        )


def _read_number(name: str) -> int:
    """Read an integer of at least 0 from an environment variable.

    Raises ArgumentError if the value is not such an integer.
    """
    written = os.environ[name]
    if not written.isascii() or not written.strip().isdecimal():
        raise ArgumentError(
            f"The environment variable {name}, which torchrun sets, must be an integer of at least "
            f"0; got {shorten(written)!r}. Unset {name} to run one process."
        )
    return int(written)


def launch(arguments: Sequence[str], processes: int) -> int:
    """Run `ddiff ARGUMENTS` in `processes` workers and return the exit code for the shell.

    Rank 0 writes to stdout and stderr of this process. After a worker has failed, the other workers
    are killed after five seconds, and the error message of the first failed worker is printed.
    Workers end when this process ends, even if it is killed.
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
    """End this process with an error message, which the launcher prints once for all workers."""
    try:
        info = get_rank_info()
    except ArgumentError:  # `message` already reports the invalid variables
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
    # Other ranks may be waiting in a collective operation. A normal exit would wait for these ranks
    # or abort.
    os._exit(code)


def exit_with_launcher() -> None:
    """End this worker process when its launcher ends.

    The standard input of a worker is a pipe from the launcher, which is closed when the launcher
    ends, even if it is killed.
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
    # start_new_session: on Ctrl-C the terminal signals only the launcher, which forwards the
    # signal. Otherwise a worker would receive the signal twice.
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
    """Wait until all workers have ended, and forward the signals in `received` to all workers.

    After a worker has failed, wait at most GRACE seconds for the other workers.
    """
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
    """Print the error message of the worker that failed first, and return its exit code.

    `reports` is the folder in which workers write their error messages. Return 0 if no worker
    failed.
    """
    failed = [rank for rank, worker in enumerate(workers) if worker.returncode]
    if not failed:
        return 0
    first = min(failed, key=lambda rank: _failure_order(workers[rank], reports, rank))
    code = workers[first].returncode
    report = reports / str(first)
    log = reports / f"{first}.log"  # rank 0 writes to the terminal and has no log
    output = log.read_text(encoding="utf-8", errors="replace")[-2000:] if log.exists() else ""
    if report.exists():
        print(report.read_text(encoding="utf-8"), file=sys.stderr)
    elif code > 0:
        # The interpreter itself, or a library, ended the worker before it could report.
        print(
            f"{output}Worker {first} of {len(workers)} ended with exit code {code}, so all workers "
            "were ended.",
            file=sys.stderr,
        )
    else:
        print(
            f"{output}Worker {first} of {len(workers)} was killed by "
            f"{signal.Signals(-code).name}, so all workers were ended. If the signal is SIGKILL, "
            "the machine may be out of memory. The same command resumes from the last "
            "saved state.",
            file=sys.stderr,
        )
    return 128 - code if code < 0 else code


def _failure_order(
    worker: subprocess.Popen[bytes], reports: Path, rank: int
) -> tuple[bool, int, int]:
    """Return the sort key of a failed worker; the smallest key is the likely cause.

    `reports` is the folder in which workers write their error messages. Workers with the exit code
    MISTAKE (an error of the user) come first, then workers by the time of their report, then by
    `rank`. A killed worker has no report and gets the time 0, because its death causes the failures
    of the others.
    """
    report = reports / str(rank)
    written = report.stat().st_mtime_ns if report.exists() else 0
    return worker.returncode != MISTAKE, written, rank


def _divide_cores(workers: int) -> dict[str, str]:
    """Return the environment variables that divide the cores equally among `workers` workers.

    The dictionary is empty if the user has set OMP_NUM_THREADS.
    """
    if "OMP_NUM_THREADS" in os.environ:
        return {}
    return {"OMP_NUM_THREADS": str(max(1, count_cores() // workers))}


def _find_free_port() -> int:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return free.getsockname()[1]


def count_cores() -> int:
    """Return the number of cores that this process may use."""
    if sys.platform == "linux":
        return len(os.sched_getaffinity(0))  # a container may have fewer cores than the machine
    return os.cpu_count() or 1
