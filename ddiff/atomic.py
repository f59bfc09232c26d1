"""Atomic file writes on local and fsspec paths, and locks between processes.

A file is first written under the partial name `NAME.partial-XXXXXXXX` in the same folder, and
renamed when it is complete. A reader finds the old file, the new file or no file, but never an
incomplete file. A killed process leaves its partial file; later runs recognize partial files by
`original_name` and remove them.
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
# Earlier versions of ddiff used the partial names `NAME.part` and `NAME.XXXXXXXX.part`.
_SUFFIX = re.compile(r"(\.([0-9a-f]{8}\.)?part|\.partial-[0-9a-f]{8})$")
NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS)  # errors of a file system without locks
_POLL = 0.1  # seconds between two attempts to lock


def partial_name(name: str) -> str:
    """Return a new temporary name, under which the file or folder `name` is written first."""
    return f"{name}{PARTIAL}{uuid.uuid4().hex[:8]}"


def original_name(name: str) -> str:
    """Return the final name of a file, given its partial name.

    A file has a partial name until it is complete. Other names are returned unchanged.
    """
    return _SUFFIX.sub("", name)


@contextmanager
def open_atomic(
    path: str | Path,
    *,
    system: Any = None,
    sync: bool = False,
) -> Iterator[IO[bytes]]:
    """Open a file for writing; it appears at `path` only if the `with` block ends without error.

    Missing folders are created. After an error the partial file is removed. An OSError without a
    filename gets `path` as its filename.

    Args:
        path: a local path, or a string with any fsspec address.
        system: the fsspec file system of `path`. None: `path` determines the file system.
        sync: whether a local file is flushed to the disk before it is renamed. Other file systems
            ignore `sync`.
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
    """Write `content` to a file atomically. A str is encoded as UTF-8.

    `system`: fsspec file system of `path`; None: `path` determines the file system. `sync`: whether
    a local file is flushed to the disk before it is renamed.
    """
    with open_atomic(path, system=system, sync=sync) as file:
        file.write(content.encode() if isinstance(content, str) else content)


def copy_atomic(source: Path, path: str, system: Any) -> None:
    """Copy a local file atomically to `path` on the fsspec file system `system`.

    The folder of `path` must exist.
    """
    system, place = _locate(path, system)
    # Every attempt uses the same partial name, so that a repeated copy overwrites the partial file
    # of a killed copy. No later run would remove it from a folder of the user.
    partial = f"{place}.partial"
    with _publish(system, partial, place):
        if system is None:
            shutil.copyfile(source, partial)
        else:
            system.put_file(str(source), partial)


def lock_file(file: IO[Any], patience: float = 0.0) -> bool:
    """Lock an open file exclusively. Retry for up to `patience` seconds.

    Returns False if another process still has the lock after that time, else True. The lock is
    released when the file is closed or the process ends, even if it is killed. On a file system
    without locks, raises OSError with an errno in NO_LOCKS.
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
    """Return the file system and the path of an address; the file system is None for local files.

    `system` is the fsspec file system of the path, or None if the address determines it.
    """
    if isinstance(path, Path):
        return None, str(path)
    # Imported only when needed, so that `ddiff --help` starts without fsspec.
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
    """Rename the file `partial` to `place` after the `with` block.

    After an error in the block, the file `partial` is deleted instead. `system` is the fsspec file
    system of both files, or None for local files.
    """
    try:
        yield
        if system is None:
            os.replace(partial, place)
        else:
            system.mv(partial, place)
    except BaseException as error:
        # Remove the partial file, since the disk may be full. If the removal fails too, the first
        # error is more useful than the second.
        with suppress(Exception):
            if system is None:
                os.unlink(partial)
            else:
                system.rm(partial)
        # An error without errno is not given a filename: str() of an OSError with a filename shows
        # only the errno and the filename.
        if isinstance(error, OSError) and error.errno is not None and error.filename is None:
            error.filename = place
        raise
