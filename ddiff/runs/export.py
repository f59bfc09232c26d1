"""Export of the weights of a trained run to one safetensors file."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, TYPE_CHECKING, Literal

from ddiff import __version__
from ddiff.errors import ArgumentError
from ddiff.progress import show_activity
from ddiff.run_dir.destination import check_destination, write_file
from ddiff.run_dir.files import FIELDS, NORMALIZER, RunRecord
from ddiff.run_dir.identity import check_recorded
from ddiff.runs.record import open_checkpoints

Weights = Literal["auto", "ema", "trained"]
if TYPE_CHECKING:
    from torch import Tensor

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
    newest = open_checkpoints(Path(run_dir)).newest()
    assert newest is not None  # `open_checkpoints` refuses a run without one
    check_recorded(RunRecord.read(Path(run_dir)), newest.state)
    target = check_destination(file, "export", owned=_is_export)
    average = weights == "ema" or (weights == "auto" and bool(newest.state.get("ema")))
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


def _is_export(file: IO[bytes]) -> bool:
    """Return True if a file is a safetensors file with the metadata of an export."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length < _LONGEST_HEADER:
        return False
    try:
        header = json.loads(file.read(length))
        return {"ddiff", "weights", "step"} <= header.get("__metadata__", {}).keys()
    except (ValueError, AttributeError):
        return False
