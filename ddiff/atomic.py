"""Atomic file writes on local and fsspec paths, and locks between processes.

A file is written next to its place under a partial name, `NAME.partial-XXXXXXXX`, and renamed
when it is whole, so that a reader finds the old file, the new one or none. A killed process leaves
its partial file behind; the owner of the folder finds it by `original_name` and removes it.
"""

from __future__ import annotations

import errno
import fcntl
import math
import os
import re
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

PARTIAL = ".partial-"  # followed by 8 hexadecimal digits
# `.part` and `.XXXXXXXX.part` are names that earlier versions wrote under.
_SUFFIX = re.compile(r"(\.([0-9a-f]{8}\.)?part|\.partial-[0-9a-f]{8})$")
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of a file system without locks
_POLL = 0.1  # seconds between two attempts to lock


def partial_name(name: str) -> str:
    """Return a new name for a file or folder that is written there before it is whole."""
    return f"{name}{PARTIAL}{uuid.uuid4().hex[:8]}"


def original_name(name: str) -> str:
    """Return the name that a partial file was meant for; any other name as it is."""
    return _SUFFIX.sub("", name)


@contextmanager
def open_atomic(
    path: str | Path,
    *,
    system: Any = None,
    sync: bool = False,
) -> Iterator[IO[bytes]]:
    """Open a file for writing that gets its name `path` only when the block ends without an error.

    Missing folders are made. After an error nothing is left behind, and an OSError names `path`.

    Args:
        path: a local path, or any path that fsspec knows when it is a string.
        system: the fsspec file system of `path`, if it has been looked up already.
        sync: write through to the disk before the file gets its name. Local files only: an object
            store has no such step.
    """
    system, place = _locate(path, system)
    folder = place.rpartition("/")[0]
    if folder and system is None:
        os.makedirs(folder, exist_ok=True)
    elif folder:
        system.makedirs(folder, exist_ok=True)
    partial = partial_name(place)
    opener = open if system is None else system.open
    with _publish(system, partial, place), opener(partial, "wb") as file:
        yield file
        if sync and system is None:
            file.flush()
            os.fsync(file.fileno())


def write_atomic(
    path: str | Path,
    content: bytes | str,
    *,
    system: Any = None,
    sync: bool = False,
) -> None:
    """Write a file at once, text as UTF-8; the arguments are those of `open_atomic`."""
    with open_atomic(path, system=system, sync=sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def copy_atomic(source: Path, path: str, system: Any) -> None:
    """Copy a local file to a path of an fsspec file system whose folder exists."""
    system, place = _locate(path, system)
    # The same name in each attempt, so that a repeated copy overwrites what a killed one left: no
    # process cleans up a folder that the user has named.
    partial = f"{place}.partial"
    with _publish(system, partial, place):
        if system is None:
            shutil.copyfile(source, partial)
        else:
            system.put_file(str(source), partial)


def lock_file(file: IO[Any], patience: float = 0.0) -> bool:
    """Take an exclusive lock on an open file; False if it is still taken after `patience` seconds.

    The lock is released when the file is closed or the process ends, however it ends. Raises
    OSError with an errno of NO_LOCKS on a file system without locks.
    """
    if math.isinf(patience):
        fcntl.flock(file, fcntl.LOCK_EX)
        return True
    deadline = time.monotonic() + patience
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return True
        except BlockingIOError:
            if time.monotonic() >= deadline:
                return False
            time.sleep(_POLL)


def _locate(path: str | Path, system: Any) -> tuple[Any, str]:
    """Return (file system, path in it); the file system is None for local files."""
    if isinstance(path, Path):
        return None, str(path)
    # Imported here because `ddiff --help` needs no fsspec.
    import fsspec
    from fsspec.implementations.local import LocalFileSystem

    place = path
    if system is None:
        system, place = fsspec.url_to_fs(path)
    return (None if isinstance(system, LocalFileSystem) else system), place


@contextmanager
def _publish(
    system: Any,
    partial: str,
    place: str,
) -> Iterator[None]:
    """Rename `partial` to `place` after the block; remove it after an error."""
    try:
        yield
        if system is None:
            os.replace(partial, place)
        else:
            system.mv(partial, place)
    except BaseException as error:
        # On a full disk the room is needed. An error of the removal would hide the first one.
        with suppress(Exception):
            if system is None:
                os.unlink(partial)
            else:
                system.rm(partial)
        # Without an errno the message would be lost: str() of an OSError with a filename shows only
        # errno and filename.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = place
        raise
