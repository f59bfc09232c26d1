"""Keys of records of figures: fingerprints, components and provenance of a run."""

from __future__ import annotations

import platform
import shlex
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from ddiff import __version__
from ddiff.data.cache import fingerprint
from ddiff.run_dir.evaluation_record import (
    OWN_DATA,
    SCHEMA_VERSION,
    dump_figures,
    make_figures,
)
from ddiff.runs.trainable import TrainableRun


def describe_record(
    run: TrainableRun,
    tree: Mapping[str, Any],
    fingerprints: Mapping[str, str],
    seconds: float,
    protocol: str = OWN_DATA,
) -> dict[str, Any]:
    """Return the keys of evaluation.json that every evaluation has.

    Args:
        run: the evaluated run.
        tree: the other content of evaluation.json.
        fingerprints: fingerprints of the components and the data, by name.
        seconds: duration of the evaluation.
        protocol: name of the protocol of the figures.
    """
    return {
        "schema_version": SCHEMA_VERSION,
        "figures": dump_figures(make_figures(tree, protocol)),
        "fingerprints": {"weights": fingerprint_weights(run), **fingerprints},
        "components": describe_components(run),
        "sampler": None,
        "provenance": describe_provenance(run, seconds),
    }


def describe_components(run: TrainableRun) -> dict[str, str]:
    """Return the recipe key of each component -> its name, package, distribution and version.

    Components that a Python caller passed replace those of the recipe.
    """
    components = run.recipe.origins()
    for key, given in run.given().items():
        components[key] = f"{given} (passed from Python)"
    return components


def describe_provenance(run: TrainableRun, seconds: float) -> dict[str, Any]:
    """Return the command, the duration in seconds and the hardware of an evaluation."""
    return {
        "command": describe_command(),
        "seconds": seconds,
        "hardware": describe_hardware(run.device),
    }


def describe_command() -> str:
    """Return the command line of this process, or `python SCRIPT` for the script of a user."""
    program = Path(sys.argv[0]).name
    if program in ("ddiff", "__main__.py"):
        return shlex.join(["ddiff", *sys.argv[1:]])
    return f"python {program}"


def describe_hardware(device: torch.device) -> dict[str, Any]:
    """Return device, threads, machine and versions that may change the last digits."""
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine()
    return {
        "ddiff": __version__,
        "torch": torch.__version__,
        "device": str(device),
        "machine": name,
        "threads": torch.get_num_threads(),
    }


def fingerprint_weights(run: TrainableRun) -> str:
    """Return a fingerprint of the evaluated weights: of the files of the newest checkpoint."""
    newest = run.checkpoints.newest()
    if newest is None:
        return "untrained"
    kind = "ema" if run.uses_ema else "model"
    digests = {}
    for name, digest in newest.folder.digests.items():
        if name.startswith(f"{kind}."):
            digests[name] = digest.sha256
    return fingerprint(digests)
