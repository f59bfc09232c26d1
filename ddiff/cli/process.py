"""Process of the command line: exit codes, signals and messages of errors."""

from __future__ import annotations

import gc
import os
import signal
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from ddiff.cli.app import BROKEN_PIPE, app
from ddiff.cli.output import discard_output, escape_unencodable_output
from ddiff.distributed.launcher import (
    MISTAKE,
    exit_with_launcher,
    exit_with_message,
    get_rank_info,
)
from ddiff.errors import REPORT, TRACEBACK, explain_error, shorten

LONGEST_MESSAGE = 6000  # characters of an error message


def main(arguments: list[str] | None = None) -> None:
    """Run the command line (entry point `ddiff`). Exit with 2 after a user error."""
    try:
        if get_rank_info() is not None:
            # DDP warns in each run that every parameter was used, which is the normal case
            os.environ.setdefault("TORCH_CPP_LOG_LEVEL", "ERROR")
        exit_with_launcher()
        escape_unencodable_output()
        with _exit_on_sigterm():
            try:
                app(arguments)
            finally:
                # flush here, where a full disk or a closed pipe is still reported
                for stream in filter(None, (sys.stdout, sys.stderr)):
                    stream.flush()
    except SystemExit as ending:
        if arguments is None and _is_query(sys.argv[1:]):
            # skip the unloading of torch, which takes half a second
            os._exit(ending.code if isinstance(ending.code, int) else 0)
        raise
    except BrokenPipeError:
        discard_output()
        raise SystemExit(BROKEN_PIPE) from None
    except Exception as error:
        _end_with(error)


def _is_query(arguments: list[str]) -> bool:
    """Return whether a command only prints text: `ddiff plugins` or `ddiff run --dry-run`.

    The process of such a command may end without cleanup.
    """
    return arguments[:1] == ["plugins"] or (arguments[:1] == ["run"] and "--dry-run" in arguments)


def _end_with(error: Exception) -> NoReturn:
    """Print one paragraph about a user's error, or the traceback of a defect, and exit."""
    message = explain_error(error)
    # At exit Python would write the rest of the buffer again, fail again on a full disk, and
    # replace the exit code.
    discard_output()
    if message is None:
        exit_with_message(f"{traceback.format_exc()}{REPORT}", 1)
    if os.environ.get(TRACEBACK):
        message = f"{traceback.format_exc()}{message}"
    exit_with_message(shorten(message, LONGEST_MESSAGE), MISTAKE)


@contextmanager
def _exit_on_sigterm() -> Iterator[None]:
    """Raise SystemExit on SIGTERM in a `with` block, so that locks and partial files are removed.

    Worker processes of a distributed run do not install the handler: training handles SIGTERM.
    """
    if get_rank_info() is not None or threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(number: int, frame: FrameType | None) -> None:
        raise SystemExit(128 + number)

    previous = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, previous)


@contextmanager
def pause_garbage_collection() -> Iterator[None]:
    """Pause the garbage collector in a `with` block of imports.

    During imports, the collector would scan a million objects that are all in use.
    """
    # all imported objects stay alive, so that a scan frees no memory
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()
