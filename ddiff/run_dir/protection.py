"""Protection of foreign files: no run overwrites or deletes them.

A foreign file is a file in the run directory that no run wrote.
"""

from __future__ import annotations

import shutil
import sys
from collections.abc import Iterable
from pathlib import Path

from ddiff.errors import CheckpointError
from ddiff.run_dir.contents import Contents, classify_contents
from ddiff.run_dir.files import CHECKPOINTS, FIELDS, FILES, PICTURES, RECIPE

LISTED_NAMES = 5  # largest number of names in a message

# ---------------------------------------------------------------------- overwriting


def check_overwriting(contents: Contents, *, warn: bool = False) -> None:
    """Raise CheckpointError if a run would overwrite a file that ddiff did not write.

    `contents`: entries of the run directory. `warn`: whether to print a warning if a new run is
    written to a directory with files of other programs.
    """
    if contents.has_own_recipe:
        return
    if RECIPE in contents.foreign:
        raise CheckpointError(
            f"{contents.directory / RECIPE} was written or annotated by hand, and a run would "
            "overwrite the file. Set another run_dir (--set run_dir=...). If the file is the "
            "record of this run, move your comments to another file."
        )
    _check_names_free(contents.directory)
    if warn and contents.foreign:
        print(
            f"{contents.directory} already contains {format_names(contents.foreign)}, which ddiff "
            "did not write. The run is written to the same directory, and `ddiff run` with --fresh "
            "will refuse to empty the directory.",
            file=sys.stderr,
        )


def _check_names_free(directory: Path) -> None:
    """Raise CheckpointError if a directory without a recipe has a file named like a run file."""
    taken = []
    for name in FILES:
        path = directory / name
        if path.exists() or path.is_symlink():
            taken.append(name)
    taken += sorted(path.name for path in directory.glob(PICTURES))
    for name in (CHECKPOINTS, FIELDS):
        folder = directory / name
        if folder.is_symlink() or (folder.is_dir() and any(folder.iterdir())):
            # another tool wrote them; a run would delete steps beyond [train] keep
            taken.append(name)
    if taken:
        them = "this file" if len(taken) == 1 else "these files"
        raise CheckpointError(
            f"{directory} contains {format_names(taken)} but no {RECIPE} of ddiff, so the "
            f"directory is not a run, and a run would overwrite {them}. Set another run_dir "
            f"(--set run_dir=...), or move {them} away."
        )


# ---------------------------------------------------------------------- --fresh


def check_deleting(contents: Contents, source: str, inputs: Iterable[tuple[str, str]]) -> None:
    """Raise CheckpointError if the option --fresh would delete a file that no run has written.

    The option --fresh deletes the existing run in a run directory.

    Args:
        contents: entries of the run directory.
        source: path of the recipe file.
        inputs: (table, path) for each local path that the recipe reads.
    """
    directory = contents.directory
    if not directory.exists():
        return
    reason = _find_protection(directory, source)
    if reason is not None:
        raise CheckpointError(
            f"--fresh: {directory} {reason}, so nothing is deleted. Set another run_dir "
            "(--set run_dir=...), or empty the directory yourself."
        )
    for table, path in inputs:
        if directory.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise CheckpointError(
                f"--fresh: {directory} contains {path}, which this recipe reads ([{table}]), so "
                "nothing is deleted. Set another run_dir (--set run_dir=...), or move the input "
                "file elsewhere first."
            )
    if contents.names and not contents.has_own_recipe:
        raise CheckpointError(
            f"--fresh: {directory} contains {format_names(contents.names)} but no {RECIPE} of "
            "ddiff, so the directory is not a run and nothing is deleted. Set another run_dir "
            "(--set run_dir=...), or empty the directory yourself."
        )
    if contents.foreign:
        raise _foreign_error(directory, contents.foreign)


def _find_protection(directory: Path, source: str) -> str | None:
    """Return the reason why a directory must not be emptied.

    Returns None if the directory may be emptied. `source`: path of the recipe file.
    """
    real = directory.resolve()
    if directory.is_symlink():
        return f"is a symbolic link to {real}"
    here = Path.cwd().resolve()
    if real == here:
        return "is the working directory"
    if real in here.parents:
        return "holds the working directory"
    try:
        home = Path.home().resolve()
    except RuntimeError:
        home = here
    if real == home or real in home.parents:
        return "is or holds the home directory"
    if "://" not in source and real in Path(source).resolve().parents:
        return f"holds the recipe {source}"
    return None


def delete_run(directory: Path, also: Iterable[str] = ()) -> None:
    """Delete the files that a run wrote to a directory.

    `also`: names of files that the tracker of the run writes. Raises CheckpointError, and deletes
    nothing, if the directory has other files.
    """
    also = set(also)
    # Listed again under the lock: another process may have written files since the checks.
    contents = classify_contents(directory, also)
    if contents.foreign:
        raise _foreign_error(directory, contents.foreign)
    for path in contents.written:
        try:
            if not path.is_dir():
                path.unlink()
            elif path.name in also:
                # a folder of the tracker; rmtree removes links without following them
                shutil.rmtree(path)
            else:
                path.rmdir()
        except FileNotFoundError:
            continue  # another process deleted it first
        except OSError as error:
            raise CheckpointError(
                f"--fresh: {path} cannot be deleted ({error.strerror}). Delete the path manually, "
                "or set another run_dir."
            ) from error


def _foreign_error(directory: Path, foreign: list[str]) -> CheckpointError:
    """Return the CheckpointError that names the files because of which --fresh is refused."""
    files = "this entry" if len(foreign) == 1 else "these entries"
    return CheckpointError(
        f"--fresh: {directory} contains {format_names(foreign)}, which ddiff did not write, so "
        f"nothing was deleted. Move {files} away, or set another run_dir."
    )


def format_names(names: list[str]) -> str:
    """Join names as `a, b, c`, or a long list as `a, b, c, d, e and 4 more`."""
    text = ", ".join(names[:LISTED_NAMES])
    rest = len(names) - LISTED_NAMES
    return f"{text} and {rest} more" if rest > 0 else text
