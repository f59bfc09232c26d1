"""Check that a run of several fields does not need more memory than the machine has."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from ddiff.distributed.blocks import find_blocks
from ddiff.nn.denoiser import count_parameters
from ddiff.nn.joint_denoiser import JointDenoiser
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.runs.memory import (
    STEP_BYTES,
    TIME_BYTES,
    MemoryNeed,
    check_need,
    training_bytes,
)

if TYPE_CHECKING:
    from ddiff.runs.fields.values import FieldShape

ADVICE = (
    "Reduce [denoiser], [train] batch, the positions of the fields, [sample] steps or [sample] "
    "batch, or increase [train] accumulate."
)


def check_memory(
    recipe: FieldsRecipe,
    shapes: Mapping[str, FieldShape] | None,
    denoiser: JointDenoiser | None,
    device: torch.device,
) -> str:
    """Check that a lower bound of the memory of a run fits into the memory of the device.

    Returns one line, such as `fits: 2.1 M parameters, ...`. Raises ArgumentError if the run does
    not fit. `shapes` and `denoiser` are None if they are unknown before the data are read.
    """
    train = recipe.train
    sizes = f"{train.steps:,} steps of {train.batch:,} samples"
    if shapes is not None:
        parts = [f"{name} of {shape.positions:,}" for name, shape in shapes.items()]
        sizes += f" ({', '.join(parts)})"
    need = estimate_need(recipe, shapes or {}, denoiser)
    return check_need(recipe.name, denoiser, sizes, need, device, ADVICE)


def estimate_need(
    recipe: FieldsRecipe, shapes: Mapping[str, FieldShape], denoiser: JointDenoiser | None
) -> MemoryNeed:
    """Return a lower bound of the memory of a run, as `ddiff.runs.memory` does for texts."""
    train = recipe.train
    sample = recipe.sample
    processes = recipe.backend_keys.processes
    parameters = count_parameters(denoiser)
    weight_bytes = 4.0 * parameters
    layers = 0
    hidden = 0  # channels of all positions of a sample
    positions = sum(shape.positions for shape in shapes.values())
    if denoiser is not None:
        layers = max(1, len(find_blocks(denoiser)))
        for name, shape in shapes.items():
            hidden += shape.positions * denoiser.backbone.widths[name]
    rows = train.batch // (train.accumulate * processes)
    sampled = min(sample.batch, sample.count)
    return MemoryNeed(
        # as fsdp shards it; ddp holds more
        standing=(weight_bytes + training_bytes(recipe) * parameters) / processes,
        rows=float(rows) * (2.0 * hidden * layers + TIME_BYTES * positions),
        sampling=weight_bytes
        + float(sampled) * (2.0 * hidden + TIME_BYTES * positions)
        + float(STEP_BYTES) * sample.steps,
    )
