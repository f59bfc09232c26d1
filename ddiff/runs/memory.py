"""Whether a run fits into memory, by its recipe: a lower bound of what must be held, against what the machine has.

Refusing needs a lower bound, so that no run is refused that would have fitted. `ddiff run --dry-run --measure` measures
what a run takes.
"""

from __future__ import annotations

import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

import torch

from ddiff.distributed.blocks import blocks_of
from ddiff.distributed.single import device_named
from ddiff.errors import ArgumentError
from ddiff.nn.denoiser import Denoiser
from ddiff.recipe.model import Recipe

TIME = 8  # bytes of the float64 time that every position has
STEP = 32  # bytes of a Python float in a list of times


@dataclass(frozen=True)
class Need:
    """Bytes that one device must hold at least: `standing` all the time, `rows` while a step is computed."""

    parameters: int
    standing: float
    rows: float
    sampling: float

    @property
    def total(self) -> float:
        return max(self.standing + self.rows, self.sampling)


def check_memory(recipe: Recipe, denoiser: Denoiser | None) -> str:
    """The verdict in words; ArgumentError where the run cannot fit. `denoiser` may be on the meta device, or unknown."""
    need, room = need_of(recipe, denoiser), memory_of(device_named(recipe.backend_keys.device))
    held = f"{_bytes(need.total)} of memory at least, of {_bytes(room)}"
    if need.total > room:
        raise ArgumentError(
            f"{recipe.name} does not fit into memory: {_sizes(recipe, need)} need {held}. Take a smaller [denoiser], "
            "[train] batch (or more accumulate), [data] length, [sample] steps or batch."
        )
    fits = (
        "fits" if denoiser is not None else "fits as far as is known before the tokens are counted"
    )
    return f"{fits}: {_sizes(recipe, need)}; {held}"


def need_of(recipe: Recipe, denoiser: Denoiser | None) -> Need:
    """Weights, their gradients and one moment; of every row the input of each block; of sampling, times and canvas."""
    train, sample, backend_keys = recipe.train, recipe.sample, recipe.backend_keys
    parameters = (
        0 if denoiser is None else sum(parameter.numel() for parameter in denoiser.parameters())
    )
    weight_bytes = 4.0 * parameters
    copies = 4 if train.ema else 3
    shares = backend_keys.processes  # a share of each: what fsdp holds, and less than ddp does
    width = 0 if denoiser is None else int(denoiser.head.width)
    layers = 0 if denoiser is None else max(1, len(blocks_of(denoiser)))
    positions = train.batch // (train.accumulate * backend_keys.processes) * recipe.length
    drawn = min(sample.batch, sample.count) * recipe.length
    return Need(
        parameters,
        standing=copies * weight_bytes / shares,
        rows=float(positions) * (2.0 * width * layers + TIME),  # bfloat16 at least
        sampling=weight_bytes + float(drawn) * (2.0 * width + TIME) + float(STEP) * sample.steps,
    )


def memory_of(device: torch.device) -> float:
    """All the memory of a GPU, or of this machine as far as this process may use it."""
    if device.type == "cuda":
        return float(torch.cuda.get_device_properties(device).total_memory)
    machine = float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with suppress(OSError, ValueError):  # no control group, or one without a limit ("max")
        return min(machine, float(Path("/sys/fs/cgroup/memory.max").read_text()))
    return machine


def _sizes(recipe: Recipe, need: Need) -> str:
    train = recipe.train
    counted = f"{_short(need.parameters)} parameters, " if need.parameters else ""
    return f"{counted}{train.steps:,} steps of {train.batch:,} x {recipe.length:,} tokens"


def _short(count: float) -> str:
    for size, letter in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if count >= size:
            return f"{count / size:.1f} {letter}"
    return f"{count:.0f}"


def _bytes(count: float) -> str:
    return f"{_short(count)}B" if count >= 1e3 else f"{count:.0f} B"
