"""Places that a user names for output: refused before any work when they would destroy something or take no files.

A destination may be a local path or any address that fsspec writes (`s3://bucket/weights.safetensors`). Files are written
under another name and renamed, so that none is ever half there.
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
    """A place that was checked: the name that the user gave, and where fsspec finds it."""

    name: str
    system: Any
    path: str
    argument: str

    @property
    def local(self) -> Path | None:
        """The path on this machine; None elsewhere."""
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
    """Check a file (or, with `folder`, a folder) that is to be written; ArgumentError when it cannot or must not be.

    Args:
        name: what the user gave.
        argument: how messages call it, such as "ddiff eval --out".
        suffix: the ending that a file must have.
        owned: tells from an existing file's bytes whether ddiff wrote it, and so may write it again; None: any may be.
    """
    place = _resolved(str(name), argument)
    if suffix and not folder and Path(place.path).suffix != suffix:
        raise ArgumentError(
            f"{argument}: the file must end in {suffix}; got {name}. Name it {name}{suffix}."
        )
    if place.local is not None:
        _check_outside_runs(place, folder)
    _check_standing(place, folder, owned)
    return place


def write_file(place: Destination, fill: Callable[[IO[bytes]], Any]) -> None:
    """Write a file by `fill(file)`, all or nothing; ArgumentError when its place takes no files."""
    try:
        with open_atomic(place.path, system=place.system) as file:
            fill(file)
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise  # told as such by the command
        raise takes_no_files(place, error) from error


def write_text(place: Destination, text: str) -> None:
    """`write_file` for UTF-8 text."""
    write_file(place, lambda file: file.write(text.encode()))


def takes_no_files(place: Destination, error: Exception) -> ArgumentError:
    """The error for a place that cannot be written to."""
    reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
    return ArgumentError(
        f"{place.argument}: {place.name} cannot be written ({reason}). Name another place."
    )


def _resolved(name: str, argument: str) -> Destination:
    import fsspec

    first = Path(name).parts[:1]
    if not name or "\0" in name:
        raise ArgumentError(f"{argument}: a path was expected; got {name!r}.")
    if "://" not in name and first and first[0].endswith(":"):
        raise ArgumentError(
            f"{argument}: {name} looks like an address that has lost a slash, as pathlib.Path leaves it. Give it as text: "
            f'"{first[0]}//...".'
        )
    try:
        system, path = fsspec.url_to_fs(
            name if "://" in name else os.path.abspath(os.path.expanduser(name))
        )
    except (ValueError, ImportError, OSError) as error:
        raise ArgumentError(
            f"{argument}: {name} cannot be written: {error}. Name a local path, or install what that address needs."
        ) from error
    return Destination(name, system, str(path).rstrip("/") or "/", argument)


def within_checkpoints(path: Path) -> Path | None:
    """The folder of checkpoints, or the checkpoint, that a resolved path lies in; None elsewhere."""
    for above in (path, *path.parents):
        if above.name in (CHECKPOINTS, REPLAY) and (above.parent / RECIPE).is_file():
            return above
        if above.name.startswith("step_") and (above / "complete.json").exists():
            return above
    return None


def _check_outside_runs(place: Destination, folder: bool) -> None:
    """Raise ArgumentError for a place inside the checkpoints of a run, or one of a run's own files."""
    path = Path(place.path)
    # of a file that is a link the link is replaced, so only what leads there is resolved
    real = path.resolve() if folder else path.parent.resolve() / path.name
    if (above := within_checkpoints(real)) is not None:
        raise ArgumentError(
            f"{place.argument}: {place.name} lies in {above}, where a checkpoint would be damaged. Name a place outside of "
            "the run's checkpoints."
        )
    if real.name in FILES and (real.parent / RECIPE).is_file():
        raise ArgumentError(
            f"{place.argument}: {place.name} is a file of the run {real.parent} itself. Name another file."
        )


def _check_standing(
    place: Destination, folder: bool, owned: Callable[[IO[bytes]], bool] | None
) -> None:
    """Raise ArgumentError for what stands there and must not be written over, and for a place that takes no files."""
    path, system = place.path, place.system
    try:
        is_folder, is_file = system.isdir(path), system.isfile(path)
        if is_file and folder:
            raise ArgumentError(
                f"{place.argument}: {place.name} is a file; a folder was expected. Name another one."
            )
        if is_folder and not folder:
            raise ArgumentError(
                f"{place.argument}: {place.name} is a folder; a file was expected. Name a file in it."
            )
        if is_file and owned is not None:
            with system.open(path, "rb") as file:
                if not owned(file):
                    raise ArgumentError(
                        f"{place.argument}: {place.name} stands there already, and ddiff did not write it. Name another "
                        "file, or delete that one."
                    )
    except (OSError, ValueError, ImportError) as error:
        if isinstance(error, ArgumentError):
            raise
        raise takes_no_files(place, error) from error
    if place.local is not None:
        _check_takes_files(place, folder)


def _check_takes_files(place: Destination, folder: bool) -> None:
    """Try the nearest folder that stands; leaves nothing behind."""
    import tempfile

    path = Path(place.path)
    start = path if folder else path.parent
    standing = next(above for above in (start, *start.parents) if os.path.lexists(above))
    try:
        with tempfile.TemporaryDirectory(prefix=".ddiff-", dir=standing):
            pass
    except OSError as error:
        raise ArgumentError(
            f"{place.argument}: {place.name} cannot be written, as {standing} takes no files ({error.strerror}). Name "
            "another place."
        ) from error
