"""Contents of a run directory: which entries a run wrote, and which entries are foreign."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path

from ddiff.atomic import original_name
from ddiff.run_dir.files import (
    CHECKPOINTS,
    FIELD_SHAPE,
    FIELDS,
    FILES,
    LOCK,
    METRICS,
    NORMALIZER,
    PATTERNS,
    RECIPE,
    REPLAY,
    TOKENIZER,
    VOCABULARY,
    is_own_recipe,
)

_STEP = re.compile(r"step_\d{8,}")
_STEP_FILE = re.compile(
    r"(model|optimizer|ema|random|run)(\.rank_\d{5,})?\.safetensors"
    r"|(manifest|state|complete)\.json(\.part|\.partial-[0-9a-f]{8})?"
)
_PROBE = re.compile(
    r"\.ddiff-\w+"
)  # empty folder, left by an interrupted check for write permission


@dataclass(frozen=True)
class Contents:
    """Entries of a directory, read in one listing.

    Args:
        directory: the directory.
        names: names of all entries.
        written: files and folders that a run wrote, in an order of deletion that is safe if the
            deletion is interrupted.
        foreign: names of the entries that no run wrote, relative to the directory.
        has_own_recipe: whether ddiff wrote recipe.toml and the user added no comment to the file.

    The lock file is neither in `written` nor in `foreign`.
    """

    directory: Path
    names: list[str]
    written: list[Path]
    foreign: list[str]
    has_own_recipe: bool


def classify_contents(directory: Path, also: Iterable[str] = ()) -> Contents:
    """Divide the entries of a directory into those that a run wrote and foreign entries.

    `also`: names of files that the tracker of the run writes, which count as written by the run.
    Symbolic links are not followed, and are always foreign.
    """
    entries = list(_list_entries(directory))
    written: list[Path] = []
    foreign: list[str] = []
    tracked = set(also)
    for entry in entries:
        name = original_name(entry.name)
        if entry.name == LOCK:
            continue  # this process has the lock of the directory
        if entry.is_symlink():
            foreign.append(entry.name)
        elif name in tracked or _is_own_file(entry, name):
            written.append(entry)
        elif entry.name == CHECKPOINTS and entry.is_dir():
            _classify_checkpoints(entry, directory, written, foreign)
        elif entry.name == FIELDS and entry.is_dir():
            _classify_fields(entry, directory, written, foreign)
        elif entry.name == REPLAY and entry.is_dir():
            _classify_replay(entry, directory, written, foreign)
        else:
            foreign.append(entry.name)
    recipe = directory / RECIPE
    has_own_recipe = is_own_recipe(recipe)
    if recipe in written:
        written.remove(recipe)
        if has_own_recipe:
            # Last, so that the rest of an interrupted deletion is recognized as a run.
            written.append(recipe)
        else:
            foreign.append(RECIPE)
    foreign.sort()
    return Contents(directory, [entry.name for entry in entries], written, foreign, has_own_recipe)


def _is_own_file(entry: Path, name: str) -> bool:
    """Return whether a run wrote `entry`. `name`: name of the entry without the ending `.part`."""
    if _PROBE.fullmatch(entry.name):
        return entry.is_dir() and not any(entry.iterdir())
    is_named = name in FILES or any(fnmatchcase(name, pattern) for pattern in PATTERNS)
    return entry.is_file() and is_named


def _classify_fields(folder: Path, root: Path, written: list[Path], foreign: list[str]) -> None:
    """Classify the folder with one folder per field."""
    for field in _list_entries(folder):
        if field.is_symlink() or not field.is_dir():
            foreign.append(str(field.relative_to(root)))
            continue
        for entry in _list_entries(field):
            is_own = original_name(entry.name) in (FIELD_SHAPE, TOKENIZER, VOCABULARY, NORMALIZER)
            if is_own and entry.is_file() and not entry.is_symlink():
                written.append(entry)
            else:
                foreign.append(str(entry.relative_to(root)))
        written.append(field)
    written.append(folder)


def _classify_checkpoints(
    folder: Path, root: Path, written: list[Path], foreign: list[str]
) -> None:
    for step in _list_entries(folder):
        if step.is_symlink() or not (_STEP.fullmatch(step.name) and step.is_dir()):
            foreign.append(str(step.relative_to(root)))
            continue
        # complete.json is first, so that a partly deleted step is not a complete checkpoint
        entries = sorted(_list_entries(step), key=lambda path: path.name != "complete.json")
        for entry in entries:
            if _STEP_FILE.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink():
                written.append(entry)
            else:
                foreign.append(str(entry.relative_to(root)))
        written.append(step)
    written.append(folder)


def _classify_replay(folder: Path, root: Path, written: list[Path], foreign: list[str]) -> None:
    for entry in _list_entries(folder):
        if entry.is_symlink():
            foreign.append(str(entry.relative_to(root)))
        elif entry.name == CHECKPOINTS and entry.is_dir():
            _classify_checkpoints(entry, root, written, foreign)
        elif original_name(entry.name) == METRICS and entry.is_file():
            written.append(entry)
        else:
            foreign.append(str(entry.relative_to(root)))
    written.append(folder)


def _list_entries(directory: Path) -> Iterator[Path]:
    """Yield the entries of a directory, sorted by name.

    Yields nothing if the directory does not exist.
    """
    yield from sorted(directory.iterdir()) if directory.is_dir() else ()
