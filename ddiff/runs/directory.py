"""The run directory: checks before a run, the lock, and the record of what the run is made of."""

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
"""A dotted key with its old and its new value."""

PATIENCE = 5.0  # seconds to wait for the lock: a killed process may take a moment to release it

# ---------------------------------------------------------------------- checks before a run


def check_directory(directory: Path, recipe: Recipe, overrides: Overrides, fresh: bool) -> None:
    """Refuse a run directory that the run must not be written to, or `fresh` must not empty.

    A run that resumes may differ from the recorded recipe in more steps and in [backend] only. A
    file that ddiff did not write is never overwritten or deleted.
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
        return  # nothing is lost: a run that died at its first step may be fixed and repeated
    check_recorded(directory, newest.state, training=True)
    changed = _changed_keys(directory, newest, recipe, overrides)
    if changed:
        raise CheckpointError(_explain_changes(directory, changed))


def _changed_keys(
    directory: Path, newest: Checkpoint, recipe: Recipe, overrides: Overrides
) -> list[Change]:
    """List the keys in which the recipe differs from the recorded one, as (key, old, new)."""
    changed = []
    for key, old, new in diff_recipes(_read_recorded(directory), recipe.to_dict()):
        if not _may_change(key, old, new):
            changed.append((key, old, new))
    given = recorded_overrides(newest.state)
    if given is None:  # a checkpoint of a version that recorded it elsewhere
        given = read_json(directory / ENVIRONMENT).get("given", {})
    for key, old, new in diff_recipes(given, overrides.to_dict()):
        changed.append((f"given {key}", old, new))
    return changed


def _may_change(key: str, old: Any, new: Any) -> bool:
    """Return whether a run with another value of this key continues the recorded one."""
    if key == "train.steps":
        return isinstance(old, int) and new >= old
    return key in ("run_dir", "evaluate.every") or key.startswith("backend.")


def _explain_changes(directory: Path, changed: Sequence[Change]) -> str:
    if [key for key, _, _ in changed] == ["train.steps"]:
        _, old, new = changed[0]
        return (
            f"{directory} is a run of {old} steps (train.steps: was {old}, is {new}). Repeat with "
            f"train.steps >= {old} to resume; read it as it is with `ddiff eval {directory}`, "
            f'`ddiff sample {directory}` or ddiff.load("{directory}"); or start over with --fresh.'
        )
    lines = "\n".join(f"  {key}: was {old!r}, is {new!r}" for key, old, new in changed)
    tables = {key.split(".")[0] for key, _, _ in changed}
    if tables <= {"evaluate", "sample"}:
        remedy = (
            f"The training is the same: `ddiff eval {directory} --set ...` and "
            f"`ddiff sample {directory} --set ...` read it with other settings. For a separate "
            "run: --set name=..."
        )
    else:
        remedy = (
            "Give this one another name (--set name=...), or start over there with --fresh, which "
            "deletes what was trained. (More train.steps, or another [backend], continue.)"
        )
    return f"{directory} was made with another recipe. Changed keys:\n{lines}\n{remedy}"


def check_local(run_dir: str) -> None:
    """Raise ArgumentError for a run directory that is a URL: runs are written to file systems."""
    if "://" in run_dir:
        raise ArgumentError(
            f"run_dir must be a directory of this machine; got {run_dir}. Name one, or mount the "
            "place and name that: --set run_dir=..."
        )
    run = find_enclosing_checkpoint(Path(run_dir).resolve())
    if run is not None:
        raise ArgumentError(
            f"run_dir must not lie among the checkpoints of a run; got {run_dir}, in {run}. Name "
            "another one: --set run_dir=..."
        )


def check_writable(directory: Path) -> None:
    """Raise CheckpointError if a run cannot be written there; leave nothing behind."""
    places = (directory, *directory.absolute().parents)
    existing = next(place for place in places if os.path.exists(place))
    try:
        with tempfile.TemporaryDirectory(prefix=".ddiff-", dir=existing):
            pass
    except OSError as error:
        raise CheckpointError(
            f"run_dir must be a directory that can be written; got {directory}, and {existing} "
            f"takes no files ({error.strerror}). Name another one: --set run_dir=..."
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
            f"{own} was written or annotated by hand, and a run writes a file of that name. Name "
            "another run_dir (--set run_dir=...); or, if it is the record of this run, keep your "
            "comments in another file and take them out here."
        )
    taken = []
    for name in FILES:
        path = directory / name
        if path.exists() or path.is_symlink():
            taken.append(name)
    checkpoints = directory / CHECKPOINTS
    if checkpoints.is_symlink() or (checkpoints.is_dir() and any(checkpoints.iterdir())):
        taken.append(CHECKPOINTS)  # another tool's: steps beyond [train] keep would be deleted
    if taken:
        them = "it" if len(taken) == 1 else "them"
        raise CheckpointError(
            f"{directory} holds {format_names(taken)} and no {RECIPE} of ddiff's, so it is "
            f"not a run, and a run would write over {them}. Name another run_dir "
            f"(--set run_dir=...), or move {them} away."
        )


# ---------------------------------------------------------------------- --fresh


def check_fresh(directory: Path, recipe: Recipe) -> None:
    """Raise CheckpointError if --fresh would delete more than what a run has written there."""
    if not directory.exists():
        return
    reason = _find_protection(directory, recipe.source)
    if reason is not None:
        raise CheckpointError(
            f"--fresh: {directory} {reason}, so nothing there is deleted. Name another run_dir "
            "(--set run_dir=...), or empty that one yourself."
        )
    for table, path in _input_paths(recipe):
        if directory.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise CheckpointError(
                f"--fresh: {directory} holds {path}, which this recipe reads ([{table}]), so "
                "nothing there is deleted. Name another run_dir (--set run_dir=...), or copy that "
                "file elsewhere first."
            )
    there = sorted(path.name for path in directory.iterdir())
    if there and not is_own_recipe(directory / RECIPE):
        raise CheckpointError(
            f"--fresh: {directory} holds {format_names(there)} and no {RECIPE} of ddiff's, so it "
            "is not a run of ddiff's and nothing there is deleted. Name another run_dir, or empty "
            "that one yourself."
        )
    foreign = classify_contents(directory, tracked_names(recipe)).foreign
    if foreign:
        raise CheckpointError(foreign_message(directory, foreign))


def _find_protection(directory: Path, recipe: str) -> str | None:
    """Say why a directory must never be emptied; None if it may be."""
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
    """List the local paths that a recipe reads, each after the table that names it."""
    for table, component in recipe.components().items():
        for path in component.input_paths():
            if "://" not in path:
                yield table, path
    init = recipe.train.init
    if init is not None and init.run is not None:
        yield "train.init", init.run


def tracked_names(recipe: Recipe) -> tuple[str, ...]:
    """Names in a run directory that the recipe's tracker writes."""
    return recipe.tracker.members.writes


def print_foreign(directory: Path, recipe: Recipe) -> None:
    """Print a warning if a first run is written next to files that ddiff did not write."""
    if is_own_recipe(directory / RECIPE):
        return
    foreign = classify_contents(directory, tracked_names(recipe)).foreign
    if foreign:
        print(
            f"{directory} already holds {format_names(foreign)}, which ddiff did not write: the "
            "run is written next to that, and --fresh will refuse to empty the directory.",
            file=sys.stderr,
        )


# ---------------------------------------------------------------------- the lock


@contextmanager
def lock_run_dir(directory: Path) -> Iterator[None]:
    """Let one process at a time write to a run directory; CheckpointError if another one does.

    The lock is held on a file next to the directory and is released when the process ends, however
    it ends. On a file system without locks nothing is locked.
    """
    parent = directory.absolute().parent
    was_there = parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    place = parent / f".{directory.name}.lock"
    if not os.access(parent, os.W_OK):  # of a mounted volume only the directory may be writable
        place = directory / LOCK
    with place.open("a+") as lock:
        if not _take_lock(lock):
            lock.seek(0)
            owner = lock.read().strip() or "unknown"
            raise CheckpointError(
                f"{directory} is being written by another process ({owner}). Wait until it has "
                "ended, stop it, or give this run another name: --set name=..."
            )
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {platform.node()}")
        lock.flush()
        try:
            yield
        finally:
            place.unlink(missing_ok=True)
            if not was_there:
                with suppress(OSError):  # the parent may hold a run by now
                    parent.rmdir()


def _take_lock(lock: IO[str]) -> bool:
    """Take the lock; False if another process has it. A file system without locks gives True."""
    try:
        return lock_file(lock, PATIENCE)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return True


# ---------------------------------------------------------------------- the record of a run


def record_run(run: Run, backend: Backend, init: Mapping[str, Any] | None = None) -> None:
    """Write the recipe and the components of a run, so that it can be loaded without its data.

    `init` is the record of [train] init, None when training resumes. The recipe goes first: a
    directory with files of a run has one, however early the run is killed.
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
    """Describe where steps are computed: in the same layout a step has the same bits."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(backend.device),
        "processes": backend.world_size,
    }


def read_recorded_steps(directory: Path) -> int | None:
    """Read [train] steps of the run in the directory; None without a run."""
    if not (directory / RECIPE).is_file():
        return None
    steps = _read_recorded(directory).get("train", {}).get("steps")
    return steps if isinstance(steps, int) else None


def _read_recorded(directory: Path) -> dict[str, Any]:
    """Read the recipe of a run as nested tables."""
    path = directory / RECIPE
    recorded = read_recipe_tree(path)
    try:
        # parsed again, for the defaults of keys that are newer than the file
        return parse_recipe(read_text(path), str(path)).to_dict()
    except DdiffError:
        return recorded  # plugins have changed: the differences are then listed key by key


def open_checkpoints(directory: Path) -> Checkpoints:
    """Open the checkpoints of a trained run; CheckpointError if the directory holds none."""
    if not (directory / RECIPE).is_file():
        raise CheckpointError(
            f"{directory} is not a run directory: it has no {RECIPE}. Name one that `ddiff run` "
            "wrote, such as runs/<name>."
        )
    checkpoints = Checkpoints(str(directory / CHECKPOINTS))
    if not checkpoints.steps():
        raise CheckpointError(
            f"{directory} is not a trained run: it has a {RECIPE} and no complete checkpoint. "
            "`ddiff run` with that recipe resumes it."
        )
    return checkpoints


def write_run_file(path: Path, text: str) -> None:
    """Write a file of the run at once; CheckpointError if its place takes no file."""
    try:
        write_atomic(path, text)
    except OSError as error:
        if find_disk_full(error) is not None:
            raise  # the command line has a message for a full disk
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}). Make room for it: move away what stands "
            "there, or make the directory writable; then repeat the command."
        ) from error


def remove_leftovers(directory: Path) -> None:
    """Remove partial files that killed processes left behind; the directory must be locked."""
    for name in FILES:
        for path in directory.glob(f"{name}.*"):
            if original_name(path.name) == name and path.is_file():
                path.unlink()
