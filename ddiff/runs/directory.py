"""Run directory: checks before a run, the lock, and the record of recipe and components."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ddiff import __version__
from ddiff.atomic import NO_LOCKS, lock_file, original_name, write_atomic
from ddiff.checkpoint.checkpoints import Checkpoint, Checkpoints
from ddiff.errors import ArgumentError, CheckpointError, DdiffError, find_disk_full
from ddiff.recipe.model import Recipe, diff_recipes
from ddiff.recipe.resolve import parse_recipe
from ddiff.run_dir.contents import classify_contents, foreign_message, format_names
from ddiff.run_dir.destination import find_enclosing_checkpoint
from ddiff.run_dir.files import (
    CHECKPOINTS,
    ENVIRONMENT,
    FILES,
    LOCK,
    RECIPE,
    TOKENIZER,
    VOCABULARY,
    check_entry_types,
    check_readable,
    is_own_recipe,
    read_json,
    read_recipe_tree,
    read_text,
)
from ddiff.run_dir.identity import check_recorded, recorded_overrides
from ddiff.runs.build import Overrides

if TYPE_CHECKING:
    from ddiff.runs.run import Run
    from ddiff.training.protocols import Backend

Change = tuple[str, Any, Any]
"""Dotted key, old value, new value."""

PATIENCE = 5.0  # seconds to wait for the lock: a killed process may take a moment to release it

# ---------------------------------------------------------------------- checks before a run


def check_directory(directory: Path, recipe: Recipe, overrides: Overrides, fresh: bool) -> None:
    """Raise an error if a run of the recipe must not be written to the directory.

    If `fresh` is True, raise an error if the directory must not be emptied. A run can resume only
    if its recipe equals the recorded recipe, except for run_dir, [backend], [evaluate] every, and a
    larger number [train] steps. A file that ddiff did not write is never overwritten or deleted.
    """
    check_local(recipe.run_dir)
    check_writable(directory)
    if fresh:
        check_fresh(directory, recipe)
        return
    check_entry_types(directory)
    _check_not_written_over(directory)
    if not (directory / RECIPE).is_file():
        return
    check_readable(directory)
    newest = Checkpoints(str(directory / CHECKPOINTS)).newest()
    if newest is None:
        return  # nothing is lost: no checkpoint was written yet
    check_recorded(directory, newest.state, training=True)
    changed = _changed_keys(directory, newest, recipe, overrides)
    if changed:
        raise CheckpointError(_explain_changes(directory, changed))


def _changed_keys(
    directory: Path, newest: Checkpoint, recipe: Recipe, overrides: Overrides
) -> list[Change]:
    """List the keys in which the recipe differs from the recorded recipe, as (key, old, new)."""
    changed = []
    for key, old, new in diff_recipes(_read_recorded(directory), recipe.to_dict()):
        if not _may_change(key, old, new):
            changed.append((key, old, new))
    given = recorded_overrides(newest.state)
    if given is None:  # an earlier version recorded the overrides in environment.json
        given = read_json(directory / ENVIRONMENT).get("given", {})
    for key, old, new in diff_recipes(given, overrides.to_dict()):
        changed.append((f"given {key}", old, new))
    return changed


def _may_change(key: str, old: Any, new: Any) -> bool:
    """Return True if a run can resume with the new value of this key."""
    if key == "train.steps":
        return isinstance(old, int) and new >= old
    return key in ("run_dir", "evaluate.every") or key.startswith("backend.")


def _explain_changes(directory: Path, changed: Sequence[Change]) -> str:
    if [key for key, _, _ in changed] == ["train.steps"]:
        _, old, new = changed[0]
        return (
            f"{directory} is a run of {old} steps (train.steps: was {old}, is {new}). To resume, "
            f"set train.steps >= {old}. To use the trained run, call `ddiff eval {directory}`, "
            f'`ddiff sample {directory}` or ddiff.load("{directory}"). To start over, use --fresh.'
        )
    lines = "\n".join(f"  {key}: was {old!r}, is {new!r}" for key, old, new in changed)
    tables = {key.split(".")[0] for key, _, _ in changed}
    if tables <= {"evaluate", "sample"}:
        remedy = (
            "These keys do not affect training. To use other settings, call "
            f"`ddiff eval {directory} --set ...` or `ddiff sample {directory} --set ...`. To make "
            "a separate run, use --set name=..."
        )
    else:
        remedy = (
            "Give the new run another name (--set name=...), or delete the trained run and start "
            "over with --fresh. Only train.steps may grow and [backend] may change on resuming."
        )
    return f"{directory} was made with another recipe. Changed keys:\n{lines}\n{remedy}"


def check_local(run_dir: str) -> None:
    """Raise ArgumentError for a run directory that is a URL or lies inside a checkpoint folder."""
    if "://" in run_dir:
        raise ArgumentError(
            f"run_dir must be a directory of this machine; got the URL {run_dir}. Set a local "
            "directory (--set run_dir=...); remote storage must be mounted first."
        )
    run = find_enclosing_checkpoint(Path(run_dir).resolve())
    if run is not None:
        raise ArgumentError(
            f"run_dir must not be inside the checkpoints of a run; got {run_dir}, inside {run}. "
            "Set another directory: --set run_dir=..."
        )


def check_writable(directory: Path) -> None:
    """Raise CheckpointError if the directory is not writable. The check leaves no file behind."""
    places = (directory, *directory.absolute().parents)
    existing = next(place for place in places if os.path.exists(place))
    try:
        with tempfile.TemporaryDirectory(prefix=".ddiff-", dir=existing):
            pass
    except OSError as error:
        raise CheckpointError(
            f"run_dir must be a writable directory; got {directory}, but {existing} cannot be "
            f"written ({error.strerror}). Set another directory: --set run_dir=..."
        ) from error


def _check_not_written_over(directory: Path) -> None:
    """Raise CheckpointError if a run would overwrite a file that ddiff did not write."""
    own = directory / RECIPE
    if own.exists() or own.is_symlink():
        if is_own_recipe(own):
            return
        if Checkpoints(str(directory / CHECKPOINTS)).steps():
            read_recipe_tree(own)  # the damaged record of a run has another error
        raise CheckpointError(
            f"{own} was written or annotated by hand, and a run would overwrite the file. Set "
            "another run_dir (--set run_dir=...). If the file is the record of this run, move your "
            "comments to another file."
        )
    taken = []
    for name in FILES:
        path = directory / name
        if path.exists() or path.is_symlink():
            taken.append(name)
    checkpoints = directory / CHECKPOINTS
    if checkpoints.is_symlink() or (checkpoints.is_dir() and any(checkpoints.iterdir())):
        taken.append(
            CHECKPOINTS
        )  # another tool wrote them; a run would delete steps beyond [train] keep
    if taken:
        them = "this file" if len(taken) == 1 else "these files"
        raise CheckpointError(
            f"{directory} contains {format_names(taken)} but no {RECIPE} of ddiff, so the "
            f"directory is not a run, and a run would overwrite {them}. Set another run_dir "
            f"(--set run_dir=...), or move {them} away."
        )


# ---------------------------------------------------------------------- --fresh


def check_fresh(directory: Path, recipe: Recipe) -> None:
    """Raise CheckpointError if --fresh would delete anything that no run has written."""
    if not directory.exists():
        return
    reason = _find_protection(directory, recipe.source)
    if reason is not None:
        raise CheckpointError(
            f"--fresh: {directory} {reason}, so nothing is deleted. Set another run_dir "
            "(--set run_dir=...), or empty the directory yourself."
        )
    for table, path in _input_paths(recipe):
        if directory.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise CheckpointError(
                f"--fresh: {directory} contains {path}, which this recipe reads ([{table}]), so "
                "nothing is deleted. Set another run_dir (--set run_dir=...), or move the input "
                "file elsewhere first."
            )
    there = sorted(path.name for path in directory.iterdir())
    if there and not is_own_recipe(directory / RECIPE):
        raise CheckpointError(
            f"--fresh: {directory} contains {format_names(there)} but no {RECIPE} of ddiff, so the "
            "directory is not a run and nothing is deleted. Set another run_dir "
            "(--set run_dir=...), or empty the directory yourself."
        )
    foreign = classify_contents(directory, tracked_names(recipe)).foreign
    if foreign:
        raise CheckpointError(foreign_message(directory, foreign))


def _find_protection(directory: Path, recipe: str) -> str | None:
    """Return the reason why a directory must not be emptied, or None if it may be emptied."""
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
    if "://" not in recipe and real in Path(recipe).resolve().parents:
        return f"holds the recipe {recipe}"
    return None


def _input_paths(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield (table, path) for each local path that a recipe reads."""
    for table, component in recipe.components().items():
        for path in component.input_paths():
            if "://" not in path:
                yield table, path
    init = recipe.train.init
    if init is not None and init.run is not None:
        yield "train.init", init.run


def tracked_names(recipe: Recipe) -> tuple[str, ...]:
    """Return the names of files that the tracker of the recipe writes to a run directory."""
    return recipe.tracker.members.writes


def print_foreign(directory: Path, recipe: Recipe) -> None:
    """Print a warning if the directory of a new run contains files that no run wrote."""
    if is_own_recipe(directory / RECIPE):
        return
    foreign = classify_contents(directory, tracked_names(recipe)).foreign
    if foreign:
        print(
            f"{directory} already contains {format_names(foreign)}, which ddiff did not write. The "
            "run is written to the same directory, and --fresh will refuse to empty the directory.",
            file=sys.stderr,
        )


# ---------------------------------------------------------------------- the lock


@contextmanager
def lock_run_dir(directory: Path) -> Iterator[None]:
    """Lock a run directory, so that only one process at a time writes to it.

    The lock file is next to the directory. The operating system releases the lock when the process
    ends, also after SIGKILL. On a file system without locks, the directory is not locked. Raises
    CheckpointError if another process holds the lock.
    """
    parent = directory.absolute().parent
    was_there = parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    place = parent / f".{directory.name}.lock"
    if not os.access(
        parent, os.W_OK
    ):  # in a container, often only the mounted directory itself is writable
        place = directory / LOCK
    with place.open("a+") as lock:
        if not _take_lock(lock):
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise CheckpointError(
                f"{directory} is being written by another process ({owner}). Wait until that "
                "process has ended, stop the process, or give this run another name: "
                "--set name=..."
            )
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {platform.node()}")
        lock.flush()
        try:
            yield
        finally:
            place.unlink(missing_ok=True)
            if not was_there:
                with suppress(OSError):  # another run may have been written to the parent directory
                    parent.rmdir()


def _take_lock(lock: IO[str]) -> bool:
    """Acquire the lock.

    Returns False if another process holds the lock, True on a file system without locks.
    """
    try:
        return lock_file(lock, PATIENCE)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return True


# ---------------------------------------------------------------------- the record of a run


def record_run(run: Run, backend: Backend, init: Mapping[str, Any] | None = None) -> None:
    """Write the recipe and components of a run, so that `ddiff.load` needs no training data.

    `init`: record of the weights that [train] init loaded; None when training resumes. The recipe
    is written first. If the process is killed early, the directory of every other file therefore
    contains the recipe.
    """
    directory = run.run_dir
    directory.mkdir(parents=True, exist_ok=True)
    before = read_json(directory / ENVIRONMENT, allow_missing=True)
    write_run_file(directory / RECIPE, run.recipe.to_toml())
    run.tokenizer.save(str(directory / TOKENIZER))
    run.vocabulary.save(str(directory / VOCABULARY))
    environment = {
        "ddiff": __version__,
        "python": platform.python_version(),
        **describe_layout(backend),
        "components": run.recipe.origins(),
        "given": run.overrides.to_dict(),
        "parameters": sum(parameter.numel() for parameter in run.denoiser.parameters()),
        "init": init or before.get("init"),
    }
    write_run_file(directory / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")


def describe_layout(backend: Backend) -> dict[str, Any]:
    """Return the layout: torch version, machine, threads, device and processes of a backend.

    With equal layouts, two computations of the same training step are bitwise identical.
    """
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(backend.device),
        "processes": backend.world_size,
    }


def read_recorded_steps(directory: Path) -> int | None:
    """Read [train] steps of the run in a directory. Returns None if there is no run."""
    if not (directory / RECIPE).is_file():
        return None
    steps = _read_recorded(directory).get("train", {}).get("steps")
    return steps if isinstance(steps, int) else None


def _read_recorded(directory: Path) -> dict[str, Any]:
    """Read the recorded recipe of a run as nested tables."""
    path = directory / RECIPE
    recorded = read_recipe_tree(path)
    try:
        # parsing adds the defaults of keys that are newer than the file
        return parse_recipe(read_text(path), str(path)).to_dict()
    except DdiffError:
        return recorded  # the plugins have changed; the caller lists the different keys


def open_checkpoints(directory: Path) -> Checkpoints:
    """Open the checkpoints of a trained run.

    Raises CheckpointError if the directory is not a run or has no complete checkpoint.
    """
    if not (directory / RECIPE).is_file():
        raise CheckpointError(
            f"{directory} is not a run directory: {RECIPE} is missing. Give a directory that "
            "`ddiff run` wrote, such as runs/<name>."
        )
    checkpoints = Checkpoints(str(directory / CHECKPOINTS))
    if not checkpoints.steps():
        raise CheckpointError(
            f"{directory} is not a trained run: it has a {RECIPE} but no complete checkpoint. "
            "Repeat `ddiff run` with the same recipe to train the run."
        )
    return checkpoints


def write_run_file(path: Path, text: str) -> None:
    """Write a file of the run atomically. Raises CheckpointError if the path is not writable."""
    try:
        write_atomic(path, text)
    except OSError as error:
        if find_disk_full(error) is not None:
            raise  # the command line has a message for a full disk
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}). Move away whatever has this path, or "
            "make the directory writable, then repeat the command."
        ) from error


def remove_leftovers(directory: Path) -> None:
    """Remove partially written files of killed processes.

    The caller must hold the lock of the directory.
    """
    for name in FILES:
        for path in directory.glob(f"{name}.*"):
            if original_name(path.name) == name and path.is_file():
                path.unlink()
