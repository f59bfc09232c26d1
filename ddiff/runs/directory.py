"""Run directory: checks before a run, and the lock."""

from __future__ import annotations

import os
import platform
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from ddiff.atomic import NO_LOCKS, lock_file, original_name
from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.errors import CheckpointError
from ddiff.recipe.model import BaseRecipe, diff_recipes
from ddiff.run_dir.contents import classify_contents
from ddiff.run_dir.files import (
    CHECKPOINTS,
    FILES,
    LOCK,
    RECIPE,
    RunRecord,
    check_entry_types,
    check_readable,
    read_recipe_tree,
)
from ddiff.run_dir.identity import check_recorded, recorded_overrides
from ddiff.run_dir.location import check_location
from ddiff.run_dir.origin_record import find_origin
from ddiff.run_dir.protection import check_deleting, check_overwriting
from ddiff.run_dir.resume import check_resumable
from ddiff.runs.build import Overrides
from ddiff.runs.record import resolve_recorded

PATIENCE = 5.0  # seconds to wait for the lock: a killed process may take a moment to release it

# ---------------------------------------------------------------------- checks before a run


def check_directory(
    recipe: BaseRecipe, overrides: Overrides, fresh: bool, *, warn: bool = False
) -> None:
    """Raise an error if a recipe must not be run in its directory.

    A run can resume only if its recipe equals the recorded recipe, except for [backend], the
    keys `ddiff.run_dir.resume.FREE_KEYS`, and a larger number [train] steps. A file that ddiff did
    not write is never overwritten or deleted.

    Args:
        recipe: recipe of the run.
        overrides: components from a Python caller that replace components of the recipe.
        fresh: whether the existing run is to be deleted. If so, an error is raised if the directory
            must not be emptied.
        warn: whether to print a warning if a new run is written to a directory that contains other
            files.
    """
    directory = Path(recipe.run_dir)
    tracked = tracked_names(recipe)
    inputs = _input_paths(recipe)
    check_location(recipe.run_dir)
    contents = classify_contents(directory, tracked)
    checkpoints = Checkpoints(str(directory / CHECKPOINTS))
    if not fresh:
        check_entry_types(directory)
        if RECIPE in contents.foreign and checkpoints.steps():
            read_recipe_tree(directory / RECIPE)  # the damaged record of a run has another error
        check_overwriting(contents, warn=warn)
    else:
        check_deleting(contents, recipe.source, inputs)
    if fresh or not contents.has_own_recipe:
        return  # the run starts at step 0
    check_readable(directory)
    _check_not_imported(directory)
    newest = checkpoints.newest()
    if newest is None:
        return  # nothing is lost: no checkpoint was written yet
    record = RunRecord.read(directory)
    check_recorded(record, newest.state, training=True)
    given = recorded_overrides(record, newest.state)
    changed = diff_recipes(resolve_recorded(record), recipe.to_dict())
    replaced = diff_recipes(given, overrides.to_dict())
    check_resumable(directory, changed, replaced)


def _check_not_imported(directory: Path) -> None:
    """Raise CheckpointError if the weights in a run directory come from a published checkpoint."""
    origin = find_origin(directory)
    if origin is not None:
        recipe = directory / RECIPE
        raise CheckpointError(
            f"{directory} has weights that `ddiff import` read from {origin.source}, and training "
            f'would replace them. To train further, write a recipe with extends = "{recipe}", '
            f'another name and run_dir, and [train] init = {{ run = "{directory}" }}.'
        )


def tracked_names(recipe: BaseRecipe) -> tuple[str, ...]:
    """Return the names of the files that the tracker of a recipe writes."""
    return recipe.tracker.members.writes


def _input_paths(recipe: BaseRecipe) -> Iterator[tuple[str, str]]:
    """Yield (table, path) for each local path that a recipe reads."""
    for table, component in recipe.components().items():
        for path in component.input_paths():
            if "://" not in path:
                yield table, path
    if recipe.initial_run is not None:
        yield "train.init", recipe.initial_run


def remove_leftovers(directory: Path) -> None:
    """Remove partially written files of killed processes.

    The caller must hold the lock of the directory.
    """
    for name in FILES:
        for path in directory.glob(f"{name}.*"):
            if original_name(path.name) == name and path.is_file():
                path.unlink()


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
