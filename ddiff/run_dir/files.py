"""Files of a run directory: their names, one reader for all of them, and which files a run has written.

Imports no torch, so that `ddiff compare` and mistakes are quick.
"""

from __future__ import annotations

import json
import re
import shutil
import tomllib
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from ddiff.atomic import original_name
from ddiff.errors import CheckpointError

RECIPE, ENVIRONMENT = "recipe.toml", "environment.json"
TOKENIZER, VOCABULARY = "tokenizer.json", "vocabulary.safetensors"
METRICS = "metrics.jsonl"
EVALUATION, SAMPLES, SAMPLING = "evaluation.json", "samples.jsonl", "sampling.json"
CHECKPOINTS = "checkpoints"
REPLAY = "replay"  # the folder of `--verify-resume` while it lasts
LOCK = ".lock"

FILES = (RECIPE, ENVIRONMENT, TOKENIZER, VOCABULARY, METRICS, EVALUATION, SAMPLES, SAMPLING)
REPEATABLE = (EVALUATION, SAMPLES, SAMPLING)  # the same command writes them again
HEADER = "Every key of this recipe with its value, as ddiff"  # begins the first line of a resolved recipe

_STEP = re.compile(r"step_\d{8,}")
_OF_STEP = re.compile(
    r"(model|optimizer|ema|random|run)(\.rank_\d{5,})?\.safetensors|(manifest|state|complete)\.json(\.part|\.partial-[0-9a-f]{8})?"
)
_PROBE = re.compile(r"\.ddiff-\w+")  # the empty folder of a check that was killed


# ---------------------------------------------------------------------- reading

NUMBER = (int, float)
"""JSON's numbers; `true` is none of them."""

Shape = Mapping[str, Any]
"""Key -> types of its value: a type, a tuple of them (None: null), or [types] for a list of such values."""

OBJECTS: dict[str, Shape] = {
    ENVIRONMENT: {"parameters": int, "given": {}, "init": ({}, None)},
    EVALUATION: {
        "step": int,
        "unit": str,
        "bound": str,
        "protocol": {},
        "baselines": {"*": NUMBER},
        "interval": ([NUMBER], None),
        "ppl": NUMBER,
        "bits_per_byte": (*NUMBER, None),
        "documents": int,
    },
    SAMPLING: {"step": int, "seconds": NUMBER, "tokens": int},
    SAMPLES: {"step": int, "index": int, "text": str, "ids": [int], "nfe": NUMBER},
    METRICS: {"step": int, "tokens": NUMBER, "seconds": NUMBER},
    RECIPE: {
        "name": str,
        "seed": int,
        "process": ({"kind": str}, None),
        "objective": {"kind": str, "times": ({"kind": str}, None)},
        "sample": {"steps": int, "sampler": {"kind": str}},
    },
}
"""What a reader may rely on, by file; the lines of `.jsonl` files have the shape each."""


def read_text(path: Path) -> str:
    """The UTF-8 text of a file of a run; CheckpointError when it cannot be read as one."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise damaged(
            path, f"it is not UTF-8 text ({error.reason} at byte {error.start})"
        ) from error
    except IsADirectoryError as error:
        raise damaged(path, "it is a folder, and a run has a file there") from error
    except OSError as error:
        raise CheckpointError(
            f"{path} cannot be read ({error.strerror}). Make it readable, or restore it from a copy."
        ) from error


def read_json(path: Path, *, partly: bool = False) -> dict[str, Any]:
    """The object in a JSON file of a run, {} without the file.

    With `partly`, keys that the file's shape asks for may be missing. Raises CheckpointError, which names the file and
    the way out, for anything else than such an object.
    """
    if not path.exists():
        return {}
    found = _parsed(read_text(path), path)
    _check_shape(found, OBJECTS.get(path.name, {}), path, partly=partly)
    if path.name == EVALUATION and not partly:
        _check_shape(found, _figures(found), path)
        interval = found.get("interval")
        if interval is not None and len(interval) != 2:
            raise damaged(path, f"an interval has two ends, got {_shown(interval)}")
    return found


def _figures(found: Mapping[str, Any]) -> Shape:
    """The shape of an evaluation's figures, whose names say bound and unit."""
    unit = found["unit"]
    return {
        f"{found['bound'].lower()}_nats_per_{unit}": NUMBER,
        f"terms_nats_per_{unit}": {"*": NUMBER},
        f"parts_nats_per_{unit}": {"*": NUMBER},
        f"{unit}s": int,
    }


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The objects in a `.jsonl` file of a run, one a line, none without the file. Raises as `read_json` does."""
    if not path.exists():
        return []
    lines = read_text(path).split("\n")
    found = []
    for number, line in enumerate(lines[:-1] if lines[-1] == "" else lines, start=1):
        where = f" in line {number}"
        entry = _parsed(line, path, where)
        _check_shape(entry, OBJECTS.get(path.name, {}), path, where)
        found.append(entry)
    return found


def read_recipe_tree(path: Path) -> dict[str, Any]:
    """The tables of a run's recipe as they stand in the file; CheckpointError when it holds none."""
    try:
        found = tomllib.loads(read_text(path))
    except ValueError as error:
        raise damaged(path, str(error)) from error
    except RecursionError as error:
        raise damaged(path, "it is nested too deeply") from error
    _check_shape(found, OBJECTS[RECIPE], path)
    return found


def damaged(path: Path, what: str) -> CheckpointError:
    """The error for a file of a run that is not what the run wrote."""
    return CheckpointError(f"{path} is damaged: {what}. {_remedy(path)}")


def check_kinds(directory: Path) -> None:
    """Raise CheckpointError when a folder stands in the place of a file of a run, or a file in that of a folder."""
    for name in FILES:
        path = directory / name
        if path.is_dir():
            raise damaged(path, "it is a folder, and a run has a file there")
    path = directory / CHECKPOINTS
    if path.exists() and not path.is_dir():
        raise CheckpointError(
            f"{path} is a file, and a run has a folder there. Move it away and repeat the command."
        )


def check_readable(directory: Path) -> None:
    """Raise CheckpointError when a file that the stages of a run read back is damaged, before any of them works."""
    for name in (ENVIRONMENT, EVALUATION, SAMPLING):
        read_json(directory / name)
    read_lines(directory / SAMPLES)


def _remedy(path: Path) -> str:
    if path.name in REPEATABLE:
        return "Delete it, and `ddiff run` with the run's recipe writes it again."
    if path.name == RECIPE and not is_own_recipe(path):
        return "Restore it from a copy, or train again under another name."
    if path.is_dir():
        return "Move the folder away and restore the file from a copy, or repeat `ddiff run` with --fresh after that."
    return "Restore it from a copy, or start over with `ddiff run` and --fresh."


def _parsed(text: str, path: Path, where: str = "") -> dict[str, Any]:
    try:
        found = json.loads(text)
    except ValueError as error:
        raise damaged(path, f"no JSON{where} ({error})") from error
    except RecursionError as error:
        raise damaged(path, f"JSON{where} that is nested too deeply") from error
    if not isinstance(found, dict):
        raise damaged(path, f"a JSON object was expected{where}, got {_shown(found)}")
    return found


def _check_shape(
    found: Mapping[str, Any], shape: Shape, path: Path, where: str = "", *, partly: bool = False
) -> None:
    for key, types in shape.items():
        if key == "*":
            wrong = [name for name, value in found.items() if not _fits(value, types)]
        elif key not in found:
            if partly or _fits(None, types):
                continue
            raise damaged(path, f'the key "{key}" is missing{where}')
        else:
            wrong = [] if _fits(found[key], types) else [key]
        if wrong:
            raise damaged(
                path, f'the key "{wrong[0]}"{where} has the value {_shown(found[wrong[0]])}'
            )


def _fits(value: Any, types: Any) -> bool:
    if isinstance(types, tuple):
        return any(_fits(value, one) for one in types)
    if isinstance(types, Mapping):
        return isinstance(value, dict) and all(
            all(_fits(entry, one) for entry in value.values())
            if key == "*"
            else _fits(value.get(key), one)
            for key, one in types.items()
        )
    if isinstance(types, list):
        return isinstance(value, list) and all(_fits(entry, types[0]) for entry in value)
    if types is None:
        return value is None
    return isinstance(value, types) and not (isinstance(value, bool) and types is not bool)


def _shown(value: Any) -> str:
    text = json.dumps(value, default=str)
    return text if len(text) <= 60 else f"{text[:57]}..."


# ---------------------------------------------------------------------- what a run has written


class Contents(NamedTuple):
    """What stands in a directory: `written` by a run, in the order in which it may be deleted, and `foreign` names."""

    written: list[Path]
    foreign: list[str]


def is_own_recipe(path: Path) -> bool:
    """Whether a recipe.toml is one that ddiff wrote and that nobody has annotated."""
    if path.is_symlink() or not path.is_file():
        return False
    try:
        lines = path.read_bytes().splitlines()
    except OSError:
        return False
    comments = [line for line in lines if line.lstrip().startswith(b"#")]
    return bool(lines) and lines[0].startswith(f"# {HEADER}".encode()) and len(comments) == 1


def contents(directory: Path, also: Iterable[str] = ()) -> Contents:
    """Sort what stands in a directory, its lock left out; `also` are names there that the run's tracker has written.

    Symbolic links are foreign wherever they stand, and never followed.
    """
    written: list[Path] = []
    foreign: list[str] = []
    tracked = set(also)
    for entry in _entries(directory):
        name = original_name(entry.name)
        if entry.name == LOCK:
            continue  # held by whoever writes here; it goes with the process
        if entry.is_symlink():
            foreign.append(entry.name)
        elif name in tracked:
            written.append(entry)
        elif entry.name == RECIPE:
            if is_own_recipe(entry):
                written.append(entry)
            else:
                foreign.append(entry.name)
        elif _is_own_file(entry, name):
            written.append(entry)
        elif entry.name == CHECKPOINTS and entry.is_dir():
            _sort_checkpoints(entry, directory, written, foreign)
        elif entry.name == REPLAY and entry.is_dir():
            _sort_replay(entry, directory, written, foreign)
        else:
            foreign.append(entry.name)
    # The recipe goes last: what is left of a deletion that was cut short is still known for a run.
    written.sort(key=lambda path: path == directory / RECIPE)
    return Contents(written, sorted(foreign))


def remove(directory: Path, also: Iterable[str] = ()) -> None:
    """Delete what a run has written to a directory, and nothing else; CheckpointError when something else is there."""
    written, foreign = contents(directory, also)
    if foreign:
        raise CheckpointError(foreign_refusal(directory, foreign))
    for path in written:
        try:
            if not path.is_dir():
                path.unlink()
            elif path.name in also:
                shutil.rmtree(path)  # of a tracker; links within are removed, not followed
            else:
                path.rmdir()
        except FileNotFoundError:
            continue  # another process was quicker
        except OSError as error:
            raise CheckpointError(
                f"--fresh: {path} cannot be deleted ({error.strerror}). Delete it yourself, or name another run_dir."
            ) from error


def foreign_refusal(directory: Path, foreign: list[str]) -> str:
    """The message for a --fresh that would delete what no run has written."""
    return (
        f"--fresh: {directory} holds {listed(foreign)}, which ddiff did not write, so nothing there is deleted. Move "
        f"{'it' if len(foreign) == 1 else 'them'} away, or name another run_dir."
    )


def listed(names: list[str]) -> str:
    """`a, b, c and 4 more`."""
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more


def _is_own_file(entry: Path, name: str) -> bool:
    """Whether a run writes what stands at `entry`; `name` is its name once it is whole."""
    if _PROBE.fullmatch(entry.name):
        return entry.is_dir() and not any(entry.iterdir())
    return name in FILES and entry.is_file()


def _sort_checkpoints(place: Path, root: Path, written: list[Path], foreign: list[str]) -> None:
    """The folder of checkpoints: each step's marker goes first, so that half of a step counts for nothing."""
    for step in _entries(place):
        if step.is_symlink() or not (_STEP.fullmatch(step.name) and step.is_dir()):
            foreign.append(str(step.relative_to(root)))
            continue
        entries = sorted(_entries(step), key=lambda path: path.name != "complete.json")
        for entry in entries:
            is_own = _OF_STEP.fullmatch(entry.name) and entry.is_file() and not entry.is_symlink()
            if is_own:
                written.append(entry)
            else:
                foreign.append(str(entry.relative_to(root)))
        written.append(step)
    written.append(place)


def _sort_replay(place: Path, root: Path, written: list[Path], foreign: list[str]) -> None:
    for entry in _entries(place):
        if entry.is_symlink():
            foreign.append(str(entry.relative_to(root)))
        elif entry.name == CHECKPOINTS and entry.is_dir():
            _sort_checkpoints(entry, root, written, foreign)
        elif original_name(entry.name) == METRICS and entry.is_file():
            written.append(entry)
        else:
            foreign.append(str(entry.relative_to(root)))
    written.append(place)


def _entries(directory: Path) -> Iterator[Path]:
    """What stands in a directory, by name; nothing where there is none."""
    yield from sorted(directory.iterdir()) if directory.is_dir() else ()
