"""Check and write output files that a user names, by a local path or fsspec address.

A place is checked before any work, and refused if writing there would destroy something or is not
possible.
"""

from __future__ import annotations

import errno
import os
from collections.abc import Callable
from pathlib import Path
from typing import IO, Any, NamedTuple

from ddiff.atomic import open_atomic
from ddiff.errors import ArgumentError
from ddiff.run_dir.files import CHECKPOINTS, FILES, RECIPE, REPLAY


class Destination(NamedTuple):
    """A place for output that has been checked.

    Args:
        name: the place as the user wrote it.
        system: the fsspec file system.
        path: the path in that file system.
        argument: the option or argument that named it, for messages.
    """

    name: str
    system: Any
    path: str
    argument: str

    @property
    def local(self) -> Path | None:
        """Path on this machine; None if the place is elsewhere."""
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
    """Check a file (or, with `folder`, a folder) before it is written.

    Args:
        name: the place as the user wrote it.
        argument: the option or argument that named it, such as "ddiff eval --out".
        suffix: required ending of a file.
        owned: returns whether ddiff wrote an existing file, so that it may be replaced; None: any
            file may be.

    Raises ArgumentError if the place cannot or must not be written.
    """
    place = _resolve(str(name), argument)
    if suffix and not folder and Path(place.path).suffix != suffix:
        raise ArgumentError(
            f"{argument}: the file must end in {suffix}; got {name}. Name it {name}{suffix}."
        )
    if place.local is not None:
        _check_outside_runs(place, folder)
    _check_existing(place, folder, owned)
    if place.local is not None:
        _check_writable(place, folder)
    return place


def write_file(place: Destination, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write a file atomically by `fill(file)`; ArgumentError if the place is not writable."""
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


def unwritable_error(place: Destination, error: Exception) -> ArgumentError:
    """Make the error for a place that cannot be written."""
    system_reason = error.strerror if isinstance(error, OSError) else None
    reason = system_reason or str(error) or type(error).__name__
    return ArgumentError(
        f"{place.argument}: {place.name} cannot be written ({reason}). Name another place."
    )


def find_enclosing_checkpoint(path: Path) -> Path | None:
    """Find the checkpoint, or folder of checkpoints, that contains a resolved path; else None."""
    for above in (path, *path.parents):
        if above.name in (CHECKPOINTS, REPLAY) and (above.parent / RECIPE).is_file():
            return above
        if above.name.startswith("step_") and (above / "complete.json").exists():
            return above
    return None


def _resolve(name: str, argument: str) -> Destination:
    """Find the file system and the path of a name."""
    import fsspec  # here, so that importing this module stays quick

    if not name or "\0" in name:
        raise ArgumentError(f"{argument}: a path was expected; got {name!r}.")
    is_address = "://" in name
    first = Path(name).parts[:1]
    if not is_address and first and first[0].endswith(":"):
        raise ArgumentError(
            f"{argument}: {name} looks like an address that has lost a slash, as pathlib.Path "
            f'leaves it. Give it as text: "{first[0]}//...".'
        )
    try:
        full_name = name if is_address else os.path.abspath(os.path.expanduser(name))
        system, path = fsspec.url_to_fs(full_name)
    except (ValueError, ImportError, OSError) as error:
        raise ArgumentError(
            f"{argument}: {name} cannot be written: {error}. Name a local path, or install what "
            "that address needs."
        ) from error
    return Destination(name, system, str(path).rstrip("/") or "/", argument)


def _check_outside_runs(place: Destination, folder: bool) -> None:
    """Check that a place is neither inside checkpoints nor one of a run's own files."""
    path = Path(place.path)
    # writing to a link replaces the link, so for a file only the folders above it are resolved
    real = path.resolve() if folder else path.parent.resolve() / path.name
    above = find_enclosing_checkpoint(real)
    if above is not None:
        raise ArgumentError(
            f"{place.argument}: {place.name} lies in {above}, where a checkpoint would be damaged. "
            "Name a place outside of the run's checkpoints."
        )
    if real.name in FILES and (real.parent / RECIPE).is_file():
        raise ArgumentError(
            f"{place.argument}: {place.name} is a file of the run {real.parent} itself. Name "
            "another file."
        )


def _check_existing(
    place: Destination, folder: bool, owned: Callable[[IO[bytes]], bool] | None
) -> None:
    """Check that an existing entry has the right type and may be replaced."""
    try:
        is_folder = place.system.isdir(place.path)
        is_file = place.system.isfile(place.path)
        if is_file and folder:
            raise ArgumentError(
                f"{place.argument}: {place.name} is a file; a folder was expected. Name another "
                "one."
            )
        if is_folder and not folder:
            raise ArgumentError(
                f"{place.argument}: {place.name} is a folder; a file was expected. Name a file in "
                "it."
            )
        if is_file and owned is not None:
            with place.system.open(place.path, "rb") as file:
                is_owned = owned(file)
            if not is_owned:
                raise ArgumentError(
                    f"{place.argument}: {place.name} exists already, and ddiff did not write it. "
                    "Name another file, or delete that one."
                )
    except ArgumentError:  # which is a ValueError too
        raise
    except (OSError, ValueError, ImportError) as error:
        raise unwritable_error(place, error) from error


def _check_writable(place: Destination, folder: bool) -> None:
    """Write into the nearest existing folder and clean up, because permissions do not tell all."""
    import tempfile

    path = Path(place.path)
    start = path if folder else path.parent
    existing = next(above for above in (start, *start.parents) if os.path.lexists(above))
    try:
        with tempfile.TemporaryDirectory(prefix=".ddiff-", dir=existing):
            pass
    except OSError as error:
        raise ArgumentError(
            f"{place.argument}: {place.name} cannot be written, as {existing} takes no files "
            f"({error.strerror}). Name another place."
        ) from error
