"""A trained run's weights as one safetensors file, for readers that know no checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import IO, Literal

from ddiff import __version__
from ddiff.errors import ArgumentError
from ddiff.run_dir.destination import check_destination, write_file
from ddiff.run_dir.identity import check_recorded
from ddiff.runs.directory import checkpoints_of

Weights = Literal["auto", "ema", "trained"]
_LONGEST_HEADER = 1 << 27


def export_run(run_dir: str | Path, file: str | Path, weights: Weights = "auto") -> dict[str, str]:
    """Write the newest checkpoint's weights, whole and under every name, whatever number of processes wrote it.

    `file` is a local path or any address that fsspec writes; a file that an export wrote before is replaced. `weights`: the
    moving average ("ema"), those that were "trained", or "auto", the average where the run keeps one. The file's metadata
    are returned: which weights, step, fingerprints, and the version of ddiff. Raises CheckpointError where there is no such
    checkpoint, ArgumentError where the file must not be written.
    """
    from ddiff.checkpoint.dcp_storage import write_tensors

    if Path(file).suffix != ".safetensors":
        raise ArgumentError(
            f"export: what is written is a safetensors file, and readers go by its name; got {file}. Name it "
            f"{Path(file).name}.safetensors."
        )
    newest = checkpoints_of(Path(run_dir)).newest()
    assert newest is not None
    check_recorded(Path(run_dir), newest.state)
    target = check_destination(file, "export", owned=_is_export)
    average = weights == "ema" or (weights == "auto" and bool(newest.state.get("ema")))
    metadata = {
        "format": "pt",
        "weights": "ema" if average else "trained",
        "step": str(newest.step),
        "ddiff": __version__,
        **{f"{name} fingerprint": value for name, value in newest.state["fingerprints"].items()},
    }
    tensors = newest.weights(average=average)
    write_file(target, lambda sink: write_tensors(sink, tensors, metadata))
    return metadata


def _is_export(file: IO[bytes]) -> bool:
    """Whether a file is a safetensors file with the metadata of an export."""
    length = int.from_bytes(file.read(8), "little")
    if not 0 < length < _LONGEST_HEADER:
        return False
    try:
        header = json.loads(file.read(length))
        return {"ddiff", "weights", "step"} <= header.get("__metadata__", {}).keys()
    except (ValueError, AttributeError):
        return False
