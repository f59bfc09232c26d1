"""Paths and globs: which files they name, and how a file is opened.

A path that exists as it is written is that file, whatever characters its name has; a glob is only what names no file. Local
files are opened by the operating system and not through fsspec, which gives "::", "#" and the like a meaning.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, BinaryIO, cast

import fsspec

from ddiff.errors import DataError, DdiffError

_MARKS = "*?["
_LOCAL = ("file://", "local://")


def find_files(pattern: str) -> list[str]:
    """Return the files that a path or glob names, sorted.

    `**` matches folders at any depth; names that begin with a dot are matched only by a dot. DataError if no file is
    named, for a folder, a broken link, and for what can be read only once (a pipe, a device).
    """
    local = _local_path(pattern)
    found = _remote_files(pattern) if local is None else _local_files(local)
    if not found:
        raise DataError(_not_found(pattern, local))
    return found


def find_all_files(patterns: Sequence[str]) -> list[str]:
    """Return the files of several patterns in their order; a file that two patterns name is listed once."""
    found: dict[Any, str] = {}
    for pattern in patterns:
        for path in find_files(pattern):
            found.setdefault(_identity(path), path)
    return list(found.values())


def find_train_and_validation(
    train: Sequence[str], validation: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the training and the validation files of patterns; DataError if one file is among both."""
    paths = find_all_files(train)
    validation_paths = find_all_files(validation)
    check_disjoint(paths, validation_paths)
    return paths, validation_paths


def check_disjoint(train: Iterable[str], validation: Iterable[str]) -> None:
    """Raise DataError if a file is among the training and the validation files, under whatever path."""
    trained = {_identity(path): path for path in train}
    for path in validation:
        if (same := trained.get(_identity(path))) is not None:
            also = "" if same == path else f" (there as {printable(same)})"
            raise DataError(
                f"{printable(path)} is named by validation and by files{also}: the model would be evaluated on text "
                "that it was trained on. Leave it out of files: move it to another folder, or name the training "
                "files so that no pattern matches it. Without validation files a share of the documents is held out."
            )


def base_name(path: str) -> str:
    """Return the last part of a path, printable."""
    return printable(path.rsplit("/", 1)[-1])


def printable(path: str) -> str:
    """Return a path as messages write it: bytes that are not UTF-8 and control characters are escaped."""
    return "".join(mark if mark.isprintable() else _escaped(mark) for mark in path)


def file_version(path: str) -> list[Any]:
    """Return what changes when a file does: its name, size, and tag or time of change."""
    with explain_errors(path):
        if (local := _local_path(path)) is not None:
            found = os.stat(local)
            return [base_name(path), found.st_size, str(found.st_mtime)]
        system, place = fsspec.url_to_fs(path)
        info = system.info(place)
        changed = next((str(info[key]) for key in _CHANGED if info.get(key)), "")
        return [base_name(path), info.get("size"), changed]


_CHANGED = (
    "ETag",
    "etag",
    "md5Hash",
    "sha256",
    "blob_id",
    "CRC",
    "mtime",
    "LastModified",
    "last_modified",
    "created",
)


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a file to read bytes; what goes wrong while it is read is a DataError that names it."""
    with explain_errors(path):
        if (local := _local_path(path)) is not None:
            with open(local, "rb") as file:
                yield file
        else:
            system, place = fsspec.url_to_fs(path)
            with system.open(place, "rb") as file:
                yield cast(BinaryIO, file)


@contextmanager
def explain_errors(path: str) -> Iterator[None]:
    """Turn whatever goes wrong within into a DataError that names the file."""
    try:
        yield
    except (DdiffError, MemoryError):
        raise
    except PermissionError as error:
        raise _forbidden(path) from error
    except Exception as error:  # each file system and each format has errors of its own
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{printable(path)} cannot be read: {type(error).__name__}: {reason}. Check the file and its path."
        ) from error


def _local_path(pattern: str) -> str | None:
    """The path on this machine, or None for one of another file system."""
    for scheme in _LOCAL:
        if pattern.startswith(scheme) and "::" not in pattern:
            return pattern.removeprefix(scheme)
    if "://" in pattern and not _exists(pattern):
        return None
    return pattern if _exists(pattern) else os.path.expanduser(pattern)


def _exists(path: str) -> bool:
    try:
        return os.path.lexists(path)
    except ValueError:  # NUL in the path
        return False


def _local_files(path: str) -> list[str]:
    if _exists(path):
        _check_regular(path)
        return [path]
    if not any(mark in path for mark in _MARKS):
        return []
    start = "/" if path.startswith("/") else ""
    parts = [part for part in path.split("/") if part]
    if "**" in parts[-1:]:
        parts.append("*")
    found = sorted({match for match in _matches(start, parts) if not os.path.isdir(match)})
    for match in found:
        _check_regular(match)
    return found


def _matches(folder: str, parts: list[str]) -> Iterator[str]:
    """Paths under a folder ("" is the working directory) that match the parts of a pattern."""
    head, *rest = parts
    if head == "**":
        for below in _folders(folder):
            yield from _matches(below, rest)
        return
    for name in _matching(folder, head):
        path = os.path.join(folder, name)
        if not rest:
            if _exists(path):
                yield path
        elif os.path.isdir(path):
            yield from _matches(path, rest)


def _matching(folder: str, part: str) -> list[str]:
    """The names in a folder that one part of a pattern names: itself if it is there, else those that it matches."""
    if not any(mark in part for mark in _MARKS) or _exists(os.path.join(folder, part)):
        return [part]
    hidden = part.startswith(".")
    return [
        name
        for name in _names(folder)
        if fnmatchcase(name, part) and name.startswith(".") == hidden
    ]


def _folders(folder: str) -> Iterator[str]:
    """A folder and all below it; links are followed, but no folder is entered twice, so that circles end."""
    entered: set[tuple[int, int]] = set()
    waiting = [folder]
    while waiting:
        here = waiting.pop()
        about = os.stat(here or ".")
        if (about.st_dev, about.st_ino) in entered:
            continue
        entered.add((about.st_dev, about.st_ino))
        yield here
        below = [os.path.join(here, name) for name in _names(here) if not name.startswith(".")]
        waiting += [path for path in reversed(below) if os.path.isdir(path)]


def _names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or "."))
    except PermissionError as error:
        raise DataError(
            f"The folder {printable(folder or '.')} must not be listed: permission denied."
        ) from error


def _check_regular(path: str) -> None:
    """DataError for what is no file that can be read as often as needed."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            target = printable(os.readlink(path))
            raise DataError(
                f"{printable(path)} is a link to {target}, which cannot be reached ({error.strerror}). "
                "Fix or remove the link."
            ) from error
        raise DataError(
            f"{printable(path)} cannot be read: {error.strerror}. Check the path."
        ) from error
    if stat.S_ISDIR(mode):
        inside = f"{printable(path.rstrip('/'))}/*.txt"
        raise DataError(
            f"{printable(path)} is a folder, and files are due. Name the files in it, for instance {inside}, or "
            ".../**/*.txt for those of its folders too."
        )
    if stat.S_ISREG(mode) and not os.access(path, os.R_OK):
        raise _forbidden(path)
    if not stat.S_ISREG(mode):
        raise DataError(
            f"{printable(path)} is a pipe or a device, which can be read only once. Write its content to a file first."
        )


def _remote_files(pattern: str) -> list[str]:
    try:
        system, path = fsspec.url_to_fs(pattern)
        if system.isfile(path):
            found = [path]
        elif any(mark in path for mark in _MARKS):
            matches = system.glob(path, detail=True)
            found = sorted(
                name for name, info in matches.items() if info.get("type") != "directory"
            )
        elif system.isdir(path):
            raise DataError(
                f"{pattern} is a folder, and files are due. Name the files in it: {pattern.rstrip('/')}/*"
            )
        else:
            found = []
        return [_remote_path(pattern, name, system) for name in found]
    except DataError:
        raise
    except Exception as error:  # each file system has errors of its own
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{printable(pattern)} cannot be opened: {type(error).__name__}: {reason}. Give a local path or one "
            "that fsspec knows."
        ) from error


def _remote_path(pattern: str, name: str, system: Any) -> str:
    """The path of a file that a file system calls `name`, with which it can be opened: a chain is kept."""
    first, _, others = pattern.partition("::")
    if not others:
        return system.unstrip_protocol(name)
    if "://" in first:  # within an archive: zip://NAME::ARCHIVE
        return f"{first.partition('://')[0]}://{name}::{others}"
    protocol = others.partition("://")[0]  # through a cache: simplecache::s3://NAME
    return f"{first}::{protocol}://{name if protocol in ('file', 'local') else name.lstrip('/')}"


def _forbidden(path: str) -> DataError:
    return DataError(
        f"{printable(path)} must not be read: permission denied. Change its permissions."
    )


def _not_found(pattern: str, local: str | None) -> str:
    marks = "".join(mark for mark in _MARKS if mark in pattern)
    what = f"There is no file {printable(pattern)}"
    if marks:
        what += f", and none that it matches as a pattern (it holds {' '.join(marks)})"
    if local is None:
        return f"{what}. Check the path."
    fixed = os.path.dirname(
        local.partition(next((mark for mark in local if mark in _MARKS), "\0"))[0]
    )
    missing = (
        f" There is no folder {printable(fixed)} either."
        if fixed and not os.path.isdir(fixed)
        else ""
    )
    return f"{what} (looked from {Path.cwd()}).{missing} Check the path; relative paths start where ddiff runs."


def _identity(path: str) -> Any:
    """What two paths of one file have in common."""
    if (local := _local_path(path)) is None:
        return path
    about = os.stat(local)
    return about.st_dev, about.st_ino


def _escaped(mark: str) -> str:
    code = ord(mark)
    if 0xDC80 <= code <= 0xDCFF:  # a byte of the name that is not UTF-8, as Python keeps it
        return f"\\x{code - 0xDC00:02x}"
    return mark.encode("unicode_escape").decode()
