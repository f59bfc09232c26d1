"""Find the files of a directory that a run wrote, and delete only these files."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from ddiff.atomic import original_name
from ddiff.errors import CheckpointError
from ddiff.run_dir.files import (
    CHECKPOINTS,
    FILES,
    LOCK,
    METRICS,
    RECIPE,
    REPLAY,
    is_own_recipe,
)

LISTED_NAMES = 5  # largest number of names in a message

_STEP = re.compile(r"step_\d{8,}")
_STEP_FILE = re.compile(
    r"(model|optimizer|ema|random|run)(\.rank_\d{5,})?\.safetensors"
    r"|(manifest|state|complete)\.json(\.part|\.partial-[0-9a-f]{8})?"
)
_PROBE = re.compile(
    r"\.ddiff-\w+"
)  # empty folder, left by an interrupted check for write permission


class Contents(NamedTuple):
    """Entries of a directory.

    Args:
        written: files and folders that a run wrote, in a safe order of deletion.
        foreign: names of all other entries, relative to the directory.
    """

    written: list[Path]
    foreign: list[str]


def classify_contents(directory: Path, also: Iterable[str] = ()) -> Contents:
    """Divide the entries of a directory into those that a run wrote and foreign entries.

    The lock file is left out. `also`: names of files that the tracker of the run writes. Symbolic
    links are not followed, and are always foreign.
    """
    found = Contents([], [])
    tracked = set(also)
    for entry in _list_entries(directory):
        name = original_name(entry.name)
        if entry.name == LOCK:
            continue  # this process has the lock of the directory
        if entry.is_symlink():
            found.foreign.append(entry.name)
        elif name in tracked:
            found.written.append(entry)
        elif entry.name == RECIPE and not is_own_recipe(entry):
            found.foreign.append(entry.name)
        elif _is_own_file(entry, name):
            found.written.append(entry)
        elif entry.name == CHECKPOINTS and entry.is_dir():
            _classify_checkpoints(entry, directory, found)
        elif entry.name == REPLAY and entry.is_dir():
            _classify_replay(entry, directory, found)
        else:
            found.foreign.append(entry.name)
    # The recipe is last, so that the rest of an interrupted deletion is recognized as a run.
    found.written.sort(key=lambda path: path == directory / RECIPE)
    found.foreign.sort()
    return found


def delete_run(directory: Path, also: Iterable[str] = ()) -> None:
    """Delete the files that a run wrote to a directory.

    Raises CheckpointError, and deletes nothing, if the directory has other files.
    """
    also = set(also)
    written, foreign = classify_contents(directory, also)
    if foreign:
        raise CheckpointError(foreign_message(directory, foreign))
    for path in written:
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


def foreign_message(directory: Path, foreign: list[str]) -> str:
    """Return the error message if --fresh would delete files that ddiff did not write."""
    files = "this entry" if len(foreign) == 1 else "these entries"
    return (
        f"--fresh: {directory} contains {format_names(foreign)}, which ddiff did not write, so "
        f"nothing was deleted. Move {files} away, or set another run_dir."
    )


def format_names(names: list[str]) -> str:
    """Join names as `a, b, c`, or a long list of names as `a, b, c, d, e and 4 more`."""
    text = ", ".join(names[:LISTED_NAMES])
    rest = len(names) - LISTED_NAMES
    return f"{text} and {rest} more" if rest > 0 else text


def _is_own_file(entry: Path, name: str) -> bool:
    """Return whether a run wrote `entry`. `name`: name of the entry without the ending `.part`."""
    if _PROBE.fullmatch(entry.name):
        return entry.is_dir() and not any(entry.iterdir())
    return name in FILES and entry.is_file()


def _classify_checkpoints(folder: Path, root: Path, found: Contents) -> None:
    for step in _list_entries(folder):
        if step.is_symlink() or not (_STEP.fullmatch(step.name) and step.is_dir()):
            found.foreign.append(str(step.relative_to(root)))
            continue
        # complete.json is first, so that a partly deleted step is not a complete checkpoint
        entries = sorted(_list_entries(step), key=lambda path: path.name != "complete.json")
        for entry in entries:
            if _STEP_FILE.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
                found.written.append(entry)
            else:
                found.foreign.append(str(entry.relative_to(root)))
        found.written.append(step)
    found.written.append(folder)


def _classify_replay(folder: Path, root: Path, found: Contents) -> None:
    for entry in _list_entries(folder):
        if entry.is_symlink():
            found.foreign.append(str(entry.relative_to(root)))
        elif entry.name == CHECKPOINTS and entry.is_dir():
            _classify_checkpoints(entry, root, found)
        elif original_name(entry.name) == METRICS and entry.is_file():
            found.written.append(entry)
        else:
            found.foreign.append(str(entry.relative_to(root)))
    found.written.append(folder)


def _list_entries(directory: Path) -> Iterator[Path]:
    """Yield the entries of a directory, sorted by name. Yield nothing without a directory."""
    yield from sorted(directory.iterdir()) if directory.is_dir() else ()
