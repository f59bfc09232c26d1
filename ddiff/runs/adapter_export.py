"""Export of the adapters of a run: merged with their base, or in the format of peft."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from ddiff import __version__
from ddiff.checkpoint.checkpoints import Checkpoints
from ddiff.distributed.single import SingleBackend
from ddiff.errors import ArgumentError
from ddiff.nn.adapters import NAME, merge_adapters
from ddiff.progress import show_activity
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.model import Recipe
from ddiff.recipe.resolve import parse_recipe
from ddiff.recipe.toml import write_toml
from ddiff.run_dir.destination import (
    check_destination,
    check_new_folder,
    write_file,
    write_folder,
)
from ddiff.run_dir.files import CHAT, CHECKPOINTS
from ddiff.run_dir.identity import flatten_keys
from ddiff.runs.data import RunData
from ddiff.runs.export import Weights
from ddiff.runs.loading import load
from ddiff.runs.provenance import BASE
from ddiff.runs.record import open_checkpoints, record_run
from ddiff.runs.run import Run
from ddiff.training.run_state import RunState

PEFT_PREFIX = "base_model.model."
"""Prefix of the names of tensors in files of peft."""


def export_merged(run_dir: str | Path, target: str | Path, weights: Weights = "auto") -> int:
    """Merge the adapters of a run into its base, and write the result.

    Args:
        run_dir: directory of a trained run with adapters.
        target: new or empty folder, to which an ordinary run is written; or a file NAME.safetensors
            for the weights only. It appears when it is complete.
        weights: as for `export_run`.

    Returns the training step of the adapters. Raises ArgumentError if the run has no adapters.
    """
    is_file = Path(target).suffix == ".safetensors"
    place = None if is_file else check_new_folder(target, "export")
    run = _load_adapted(run_dir, weights)
    kind = "ema" if run.uses_ema else "trained"
    with show_activity("merging the adapters"):
        merge_adapters(run.denoiser)
        if place is None:
            _write_tensors(target, run.denoiser.state_dict(), kind, run.step)
        else:
            with write_folder(place) as folder:
                _write_run(run, Path(target), folder)
    return run.step


def export_adapters(run_dir: str | Path, target: str | Path, weights: Weights = "auto") -> int:
    """Write the adapters of a run in the format of peft.

    The folder `target` gets adapter_config.json and adapter_model.safetensors. The names of layers
    are those in the model of the transformers library for the backbone "hf", and otherwise those in
    the denoiser. Returns the training step of the adapters. Raises ArgumentError if the run has no
    adapters, or trains further modules whole, for which the format has no place.
    """
    from ddiff.checkpoint.dcp_storage import write_tensors

    place = check_new_folder(target, "export")
    run = _load_adapted(run_dir, weights)
    adapters = run.denoiser.adapters
    assert adapters is not None, "see _load_adapted"
    prefix = run.denoiser.backbone.library_prefix
    tensors: dict[str, Tensor] = {}
    whole = []
    for name, tensor in run.denoiser.state_dict().items():
        if f".{NAME}." not in name:
            whole.append(name)
            continue
        plain = name.replace(f".{NAME}.", ".").removeprefix(prefix)
        tensors[PEFT_PREFIX + plain] = tensor.contiguous()
    if whole:
        raise ArgumentError(
            f"--format peft: {run_dir} also trains {', '.join(whole[:3])} whole, but the files of "
            "peft hold only adapters. Merge the run instead: --merged."
        )
    settings = adapters.settings
    config = {
        "peft_type": "LORA",
        "r": settings.rank,
        "lora_alpha": settings.alpha,
        "lora_dropout": settings.dropout,
        "target_modules": [name.removeprefix(prefix) for name in adapters.layers],
        "base_model_name_or_path": _name_base(run.recipe),
        "inference_mode": True,
        "bias": "none",
    }
    with write_folder(place) as folder:
        (folder / "adapter_config.json").write_text(json.dumps(config, indent=2) + "\n")
        with (folder / "adapter_model.safetensors").open("wb") as file:
            write_tensors(file, tensors, {"format": "pt"})
    return run.step


def _load_adapted(run_dir: str | Path, weights: Weights) -> Run:
    """Load a run with adapters."""
    settings = [] if weights == "auto" else [f'evaluate.weights="{weights}"']
    run: Run = load(run_dir, settings=settings)
    require_text_recipe(run.recipe, "ddiff export")
    if run.denoiser.adapters is None:
        raise ArgumentError(
            f"ddiff export: {run_dir} has no adapters to merge or to export. Leave out --merged "
            "and --format peft."
        )
    return run


def _name_base(recipe: Recipe) -> str | None:
    init = recipe.train.init
    if init is not None and init.run is not None:
        return init.run
    return recipe.denoiser.to_dict().get("path")


def _write_tensors(target: str | Path, tensors: Mapping[str, Tensor], kind: str, step: int) -> None:
    from ddiff.checkpoint.dcp_storage import write_tensors
    from ddiff.runs.export import is_export

    metadata = {"format": "pt", "weights": kind, "step": str(step), "ddiff": __version__}
    place = check_destination(target, "export", owned=is_export)
    write_file(place, lambda sink: write_tensors(sink, dict(tensors), metadata))


def _write_run(run: Run, target: Path, folder: Path) -> None:
    """Write the files of a run with merged weights to `folder`, as training would leave them."""
    recipe = _merged_recipe(run.recipe, target)
    conditions = run.denoiser.condition_dropout
    data = RunData(run.data.text.with_recipe(recipe), conditions, run.denoiser.condition_forms)
    merged = Run(recipe, run.model, data, run.overrides)
    newest = open_checkpoints(run.run_dir).newest()
    assert newest is not None  # `open_checkpoints` refuses a run without one
    fingerprints = dict(newest.state["fingerprints"])
    fingerprints.pop(BASE, None)
    record_run(merged, SingleBackend("cpu"), directory=folder)
    chat = run.run_dir / CHAT
    if chat.is_file():
        shutil.copyfile(chat, folder / CHAT)
    state = {
        "run": RunState(step=run.step).to_tree(),
        "ema": None,
        "origins": recipe.origins(),
        "fingerprints": fingerprints,
        "made_with": {
            "recipe": flatten_keys(recipe.to_dict()),
            "given": merged.given(),
            "noising": merged.noising(),
        },
    }
    checkpoints = Checkpoints(str(folder / CHECKPOINTS))
    checkpoints.save(run.step, run.denoiser.state_dict(), state)


def _merged_recipe(recipe: Recipe, target: Path) -> Recipe:
    """Return the recipe without adapters, of a run in the directory `target`."""
    tree = recipe.to_dict()
    tree["name"] = target.resolve().name
    tree["run_dir"] = str(target)
    tree["denoiser"].pop("lora", None)
    tree["train"].pop("init", None)
    tree["train"]["ema"] = 0.0  # there is only one set of merged weights
    tree["evaluate"]["weights"] = "auto"
    text = write_toml(tree, "Recipe of merged adapters")
    return require_text_recipe(parse_recipe(text, "the merged recipe"), "ddiff export --merged")
