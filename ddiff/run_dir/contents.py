"""Classify files of a directory by whether a run wrote them, and delete only those."""

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

LISTED_NAMES = 5  # that a message lists

_STEP = re.compile(r"step_\d{8,}")
_STEP_FILE = re.compile(
    r"(model|optimizer|ema|random|run)(\.rank_\d{5,})?\.safetensors"
    r"|(manifest|state|complete)\.json(\.part|\.partial-[0-9a-f]{8})?"
)
_PROBE = re.compile(r"\.ddiff-\w+")  # the empty folder of a writability check that was killed


class Contents(NamedTuple):
    """Entries of a directory.

    Args:
        written: files and folders that a run wrote, in the order in which they may be deleted.
        foreign: names of all others, relative to the directory.
    """

    written: list[Path]
    foreign: list[str]


def classify_contents(directory: Path, also: Iterable[str] = ()) -> Contents:
    """Classify the entries of a directory, without its lock.

    `also` are names that the run's tracker writes there. Symbolic links are always foreign, and
    they are not followed.
    """
    found = Contents([], [])
    tracked = set(also)
    for entry in _list_entries(directory):
        name = original_name(entry.name)
        if entry.name == LOCK:
            continue  # its lock is held by the process that writes here
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
    # The recipe goes last: it identifies what is left of an interrupted deletion as a run.
    found.written.sort(key=lambda path: path == directory / RECIPE)
    found.foreign.sort()
    return found


def delete_run(directory: Path, also: Iterable[str] = ()) -> None:
    """Delete what a run wrote to a directory; if it holds anything else, CheckpointError."""
    also = set(also)
    written, foreign = classify_contents(directory, also)
    if foreign:
        raise CheckpointError(foreign_message(directory, foreign))
    for path in written:
        try:
            if not path.is_dir():
                path.unlink()
            elif path.name in also:
                # a folder of the tracker; links inside are removed, not followed
                shutil.rmtree(path)
            else:
                path.rmdir()
        except FileNotFoundError:
            continue  # another process deleted it first
        except OSError as error:
            raise CheckpointError(
                f"--fresh: {path} cannot be deleted ({error.strerror}). Delete it yourself, or "
                "name another run_dir."
            ) from error


def foreign_message(directory: Path, foreign: list[str]) -> str:
    """Write the message for a --fresh that would delete files of others."""
    pronoun = "it" if len(foreign) == 1 else "them"
    return (
        f"--fresh: {directory} holds {format_names(foreign)}, which ddiff did not write, so "
        f"nothing there is deleted. Move {pronoun} away, or name another run_dir."
    )


def format_names(names: list[str]) -> str:
    """Format names as `a, b, c`, or with `and 4 more` if there are many."""
    text = ", ".join(names[:LISTED_NAMES])
    rest = len(names) - LISTED_NAMES
    return f"{text} and {rest} more" if rest > 0 else text


def _is_own_file(entry: Path, name: str) -> bool:
    """Return whether a run writes that entry; `name` is its name once it is complete."""
    if _PROBE.fullmatch(entry.name):
        return entry.is_dir() and not any(entry.iterdir())
    return name in FILES and entry.is_file()


def _classify_checkpoints(folder: Path, root: Path, found: Contents) -> None:
    for step in _list_entries(folder):
        if step.is_symlink() or not (_STEP.fullmatch(step.name) and step.is_dir()):
            found.foreign.append(str(step.relative_to(root)))
            continue
        # the marker first, so that a step whose deletion is interrupted is not a checkpoint
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
    """Iterate over the entries of a directory by name; none if it does not exist."""
    yield from sorted(directory.iterdir()) if directory.is_dir() else ()
