"""The run directory: what stands in it, what it was made with, and whether that is what comes now."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import platform
import re
import tempfile
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import torch

from ddiff import __version__
from ddiff.errors import CheckpointError, DdiffError
from ddiff.recipe import Recipe, changed_keys, parse_recipe
from ddiff.runs.parts import Given
from ddiff.training.checkpoint import Checkpoints

if TYPE_CHECKING:
    from ddiff.runs.built import Run
    from ddiff.training.protocols import Backend

RECIPE, ENVIRONMENT = "recipe.toml", "environment.json"
TOKENIZER, VOCABULARY = "tokenizer.json", "vocabulary.safetensors"
PATIENCE = 5.0  # seconds that a run waits for another to let go of its directory
EVALUATION, SAMPLES, SAMPLING = "evaluation.json", "samples.jsonl", "sampling.json"
METRICS = "metrics.jsonl"


def check_directory(directory: Path, recipe: Recipe, given: Given, fresh: bool) -> None:
    """Hold the directory's recipe against this one; only more steps and [backend] may differ, unless all starts over."""
    check_writable(directory)
    is_run = (directory / RECIPE).is_file()
    if fresh and not is_run and directory.exists() and any(directory.iterdir()):
        raise CheckpointError(
            f"--fresh: {directory} holds no {RECIPE}, so it is not a run of ddiff's and is left alone. "
            "Name another run_dir, or empty that one yourself."
        )
    if fresh or not is_run or not Checkpoints(str(directory / "checkpoints")).steps():
        return  # without a checkpoint there is nothing to lose: a run that died at its first step may be mended
    old = _read_recorded(directory)
    changed = [change for change in changed_keys(old, recipe.to_dict()) if not _continues(*change)]
    was_given = read_json(directory / ENVIRONMENT).get("given", {})
    changed += [(f"given {key}", a, b) for key, a, b in changed_keys(was_given, given.to_dict())]
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
        raise CheckpointError(f"{directory} was made with another recipe. Changed keys:\n{lines}\n{remedy}")


@contextmanager
def held(directory: Path) -> Iterator[None]:
    """One process at a time writes to a run directory; CheckpointError while another does. The lock, a file beside the
    directory, goes with the process, however it ends; a file system without locks has none."""
    parent = directory.absolute().parent
    was_there = parent.exists()
    parent.mkdir(parents=True, exist_ok=True)
    # a directory may be writable where the one around it is not: a mounted volume
    place = parent / f".{directory.name}.lock" if os.access(parent, os.W_OK) else directory / ".lock"
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
    deadline = time.monotonic() + PATIENCE
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if time.monotonic() > deadline:
                return False
            time.sleep(0.1)
            continue
        except OSError as error:
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS):
                raise
        return True


def check_writable(directory: Path) -> None:
    """Raises CheckpointError when a run cannot be written there; leaves nothing behind."""
    standing = next(place for place in (directory, *directory.absolute().parents) if os.path.exists(place))
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
    return _read_recorded(directory).get("train", {}).get("steps")


def _read_recorded(directory: Path) -> dict[str, Any]:
    """The recipe that the directory was made with."""
    path = directory / RECIPE
    try:
        text = path.read_text(encoding="utf-8")
        recorded = tomllib.loads(text)
    except ValueError as error:
        raise CheckpointError(
            f"{path} is damaged: {error}. Restore it from a copy, or start anew with --fresh."
        ) from error
    try:
        return parse_recipe(text, str(path)).to_dict()  # with the defaults of keys that came after it was written
    except DdiffError:
        return recorded  # of other plugins: what differs is told key by key


def _continues(key: str, old: Any, new: Any) -> bool:
    """More steps, another place, other devices and processes are the same run."""
    return (key == "train.steps" and old is not None and new >= old) or key == "run_dir" or key.startswith("backend.")


def record(directory: Path, recipe: Recipe, built: Run, given: Given) -> None:
    """What the run is made with, so that it can be loaded without its data; the recipe last, whole."""
    directory.mkdir(parents=True, exist_ok=True)
    built.tokenizer.save(str(directory / TOKENIZER))
    built.vocabulary.save(str(directory / VOCABULARY))
    environment = {
        "ddiff": __version__,
        "python": platform.python_version(),
        **layout(built.backend),
        "components": recipe.origins(),
        "given": given.to_dict(),
        "parameters": sum(parameter.numel() for parameter in built.denoiser.parameters()),
        "init": built.init or read_json(directory / ENVIRONMENT).get("init"),
    }
    write(directory / ENVIRONMENT, json.dumps(environment, indent=2) + "\n")
    write(directory / RECIPE, recipe.to_toml())


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
    checkpoints = Checkpoints(str(directory / "checkpoints"))
    if not checkpoints.steps():
        raise CheckpointError(
            f"{directory} is not a trained run: it has a {RECIPE} and no complete checkpoint. `ddiff run` with that recipe "
            "goes on with it."
        )
    return checkpoints


def write(path: Path, text: str) -> None:
    """Write a file, whole or not at all."""
    part = path.with_name(path.name + ".part")
    try:
        part.write_text(text, encoding="utf-8")
        part.replace(path)
    except BaseException:
        part.unlink(missing_ok=True)
        raise


def remove_leftovers(directory: Path) -> None:
    """Remove what killed processes left half written of the files of a run. The lock of the directory must be held."""
    for name in (TOKENIZER, VOCABULARY, RECIPE, ENVIRONMENT, EVALUATION, SAMPLES, SAMPLING, METRICS):
        leftover = re.compile(re.escape(name) + r"(\.[0-9a-f]{8})?\.part(ial-[0-9a-f]{8})?")
        for path in directory.glob(f"{name}.*"):
            if leftover.fullmatch(path.name) and path.is_file():
                path.unlink()


def read_json(path: Path) -> dict[str, Any]:
    """What stands in a file of the run, nothing where there is none."""
    return parsed(path.read_text(encoding="utf-8"), path) if path.is_file() else {}


def parsed(text: str, path: Path) -> dict[str, Any]:
    try:
        return json.loads(text)
    except ValueError as error:
        remedy = "Restore it from a copy, or start anew with --fresh."
        if path.name in (EVALUATION, SAMPLES, SAMPLING):
            remedy = "Delete it, and the same command writes it anew."
        raise CheckpointError(f"{path} is damaged: {error}. {remedy}") from error
