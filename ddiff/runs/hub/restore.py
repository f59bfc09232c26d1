"""Restore runs from saved models: `ddiff import` and `ddiff.load` of a folder or hub name."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from ddiff import __version__
from ddiff.atomic import write_atomic
from ddiff.checkpoint.atomic_folder import FileDigest
from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.checkpoint.published_files import HUB, Location, compute_digest, locate
from ddiff.data.cache import SMALL, default_root, fingerprint
from ddiff.data.pretrained import first_line
from ddiff.errors import DataError
from ddiff.progress import show_activity
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.model import Recipe
from ddiff.recipe.resolve import read_recipe
from ddiff.run_dir.files import CHECKPOINTS, ORIGIN, RECIPE, TOKENIZER, VOCABULARY
from ddiff.run_dir.origin_record import ImportedFile, OriginRecord
from ddiff.runs.hub.record import COPIED, FOLDER, RECORD, SavedRecord
from ddiff.runs.record import write_run_file
from ddiff.training.run_state import RunState

WEIGHTS = "model.safetensors"
PREFIX = "denoiser."
"""Beginning of the names of the network's tensors in the folder of a saved model."""

LAYOUT = "hf"
MODELS = "models"
"""Folder of imported models in the cache."""


def is_saved_model(folder: Path) -> bool:
    """Return whether a folder is a model that `save_pretrained` has written."""
    return (folder / FOLDER / RECORD).is_file()


def read_saved_recipe(folder: Path, directory: Path, settings: Iterable[str] = ()) -> Recipe:
    """Read the recipe of a saved model, with another run directory.

    `settings`: `key=value` texts that override keys of the recipe.
    """
    settings = [f"run_dir={json.dumps(str(directory))}", *settings]
    recipe = read_recipe(folder / FOLDER / RECIPE, settings)
    return require_text_recipe(recipe, "a saved model")


def write_saved_run(location: Location, recipe: Recipe, target: Path) -> OriginRecord:
    """Write a run directory from the folder of a saved model, and return its origin.

    Args:
        location: folder of the saved model.
        recipe: recipe of the run.
        target: new folder, which becomes the run directory.
    """
    folder = location.directory
    record = SavedRecord.read(folder / FOLDER / RECORD)
    weights = read_weights(folder)
    target.mkdir(parents=True)
    write_run_file(target / RECIPE, recipe.to_toml())
    for name in (TOKENIZER, VOCABULARY, *COPIED):
        path = folder / FOLDER / name
        if path.is_file():
            shutil.copyfile(path, target / name)
    digest = location.digest(folder / WEIGHTS)
    origin = OriginRecord(
        ddiff=__version__,
        source=location.source,
        layout=f"{LAYOUT} (saved by ddiff {record.ddiff})",
        tokenizer=f"{FOLDER}/{TOKENIZER}",
        step=record.step,
        is_average=record.weights == "ema",
        files={WEIGHTS: ImportedFile(bytes=digest.bytes, sha256=digest.sha256)},
    )
    write_run_file(target / ORIGIN, origin.to_json())
    average: dict[str, Any] | None = None
    if record.weights == "ema":
        # Only the average was saved. It takes the place of the trained weights, too.
        average = {"updates": torch.zeros((), dtype=torch.float64), "weights": weights}
    state = {
        "run": RunState(step=record.step).to_tree(),
        "ema": average,
        "origins": record.components,
        "fingerprints": record.fingerprints,
        "made_with": record.made_with,
    }
    with show_activity("writing the checkpoint"):
        Checkpoints(str(target / CHECKPOINTS)).save(record.step, weights, state)
    return origin


def read_weights(folder: Path) -> dict[str, Tensor]:
    """Read the weights of a saved model, without the constants of its network.

    Raises DataError if the file is missing or damaged.
    """
    path = folder / WEIGHTS
    try:
        tensors = load_file(str(path))
    except Exception as error:  # the library has its own error classes
        raise DataError(
            f"{path} is missing, damaged or incomplete ({first_line(error)}). Copy or download the "
            "file again."
        ) from error
    record = SavedRecord.read(folder / FOLDER / RECORD)
    constants = {f"{PREFIX}{name}" for name in record.constants}
    found = {}
    for name, tensor in tensors.items():
        if name not in constants:
            found[name.removeprefix(PREFIX)] = tensor
    return found


def find_run(run_dir: str | Path) -> Path:
    """Return the run directory of a name that `ddiff.load` takes.

    A run directory is returned unchanged. The folder of a saved model, and a name on the hub
    (`hf://OWNER/NAME` or `hf://OWNER/NAME@REVISION`), is imported into the cache of ddiff at its
    first use. Raises DataError if a hub name cannot be downloaded, or is not a model.
    """
    source = str(run_dir)
    if not source.startswith(HUB) and not is_saved_model(Path(run_dir)):
        return Path(run_dir)
    # Imported here, because only this branch imports models.
    from ddiff.runs.importing import import_published, import_saved

    location = locate(source)
    digests = _read_digests(location)
    location = replace(location, digests=digests)
    content = {name: digest.sha256 for name, digest in digests.items()}
    directory = default_root() / MODELS / fingerprint([__version__, content])
    if not (directory / RECIPE).is_file():
        if is_saved_model(location.directory):
            import_saved(location, directory)
        else:
            import_published(source, directory)
    return directory


def _read_digests(location: Location) -> dict[str, FileDigest]:
    """Return the digests of all files of a folder, by name.

    Hashing takes seconds per gigabyte. The digest of a large file is therefore taken from the
    record of an earlier call, if the file has kept its size and its time of modification.
    """
    place = default_root() / MODELS / f"{fingerprint(str(location.directory.resolve()))}.json"
    try:
        recorded = json.loads(place.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        recorded = {}
    record = {}
    for path in sorted(location.directory.rglob("*")):
        if path.is_file():
            name = path.relative_to(location.directory).as_posix()
            # Read before the content: a file that changes later does not match the record.
            about = path.stat()
            modified = [about.st_size, about.st_mtime_ns]
            known = recorded.get(name)
            if about.st_size > SMALL and known is not None and known[:2] == modified:
                record[name] = known
            else:
                record[name] = [*modified, compute_digest(path).sha256]
    if record != recorded:
        place.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(place, json.dumps(record))
    return {name: FileDigest(size, sha256) for name, (size, _, sha256) in record.items()}
