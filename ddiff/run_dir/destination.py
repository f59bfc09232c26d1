"""Check and write output files at a path or fsspec address that the user chose.

An output path is checked before any long computation. The path is refused if it is not writable, or
if writing would overwrite files of a run or of the user.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, NamedTuple

from ddiff.atomic import open_atomic, partial_name
from ddiff.errors import ArgumentError
from ddiff.run_dir.files import FILES, RECIPE
from ddiff.run_dir.location import find_enclosing_checkpoint


class Destination(NamedTuple):
    """Checked path of an output file or folder.

    Args:
        name: path or address as written by the user.
        system: fsspec file system.
        path: path in the file system.
        argument: option or argument with the path, for messages.
    """

    name: str
    system: Any
    path: str
    argument: str

    @property
    def local(self) -> Path | None:
        """Path on this machine; None for a remote file system."""
        from fsspec.implementations.local import LocalFileSystem

        return Path(self.path) if isinstance(self.system, LocalFileSystem) else None


def check_destination(
    name: str | Path,
    argument: str,
    *,
    suffix: str | None = None,
    folder: bool = False,
    owned: Callable[[IO[bytes]], bool] | None = None,
) -> Destination:
    """Check the path of an output file or folder before a long computation.

    Args:
        name: path or address as written by the user.
        argument: option or argument with the path, such as "ddiff eval --out", for messages.
        suffix: required ending of a file.
        folder: whether the output is a folder.
        owned: function (file) that returns whether ddiff wrote the existing file. A file that ddiff
            did not write is not overwritten. None: every file may be overwritten.

    Raises ArgumentError if the path is not writable or must not be overwritten.
    """
    place = _resolve(str(name), argument)
    if suffix and not folder and Path(place.path).suffix != suffix:
        raise ArgumentError(
            f"{argument}: the file name must end in {suffix}; got {name}. Use {name}{suffix}."
        )
    if place.local is not None:
        _check_outside_runs(place, folder)
    _check_existing(place, folder, owned)
    if place.local is not None:
        _check_writable(place, folder)
    return place


def check_new_folder(name: str | Path, argument: str) -> Destination:
    """Check the path of an output folder, which must be local, and new or empty.

    `argument`: option or argument with the path, for messages. Raises ArgumentError.
    """
    place = check_destination(name, argument, folder=True)
    if place.local is None or (place.local.exists() and any(place.local.iterdir())):
        raise ArgumentError(
            f"{argument}: the folder must be local, and new or empty; got {name}. Use another "
            "folder."
        )
    return place


def write_file(place: Destination, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write a file atomically, with the content that `fill(file)` writes.

    Raises ArgumentError if the path is not writable.
    """
    try:
        with open_atomic(place.path, system=place.system) as file:
            fill(file)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the command line explains a full disk
        raise unwritable_error(place, error) from error


def write_text(place: Destination, text: str) -> None:
    """Write a UTF-8 file atomically."""
    write_file(place, lambda file: file.write(text.encode()))


@contextmanager
def write_folder(place: Destination) -> Iterator[Path]:
    """Context manager that yields a new local folder, and renames it to `place` at the end.

    `place` must not exist or be empty. After an error, the new folder is removed. Raises
    ArgumentError if the path is not writable.
    """
    assert place.local is not None
    folder = place.local.with_name(partial_name(place.local.name))
    try:
        folder.mkdir(parents=True)
        yield folder
        os.replace(folder, place.local)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # the command line explains a full disk
        raise unwritable_error(place, error) from error
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def unwritable_error(place: Destination, error: Exception) -> ArgumentError:
    """Return the ArgumentError for a path that is not writable."""
    system_reason = error.strerror if isinstance(error, OSError) else None
    reason = system_reason or str(error) or type(error).__name__
    return ArgumentError(
        f"{place.argument}: {place.name} cannot be written ({reason}). Use another path."
    )


def _resolve(name: str, argument: str) -> Destination:
    """Find the file system of a path or address `name`, and the path in this file system.

    `argument`: name of the caller's argument or option, for error messages.
    """
    import fsspec  # imported here, so that importing this module stays fast

    if not name or "\0" in name:
        raise ArgumentError(f"{argument}: expected a path; got {name!r}.")
    is_address = "://" in name
    first = Path(name).parts[:1]
    if not is_address and first and first[0].endswith(":"):
        raise ArgumentError(
            f"{argument}: {name} looks like an address without its second slash, which "
            f'pathlib.Path removes. Pass the address as a string: "{first[0]}//...".'
        )
    try:
        full_name = name if is_address else os.path.abspath(os.path.expanduser(name))
        system, path = fsspec.url_to_fs(full_name)
    except (ValueError, ImportError, OSError) as error:
        raise ArgumentError(
            f"{argument}: {name} cannot be written: {error}. Use a local path, or install the "
            "package that the protocol of the address needs."
        ) from error
    return Destination(name, system, str(path).rstrip("/") or "/", argument)


def _check_outside_runs(place: Destination, folder: bool) -> None:
    """Raise ArgumentError if the path is inside a checkpoint or is a file of a run.

    `folder`: whether the output is a folder.
    """
    path = Path(place.path)
    # writing to a symbolic link replaces the link, so only the folders above a file are resolved
    real = path.resolve() if folder else path.parent.resolve() / path.name
    above = find_enclosing_checkpoint(real)
    if above is not None:
        raise ArgumentError(
            f"{place.argument}: {place.name} is in {above}, where output would damage a "
            "checkpoint. Use a path outside of the checkpoints of a run."
        )
    if real.name in FILES and (real.parent / RECIPE).is_file():
        raise ArgumentError(
            f"{place.argument}: {place.name} is a file of the run {real.parent}. Use another path."
        )


def _check_existing(
    place: Destination, folder: bool, owned: Callable[[IO[bytes]], bool] | None
) -> None:
    """Raise ArgumentError if an existing path has the wrong type or must not be replaced.

    `folder` and `owned` are described in `check_destination`.
    """
    try:
        is_folder = place.system.isdir(place.path)
        is_file = place.system.isfile(place.path)
        if is_file and folder:
            raise ArgumentError(
                f"{place.argument}: {place.name} is a file; a folder was expected. Use "
                "another path."
            )
        if is_folder and not folder:
            raise ArgumentError(
                f"{place.argument}: {place.name} is a folder; a file was expected. Add a "
                "file name to the path."
            )
        if is_file and owned is not None:
            with place.system.open(place.path, "rb") as file:
                is_owned = owned(file)
            if not is_owned:
                raise ArgumentError(
                    f"{place.argument}: {place.name} exists, and ddiff did not write this file. "
                    "Use another path, or delete the file."
                )
    except ArgumentError:  # which is a ValueError too
        raise
    except (OSError, ValueError, ImportError) as error:
        raise unwritable_error(place, error) from error


def _check_writable(place: Destination, folder: bool) -> None:
    """Check that the nearest existing folder is writable, by creating a temporary folder."""
    import tempfile

    path = Path(place.path)
    start = path if folder else path.parent
    existing = next(above for above in (start, *start.parents) if os.path.lexists(above))
    try:
        with tempfile.TemporaryDirectory(prefix=".ddiff-", dir=existing):
            pass
    except OSError as error:
        raise ArgumentError(
            f"{place.argument}: {place.name} cannot be written, because {existing} is not "
            f"writable ({error.strerror}). Use another path."
        ) from error
