"""Check that a run does not need more memory than the machine has.

The check compares a lower bound of the memory of the run with the memory of the machine. A run that
would fit is therefore never refused. `ddiff run --dry-run --measure` measures the memory that a run
uses.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import nn

from ddiff.distributed.blocks import find_blocks
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import Denoiser, count_parameters
from ddiff.recipe.model import BaseRecipe, Recipe

TIME_BYTES = 8  # float64 time of each position
STEP_BYTES = 32  # one Python float in a sampler's list of time steps
_PREFIXES = ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k"))


@dataclass(frozen=True)
class MemoryNeed:
    """Lower bound of the bytes on one device.

    `standing`: bytes that stay allocated during the whole training. `rows`: bytes that are
    allocated for the rows of a training step. `sampling`: bytes that are allocated during sampling,
    which follows training.
    """

    standing: float
    rows: float
    sampling: float

    @property
    def total(self) -> float:
        return max(self.standing + self.rows, self.sampling)


def check_memory(recipe: Recipe, denoiser: Denoiser | None, device: torch.device) -> str:
    """Check that a lower bound of the memory of a run fits into the memory of the device.

    Returns one line, such as `fits: 2.1 M parameters, ...`. Raises ArgumentError if the run does
    not fit.

    Args:
        recipe: recipe of the run.
        denoiser: network of the run, possibly on the meta device; None if its size is unknown.
        device: device of the run.
    """
    train = recipe.train
    sizes = f"{train.steps:,} steps of {train.batch:,} x {recipe.length:,} tokens"
    advice = (
        "Reduce [denoiser], [train] batch, [data] length, [sample] steps or [sample] batch, or "
        "increase [train] accumulate."
    )
    need = estimate_need(recipe, denoiser)
    return check_need(recipe.name, denoiser, sizes, need, device, advice)


def check_need(
    name: str,
    denoiser: nn.Module | None,
    sizes: str,
    need: MemoryNeed,
    device: torch.device,
    advice: str,
) -> str:
    """Check that a lower bound of the memory of a run fits into the memory of the device.

    Returns one line, such as `fits: 2.1 M parameters, ...`. Raises ArgumentError if the run does
    not fit.

    Args:
        name: name of the run.
        denoiser: network of the run, possibly on the meta device; None if its size is unknown.
        sizes: sizes of the training, such as "30 steps of 4 x 8 tokens".
        need: lower bound of the memory.
        device: device of the run.
        advice: last sentence of the message.
    """
    room = total_memory(device)
    parameters = count_parameters(denoiser)
    if parameters:
        sizes = f"{_format_count(parameters)} parameters, {sizes}"
    amount = f"{_format_bytes(need.total)} of memory at least, of {_format_bytes(room)}"
    if need.total > room:
        raise ArgumentError(f"{name} does not fit into memory: {sizes} need {amount}. {advice}")
    verdict = "fits"
    if denoiser is None:
        verdict = "fits as far as is known before the tokens are counted"
    return f"{verdict}: {sizes}; {amount}"


def estimate_need(recipe: Recipe, denoiser: Denoiser | None) -> MemoryNeed:
    """Return a lower bound of the memory of a run.

    Training needs weights, gradients, the moments of the optimizer (`Members.moment_bytes`), and
    the input of each block of the backbone for each row. Sampling needs weights, hidden states,
    time steps and tokens.
    """
    train = recipe.train
    sample = recipe.sample
    processes = recipe.backend_keys.processes
    weight_bytes = 4.0 * count_parameters(denoiser)
    trained_bytes = training_bytes(recipe) * count_parameters(denoiser, only_trained=True)
    width = 0
    layers = 0
    if denoiser is not None:
        width = int(denoiser.head.width)
        layers = max(1, len(find_blocks(denoiser)))
    positions = train.batch // (train.accumulate * processes) * recipe.length
    sampled = min(sample.batch, sample.count) * recipe.length
    return MemoryNeed(
        # as fsdp shards it; ddp holds more
        standing=(weight_bytes + trained_bytes) / processes,
        rows=float(positions) * (2.0 * width * layers + TIME_BYTES),  # hidden states in bfloat16
        sampling=weight_bytes
        + float(sampled) * (2.0 * width + TIME_BYTES)
        + float(STEP_BYTES) * sample.steps,
    )


def training_bytes(recipe: BaseRecipe) -> float:
    """Return the least bytes that training needs for a trained weight, next to the weight.

    These are its gradient, its moments in the optimizer, and its moving average.
    """
    average = 4.0 if recipe.train.ema else 0.0
    return 4.0 + recipe.optimizer.members.moment_bytes + average


def total_memory(device: torch.device) -> float:
    """Return the bytes of a GPU, or of main memory for a CPU.

    If a Linux control group limits the memory of the process, the limit is returned.
    """
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    machine = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # without a control group, or with the limit "max"
        return min(machine, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return machine


def _format_count(count: float) -> str:
    for size, letter in _PREFIXES:
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:.0f}"


def _format_bytes(count: float) -> str:
    if count >= 1e3:
        return f"{_format_count(count)}B"
    return f"{count:.0f} B"
