"""A trained run's weights as one safetensors file, for whoever reads no checkpoints."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from ddiff import __version__
from ddiff.errors import ArgumentError
from ddiff.runs.directory import checkpoints_of

Weights = Literal["auto", "ema", "trained"]


def export_run(run_dir: str | Path, file: str | Path, weights: Weights = "auto") -> dict[str, str]:
    """Write the newest checkpoint's weights, whole and under every name, whatever number of processes wrote it.

    `weights`: the moving average ("ema"), those that were "trained", or "auto", the average where the run keeps one. The
    file's metadata are returned: which weights, step, fingerprints, and the version of ddiff. Raises CheckpointError where
    there is no such checkpoint.
    """
    from ddiff.training.storage import write_tensors

    path = Path(file)
    if path.suffix != ".safetensors":
        raise ArgumentError(
            f"export: what is written is a safetensors file, and readers go by its name; got {path}. Name it "
            f"{path.name}.safetensors."
        )
    newest = checkpoints_of(Path(run_dir)).newest()
    assert newest is not None
    average = weights == "ema" or (weights == "auto" and bool(newest.state.get("ema")))
    metadata = {
        "format": "pt",
        "weights": "ema" if average else "trained",
        "step": str(newest.step),
        "ddiff": __version__,
        **{f"{name} fingerprint": value for name, value in newest.state["fingerprints"].items()},
    }
    tensors = newest.weights(average=average)
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + ".part")
    with part.open("wb") as sink:
        write_tensors(sink, tensors, metadata)
    os.replace(part, path)
    return metadata
