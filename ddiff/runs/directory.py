"""The run directory: what stands in it, what it was made with, and whether that is what comes now."""

from __future__ import annotations

import json
import os
import platform
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ddiff import __version__
from ddiff.atomic import NO_LOCKS, lock_file, original_name, write_atomic
from ddiff.checkpoint.checkpoints import Checkpoints
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

PATIENCE = 5.0  # seconds that a run waits for another to let go of its directory


def check_directory(directory: Path, recipe: Recipe, given: Overrides, fresh: bool) -> None:
    """Refuse a run directory that this recipe cannot be written to, or that `fresh` must not empty.

    Only more steps and [backend] may differ from the recipe of the run that stands there, unless all starts over; what
    ddiff did not write is never written over or deleted.
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
        return  # without a checkpoint there is nothing to lose: a run that died at its first step may be mended
    check_recorded(directory, newest.state, training=True)
    old = _read_recorded(directory)
    changed = [change for change in diff_recipes(old, recipe.to_dict()) if not _continues(*change)]
    was_given = recorded_overrides(newest.state)
    if was_given is None:
        was_given = read_json(directory / ENVIRONMENT).get("given", {})
    changed += [(f"given {key}", a, b) for key, a, b in diff_recipes(was_given, given.to_dict())]
    if [key for key, _, _ in changed] == ["train.steps"]:
        raise CheckpointError(_fewer_steps(directory, *changed[0][1:]))
    if changed:
        lines = "\n".join(f"  {key}: was {old!r}, is {new!r}" for key, old, new in changed)
        anew = {key.split(".")[0] for key, _, _ in changed} <= {"evaluate", "sample"}
        remedy = (
            f"What is trained is the same: `ddiff eval {directory} --set ...` and `ddiff sample {directory} --set ...` "
            "read it by other settings. For a run of its own: --set name=..."
            if anew
            else "Give this one another name (--set name=...), or start over there with --fresh, which deletes what was "
            "trained. (More train.steps, or another [backend], continue.)"
        )
        raise CheckpointError(
            f"{directory} was made with another recipe. Changed keys:\n{lines}\n{remedy}"
        )


def check_local(run_dir: str) -> None:
    """Raise ArgumentError for a run directory that is an address: runs are written to file systems."""
    if "://" in run_dir:
        raise ArgumentError(
            f"run_dir must be a directory of this machine; got {run_dir}. Name one, or mount the place and name that: "
            "--set run_dir=..."
        )
    if (above := find_enclosing_checkpoint(Path(run_dir).resolve())) is not None:
        raise ArgumentError(
            f"run_dir must not lie among the checkpoints of a run; got {run_dir}, in {above}. Name another one: --set "
            "run_dir=..."
        )


def check_fresh(directory: Path, recipe: Recipe) -> None:
    """Raise CheckpointError when --fresh would delete more than what a run has written there."""
    if not directory.exists():
        return
    if reason := _protection(directory, recipe.source):
        raise CheckpointError(
            f"--fresh: {directory} {reason}, so nothing there is deleted. Name another run_dir (--set run_dir=...), or "
            "empty that one yourself."
        )
    for place, path in _inputs(recipe):
        if directory.resolve() in (Path(path).resolve(), *Path(path).resolve().parents):
            raise CheckpointError(
                f"--fresh: {directory} holds {path}, which this recipe reads ([{place}]), so nothing there is deleted. "
                "Name another run_dir (--set run_dir=...), or copy that file elsewhere first."
            )
    if not is_own_recipe(directory / RECIPE) and (
        there := sorted(path.name for path in directory.iterdir())
    ):
        raise CheckpointError(
            f"--fresh: {directory} holds {format_names(there)} and no {RECIPE} of ddiff's, so "
            "it is not a run of ddiff's and is left alone. Name another run_dir, or empty that one yourself."
        )
    if foreign := classify_contents(directory, tracked_names(recipe)).foreign:
        raise CheckpointError(foreign_message(directory, foreign))


def _inputs(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """The local paths that a recipe reads, each after the table that names it."""
    for place, part in recipe.components().items():
        for path in part.input_paths():
            if "://" not in path:
                yield place, path
    init = recipe.train.init
    if init is not None and init.run is not None:
        yield "train.init", init.run


def tracked_names(recipe: Recipe) -> tuple[str, ...]:
    """Names in a run directory that the recipe's tracker writes: the attribute `writes` of the component."""
    return recipe.tracker.members.writes


def print_foreign(directory: Path, recipe: Recipe) -> None:
    """Say that a first run is written into a directory that holds something else, which stays as it is."""
    if is_own_recipe(directory / RECIPE):
        return
    if foreign := classify_contents(directory, tracked_names(recipe)).foreign:
        print(
            f"{directory} already holds {format_names(foreign)}, which ddiff did not write: the run is written next "
            "to that, and --fresh will refuse to empty the directory.",
            file=sys.stderr,
        )


def _protection(directory: Path, recipe: str) -> str | None:
    """Why a directory must never be emptied; None where it may."""
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


def _check_not_written_over(directory: Path) -> None:
    """Raise CheckpointError when a file of somebody else's has the name of one that a run writes."""
    own = directory / RECIPE
    if own.exists() or own.is_symlink():
        if is_own_recipe(own):
            return
        if Checkpoints(str(directory / CHECKPOINTS)).steps():
            read_recipe_tree(own)  # a run's record that is damaged is told as such
        raise CheckpointError(
            f"{own} was written or annotated by hand, and a run writes a file of that name. Name another run_dir (--set "
            "run_dir=...); or, if it is the record of this run, keep your comments in another file and take them out here."
        )
    taken = [
        name for name in FILES if (directory / name).exists() or (directory / name).is_symlink()
    ]
    checkpoints = directory / CHECKPOINTS
    if checkpoints.is_symlink() or (checkpoints.is_dir() and any(checkpoints.iterdir())):
        taken.append(CHECKPOINTS)  # of another tool: steps beyond [train] keep would be deleted
    if taken:
        them = "it" if len(taken) == 1 else "them"
        raise CheckpointError(
            f"{directory} holds {format_names(taken)} and no {RECIPE} of ddiff's, so it is not a run, and a run "
            f"would write over {them}. Name another run_dir (--set run_dir=...), or move {them} away."
        )


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """One process at a time writes to a run directory; CheckpointError while another does. The lock, a file beside the
    directory, goes with the process, however it ends; a file system without locks has none."""
    parent = directory.absolute().parent
    was_there = parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    # a directory may be writable where the one around it is not: a mounted volume
    place = parent / f".{directory.name}.lock" if os.access(parent, os.W_OK) else directory / LOCK
    with place.open("a+") as lock:
        if not _locked(lock):
            lock.seek(0)
            raise CheckpointError(
                f"{directory} is being written by another process ({lock.read().strip() or 'unknown'}). Wait until it has "
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
                with suppress(OSError):  # something stands in it now
                    parent.rmdir()


def _locked(lock: IO[str]) -> bool:
    """Whether the lock was had, at once or within seconds: those who were killed may take a moment to let go."""
    try:
        return lock_file(lock, PATIENCE)
    except OSError as error:
        if error.errno not in NO_LOCKS:
            raise
        return True


def check_writable(directory: Path) -> None:
    """Raises CheckpointError when a run cannot be written there; leaves nothing behind."""
    standing = next(
        place for place in (directory, *directory.absolute().parents) if os.path.exists(place)
    )
    try:
        with tempfile.TemporaryDirectory(prefix=".ddiff-", dir=standing):
            pass
    except OSError as error:
        raise CheckpointError(
            f"run_dir must be a directory that can be written; got {directory}, and {standing} takes no files "
            f"({error.strerror}). Name another one: --set run_dir=..."
        ) from error


def _fewer_steps(directory: Path, old: int, new: int) -> str:
    return (
        f"{directory} is a run of {old} steps (train.steps: was {old}, is {new}). Repeat with train.steps >= {old} "
        f"to go on; read it as it is with `ddiff eval {directory}`, `ddiff sample {directory}` or "
        f'ddiff.load("{directory}"); or start over with --fresh.'
    )


def recorded_steps(directory: Path) -> int | None:
    """How many steps the run in the directory was told to take, where there is one."""
    if not (directory / RECIPE).is_file():
        return None
    steps = _read_recorded(directory).get("train", {}).get("steps")
    return steps if isinstance(steps, int) else None


def _read_recorded(directory: Path) -> dict[str, Any]:
    """The recipe that the directory was made with."""
    path = directory / RECIPE
    recorded = read_recipe_tree(path)
    try:
        # with the defaults of keys that came after it was written
        return parse_recipe(read_text(path), str(path)).to_dict()
    except DdiffError:
        return recorded  # of other plugins: what differs is told key by key


def _continues(key: str, old: Any, new: Any) -> bool:
    """More steps, another place, other devices and processes are the same run, however often it is evaluated."""
    if key == "train.steps":
        return isinstance(old, int) and new >= old
    return key in ("run_dir", "evaluate.every") or key.startswith("backend.")


def record(directory: Path, recipe: Recipe, built: Run, given: Overrides) -> None:
    """Write what the run is made with, so that it can be loaded without its data.

    The recipe goes first: a directory with files of a run has one, however early the run was killed.
    """
    directory.mkdir(parents=True, exist_ok=True)
    before = read_json(directory / ENVIRONMENT, allow_missing=True)
    write(directory / RECIPE, recipe.to_toml())
    built.tokenizer.save(str(directory / TOKENIZER))
    built.vocabulary.save(str(directory / VOCABULARY))
    environment = {
        "ddiff": __version__,
        "python": platform.python_version(),
        **layout(built.backend),
        "components": recipe.origins(),
        "given": given.to_dict(),
        "parameters": sum(parameter.numel() for parameter in built.denoiser.parameters()),
        "init": built.init or before.get("init"),
    }
    write(directory / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")


def layout(backend: Backend) -> dict[str, Any]:
    """Where the work is done: a step is the same bits in the same layout."""
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(backend.device),
        "processes": backend.world_size,
    }


def newest_step(built: Run) -> int:
    steps = built.checkpoints.steps()
    return steps[-1] if steps else 0


def checkpoints_of(directory: Path) -> Checkpoints:
    """The checkpoints of a trained run; CheckpointError where it is none."""
    if not (directory / RECIPE).is_file():
        raise CheckpointError(
            f"{directory} is not a run directory: it has no {RECIPE}. Name one that `ddiff run` wrote, such as runs/<name>."
        )
    checkpoints = Checkpoints(str(directory / CHECKPOINTS))
    if not checkpoints.steps():
        raise CheckpointError(
            f"{directory} is not a trained run: it has a {RECIPE} and no complete checkpoint. `ddiff run` with that recipe "
            "goes on with it."
        )
    return checkpoints


def write(path: Path, text: str) -> None:
    """Write a file of the run, whole or not at all; CheckpointError when its place takes no file."""
    try:
        write_atomic(path, text)
    except OSError as error:
        if find_disk_full(error) is not None:
            raise  # told as such by the command
        raise CheckpointError(
            f"{path} cannot be written ({error.strerror}). Make room for it: move away what stands there, or make the "
            "directory writable; then repeat the command."
        ) from error


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes left half written of the files of a run. The lock of the directory must be held."""
    for name in FILES:
        for path in directory.glob(f"{name}.*"):
            if original_name(path.name) == name and path.is_file():
                path.unlink()
