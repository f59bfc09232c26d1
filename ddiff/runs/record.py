"""Record of a run: write and read its recipe, components and environment."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from ddiff import __version__
from ddiff.atomic import write_atomic
from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.errors import CheckpointError, DdiffError, find_disk_full
from ddiff.nn.denoiser import count_parameters
from ddiff.recipe.resolve import parse_recipe
from ddiff.run_dir.files import (
    CHECKPOINTS,
    ENVIRONMENT,
    RECIPE,
    RunRecord,
    read_json,
    require_run_dir,
)

if TYPE_CHECKING:
    from ddiff.runs.trainable import TrainableRun
    from ddiff.training.protocols import Backend


def record_run(
    run: TrainableRun,
    backend: Backend,
    init: Mapping[str, Any] | None = None,
    directory: Path | None = None,
) -> None:
    """Write the recipe and components of a run, so that `ddiff.load` needs no training data.

    `backend`: backend whose device and number of processes are recorded. `init`: record of the
    weights that [train] init loaded; None when training resumes. `directory`: folder of the files;
    None for the run directory. The recipe is written before all other files. If the process is
    killed early, a directory with any file of a run therefore also contains the recipe.
    """
    directory = directory or run.run_dir
    directory.mkdir(parents=True, exist_ok=True)
    before = read_json(directory / ENVIRONMENT, allow_missing=True)
    write_run_file(directory / RECIPE, run.recipe.to_toml())
    run.save_components(directory)
    environment = {
        "ddiff": __version__,
        "python": platform.python_version(),
        **describe_layout(backend),
        "components": run.recipe.origins(),
        "given": run.given(),
        "parameters": count_parameters(run.denoiser),
        "init": init or before.get("init"),
    }
    write_run_file(directory / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")


def describe_layout(backend: Backend) -> dict[str, Any]:
    """Return the layout of a backend: torch version, machine, threads, device and processes.

    With equal layouts, two computations of the same training step are bitwise identical.
    """
    return {
        "torch": torch.__version__,
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
        "device": str(backend.device),
        "processes": backend.world_size,
    }


def resolve_recorded(record: RunRecord) -> Mapping[str, Any]:
    """Return the recorded recipe as nested tables, with defaults for missing keys.

    Keys are missing if an earlier version of ddiff recorded the recipe. Without the plugins of the
    run, the recipe cannot be resolved, and is returned as recorded.
    """
    try:
        return parse_recipe(record.recipe_text, str(record.directory / RECIPE)).to_dict()
    except DdiffError:
        return record.recipe  # the caller lists the different keys


def read_recorded_steps(directory: Path) -> int | None:
    """Return the key `steps` of [train] of the run in a directory, or None if there is no run."""
    if not (directory / RECIPE).is_file():
        return None
    steps = resolve_recorded(RunRecord.read(directory)).get("train", {}).get("steps")
    return steps if isinstance(steps, int) else None


def open_checkpoints(directory: Path) -> Checkpoints:
    """Open the checkpoints of a trained run.

    Raises CheckpointError if the directory is not a run or has no complete checkpoint.
    """
    require_run_dir(directory)
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
            f"{path} cannot be written ({error.strerror}). Move away the file or folder that has "
            "this path, or make the directory writable, then repeat the command."
        ) from error
