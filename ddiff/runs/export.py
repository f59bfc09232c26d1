"""Export of the weights of a trained run to one safetensors file, or to a published format."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from ddiff import __version__
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError
from ddiff.progress import show_activity
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.recipe.resolve import read_recipe
from ddiff.run_dir.destination import (
    Destination,
    check_destination,
    check_new_folder,
    write_file,
    write_folder,
)
from ddiff.run_dir.files import FIELDS, NORMALIZER, RECIPE, VOCABULARY, RunRecord
from ddiff.run_dir.identity import check_recorded
from ddiff.runs.record import open_checkpoints

Weights = Literal["auto", "ema", "trained"]
if TYPE_CHECKING:
    from torch import Tensor

    from ddiff.checkpoint.checkpoints import Checkpoint
    from ddiff.checkpoint.layout import Exported

_LONGEST_HEADER = 1 << 27


def export_run(run_dir: str | Path, file: str | Path, weights: Weights = "auto") -> dict[str, str]:
    """Write the weights of the newest checkpoint of a run to a safetensors file.

    Sharded weights are assembled to whole tensors. The file of a run of several fields also
    contains the tensors of the normalizers.

    Args:
        run_dir: directory of a trained run.
        file: local path or fsspec URL. An existing file is overwritten only if it is an export.
        weights: "trained" for the trained weights, "ema" for their exponential moving average,
            "auto" for the moving average if the run has a moving average, else the trained weights.

    Returns the metadata of the file: kind of weights, step, fingerprints, version of ddiff. Raises
    CheckpointError if the run has no checkpoint, or no moving average for "ema". Raises
    ArgumentError if `file` must not be written.
    """
    from ddiff.checkpoint.dcp_storage import write_tensors

    if Path(file).suffix != ".safetensors":
        raise ArgumentError(
            "export: the file name must end in .safetensors, because readers choose the format by "
            f"the name; got {file}. Use the name {Path(file).name}.safetensors."
        )
    newest = _open_newest(Path(run_dir))
    target = check_destination(file, "export", owned=is_export)
    average = _uses_average(newest, weights)
    metadata = {
        "format": "pt",
        "weights": "ema" if average else "trained",
        "step": str(newest.step),
        "ddiff": __version__,
    }
    for name, value in newest.state["fingerprints"].items():
        metadata[f"{name} fingerprint"] = value
    with show_activity("exporting the weights"):
        tensors = newest.read_weights(average=average) | _read_normalizers(Path(run_dir))
        write_file(target, lambda sink: write_tensors(sink, tensors, metadata))
    return metadata


@dataclass(frozen=True)
class ExportedRun:
    """Result of an export to a published format.

    Attributes:
        weights: exported weights, "ema" or "trained".
        step: training step of the weights.
        notes: remarks of the layout.
    """

    weights: str
    step: int
    notes: tuple[str, ...]


def export_published(
    run_dir: str | Path, folder: str | Path, layout: str, weights: Weights = "auto"
) -> ExportedRun:
    """Write config.json and model.safetensors in a published format, which other programs read.

    Args:
        run_dir: directory of a trained run of text.
        folder: new or empty folder. It appears when it is complete.
        layout: name of the format.
        weights: as for `export_run`.

    Raises ArgumentError, which names the reason, if the format cannot represent the model.
    """
    from ddiff.checkpoint.layout import ExportSource
    from ddiff.runs.importing import build_layout, find_layout

    directory = Path(run_dir)
    component = find_layout(layout, "--format")
    newest = _open_newest(directory)
    recipe = require_text_recipe(read_recipe(directory / RECIPE), f"--format {layout}")
    if recipe.denoiser_keys.lora is not None:
        raise ArgumentError(
            f"--format {layout}: {directory} holds LoRA adapters without their base. Merge them "
            f"first: `ddiff export {directory} DIR --merged`, and export the run DIR."
        )
    place = check_new_folder(folder, "export")
    average = _uses_average(newest, weights)
    with show_activity("exporting the weights"):
        source = ExportSource(
            recipe.to_dict(),
            newest.read_weights(average=average),
            Vocabulary.load(str(directory / VOCABULARY)),
        )
        try:
            exported = build_layout(component).write(source)
        except ArgumentError as error:
            reason = str(error).removeprefix("export: ")
            raise ArgumentError(f"export --format {layout}: {reason}") from error
        _write_published(place, exported)
    return ExportedRun("ema" if average else "trained", newest.step, tuple(exported.notes))


def _write_published(place: Destination, exported: Exported) -> None:
    """Write a folder with configuration and weights. It appears when it is complete."""
    from ddiff.checkpoint.dcp_storage import write_tensors

    tensors = {name: tensor.contiguous() for name, tensor in exported.tensors.items()}
    with write_folder(place) as folder:
        config = json.dumps(dict(exported.config), indent=2) + "\n"
        (folder / "config.json").write_text(config, encoding="utf-8")
        with (folder / "model.safetensors").open("wb") as file:
            write_tensors(file, tensors, {"format": "pt"})


def _open_newest(directory: Path) -> Checkpoint:
    """Open the newest checkpoint of a run, after a comparison with the record of the run."""
    newest = open_checkpoints(directory).newest()
    assert newest is not None  # `open_checkpoints` refuses a run without one
    check_recorded(RunRecord.read(directory), newest.state)
    return newest


def _uses_average(newest: Checkpoint, weights: Weights) -> bool:
    """Return whether the moving averages of the weights are exported."""
    return weights == "ema" or (weights == "auto" and bool(newest.state.get("ema")))


def _read_normalizers(run_dir: Path) -> dict[str, Tensor]:
    """Return the tensors of the normalizers of a run of several fields, by name.

    Without them, vectors that are drawn with the weights cannot be converted to units of the data.
    """
    from safetensors.torch import load_file

    found = {}
    for path in sorted(run_dir.glob(f"{FIELDS}/*/{NORMALIZER}")):
        for name, tensor in load_file(str(path)).items():
            found[f"normalizers.{path.parent.name}.{name}"] = tensor
    return found


def is_export(file: IO[bytes]) -> bool:
    """Return True if a file is a safetensors file with the metadata of an export."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length < _LONGEST_HEADER:
        return False
    try:
        header = json.loads(file.read(length))
        return {"ddiff", "weights", "step"} <= header.get("__metadata__", {}).keys()
    except (ValueError, AttributeError):
        return False
