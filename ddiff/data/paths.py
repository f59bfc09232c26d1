"""Find files by paths and globs, and open them.

A path that exists is taken literally, even if its name contains glob characters. Local files are
opened without fsspec, which would interpret "::", "#" and other characters in names.
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
# Keys of fsspec's `info` whose values change with the content, in order of reliability.
_VERSION_KEYS = (
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


def find_files(pattern: str) -> list[str]:
    """Return the sorted paths of the files that match a path or glob.

    `**` matches folders at any depth. A name that begins with a dot matches only a pattern that
    begins with a dot. Raises DataError for a missing file, a folder, a broken link, a pipe or a
    device.
    """
    local = _local_path(pattern)
    found = _find_remote(pattern) if local is None else _find_local(local)
    if not found:
        raise DataError(_not_found_message(pattern, local))
    return found


def find_all_files(patterns: Sequence[str]) -> list[str]:
    """Return the files that match any pattern, in the order of `patterns`, each file once."""
    found: dict[Any, str] = {}
    for pattern in patterns:
        for path in find_files(pattern):
            found.setdefault(_identity(path), path)
    return list(found.values())


def find_train_and_validation(
    train: Sequence[str], validation: Sequence[str]
) -> tuple[list[str], list[str]]:
    """Return the files that match the patterns `train`, and those that match `validation`.

    Raises DataError if a file is both a training and a validation file.
    """
    paths = find_all_files(train)
    validation_paths = find_all_files(validation)
    check_disjoint(paths, validation_paths)
    return paths, validation_paths


def check_disjoint(train: Iterable[str], validation: Iterable[str]) -> None:
    """Raise DataError if a file is both a training and a validation file.

    A file is recognized even if `train` and `validation` contain different paths of the file.
    """
    trained = {_identity(path): path for path in train}
    for path in validation:
        same = trained.get(_identity(path))
        if same is None:
            continue
        alias = "" if same == path else f" (there as {printable(same)})"
        raise DataError(
            f"{printable(path)} is named by validation and by files{alias}: the model would be "
            "evaluated on its training text. Name the training files so that no pattern matches "
            "this file, or move it to another folder. Without validation files a fraction of the "
            "documents is held out."
        )


def base_name(path: str) -> str:
    """Return the file name of a path, with unprintable characters escaped."""
    return printable(path.rsplit("/", 1)[-1])


def printable(path: str) -> str:
    """Escape control characters and bytes that are not UTF-8, for messages."""
    return "".join(mark if mark.isprintable() else _escape(mark) for mark in path)


def file_version(path: str) -> list[Any]:
    """Return [name, size, version] of a file.

    The version is an entity tag, a checksum or the modification time, and changes with the content.
    """
    with explain_errors(path):
        local = _local_path(path)
        if local is not None:
            about = os.stat(local)
            return [base_name(path), about.st_size, str(about.st_mtime)]
        system, place = fsspec.url_to_fs(path)
        info = system.info(place)
        versions = [str(info[key]) for key in _VERSION_KEYS if info.get(key)]
        version = versions[0] if versions else ""
        return [base_name(path), info.get("size"), version]


@contextmanager
def open_file(path: str) -> Iterator[BinaryIO]:
    """Open a local or remote file to read bytes.

    All errors, also those of reading in the `with` block, become a DataError that names the file.
    """
    with explain_errors(path):
        local = _local_path(path)
        if local is not None:
            with open(local, "rb") as file:
                yield file
        else:
            system, place = fsspec.url_to_fs(path)
            with system.open(place, "rb") as file:
                yield cast(BinaryIO, file)


@contextmanager
def explain_errors(path: str) -> Iterator[None]:
    """Convert any error in the `with` block to a DataError that names the file."""
    try:
        yield
    except (DdiffError, MemoryError):
        raise
    except PermissionError as error:
        raise _permission_error(path) from error
    except Exception as error:  # file systems and formats have different error classes
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{printable(path)} cannot be read: {type(error).__name__}: {reason}. Check the file "
            "and its path."
        ) from error


def _local_path(pattern: str) -> str | None:
    """Return the local path of a pattern, or None for a remote file system."""
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


def _find_local(path: str) -> list[str]:
    if _exists(path):
        _check_regular(path)
        return [path]
    if not any(mark in path for mark in _MARKS):
        return []
    start = "/" if path.startswith("/") else ""
    parts = [part for part in path.split("/") if part]
    if "**" in parts[-1:]:
        parts.append("*")
    matches = set(_matches(start, parts))
    found = sorted(match for match in matches if not os.path.isdir(match))
    for match in found:
        _check_regular(match)
    return found


def _matches(folder: str, parts: list[str]) -> Iterator[str]:
    """Yield the paths under `folder` that match a pattern.

    `parts`: the pattern, split at its slashes. The folder "" is the working directory.
    """
    head, *rest = parts
    if head == "**":
        for below in _folders(folder):
            yield from _matches(below, rest)
        return
    for name in _matching_names(folder, head):
        path = os.path.join(folder, name)
        if not rest:
            if _exists(path):
                yield path
        elif os.path.isdir(path):
            yield from _matches(path, rest)


def _matching_names(folder: str, part: str) -> list[str]:
    """Return the names in a folder that match `part`, the part of a pattern between two slashes."""
    if not any(mark in part for mark in _MARKS) or _exists(os.path.join(folder, part)):
        return [part]  # an existing name is taken literally, not as a pattern
    is_hidden = part.startswith(".")
    names = [name for name in _list_names(folder) if name.startswith(".") == is_hidden]
    return [name for name in names if fnmatchcase(name, part)]


def _folders(folder: str) -> Iterator[str]:
    """Yield a folder and all folders below it.

    Symbolic links are followed. Each folder is entered only once, so that the search ends even if
    links form a cycle.
    """
    entered: set[tuple[int, int]] = set()
    pending = [folder]
    while pending:
        here = pending.pop()
        about = os.stat(here or ".")
        if (about.st_dev, about.st_ino) in entered:
            continue
        entered.add((about.st_dev, about.st_ino))
        yield here
        visible = [name for name in _list_names(here) if not name.startswith(".")]
        paths = [os.path.join(here, name) for name in visible]
        # Reversed, because `pop` takes the last one: folders are visited in the order of names.
        pending += [path for path in reversed(paths) if os.path.isdir(path)]


def _list_names(folder: str) -> list[str]:
    try:
        return sorted(os.listdir(folder or "."))
    except PermissionError as error:
        raise DataError(
            f"The folder {printable(folder or '.')} cannot be listed: permission denied. Change "
            "its permissions."
        ) from error


def _check_regular(path: str) -> None:
    """Raise DataError for a path that is not a regular file, such as a pipe or a folder."""
    try:
        mode = os.stat(path).st_mode
    except OSError as error:
        if os.path.islink(path):
            target = printable(os.readlink(path))
            raise DataError(
                f"{printable(path)} is a link to {target}, which cannot be reached "
                f"({error.strerror}). Fix or remove the link."
            ) from error
        raise DataError(
            f"{printable(path)} cannot be read: {error.strerror}. Check the path."
        ) from error
    if stat.S_ISDIR(mode):
        inside = f"{printable(path.rstrip('/'))}/*.txt"
        raise DataError(
            f"{printable(path)} is a folder, but a file is expected. Name its files, for instance "
            f"{inside}, or with subfolders {printable(path.rstrip('/'))}/**/*.txt."
        )
    if stat.S_ISREG(mode) and not os.access(path, os.R_OK):
        raise _permission_error(path)
    if not stat.S_ISREG(mode):
        raise DataError(
            f"{printable(path)} is a pipe or a device, which can be read only once. Write its "
            "content to a file first."
        )


def _find_remote(pattern: str) -> list[str]:
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
                f"{pattern} is a folder, but a file is expected. Name its files: "
                f"{pattern.rstrip('/')}/*"
            )
        else:
            found = []
        return [_remote_path(pattern, name, system) for name in found]
    except DataError:
        raise
    except Exception as error:  # file systems have different error classes
        reason = (str(error).splitlines() or [""])[0]
        raise DataError(
            f"{printable(pattern)} cannot be opened: {type(error).__name__}: {reason}. Give a "
            "local path or one that fsspec knows."
        ) from error


def _remote_path(pattern: str, name: str, system: Any) -> str:
    """Return the full fsspec path of the file `name` in the file system of `pattern`.

    If `pattern` is a chain of file systems ("zip://...::s3://..."), the result has the same chain.
    """
    first, _, others = pattern.partition("::")
    if not others:
        return system.unstrip_protocol(name)
    if "://" in first:  # within an archive: zip://NAME::ARCHIVE
        return f"{first.partition('://')[0]}://{name}::{others}"
    protocol = others.partition("://")[0]  # through a cache: simplecache::s3://NAME
    return f"{first}::{protocol}://{name if protocol in ('file', 'local') else name.lstrip('/')}"


def _permission_error(path: str) -> DataError:
    return DataError(
        f"{printable(path)} cannot be read: permission denied. Change its permissions."
    )


def _not_found_message(pattern: str, local: str | None) -> str:
    marks = "".join(mark for mark in _MARKS if mark in pattern)
    message = f"There is no file {printable(pattern)}"
    if marks:
        message += f", and no file matches it as a pattern (it contains {' '.join(marks)})"
    if local is None:
        return f"{message}. Check the path."
    message += f" (working directory: {Path.cwd()})."
    places = [place for place, mark in enumerate(local) if mark in _MARKS]
    before_marks = local[: places[0]] if places else local
    folder = os.path.dirname(before_marks)
    if folder and not os.path.isdir(folder):
        message += f" There is no folder {printable(folder)} either."
    return f"{message} Check the path; relative paths start in the working directory."


def _identity(path: str) -> Any:
    """Return a value that identifies the file at `path`, equal for all local paths of the file."""
    local = _local_path(path)
    if local is None:
        return path
    about = os.stat(local)
    return about.st_dev, about.st_ino


def _escape(mark: str) -> str:
    code = ord(mark)
    if 0xDC80 <= code <= 0xDCFF:  # Python's placeholder for a byte that is not UTF-8
        return f"\\x{code - 0xDC00:02x}"
    return mark.encode("unicode_escape").decode()
