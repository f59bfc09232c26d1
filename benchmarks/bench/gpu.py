"""GPU benchmark of training steps: a small diffusion transformer in bfloat16, for all families.

The transformer is measured compiled and eager. Let T be the number of positions in a batch, L the
length of a sequence, n the number of layers and d their width. A training step has the FLOPs

    6 T (parameters of the backbone) + 12 T n L d (attention) + 6 d (number of logits).

MFU (model FLOPs utilization) is this number per second, divided by the peak dense bfloat16 rate of
the GPU. MFU is None for a GPU whose peak rate is not listed.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Any

import torch
from models import Case, Size, batch_of, denoiser_of, objective_of, tokens_of
from plain import plain_training_step
from torch import Tensor

from ddiff import CounterRng

SMALL = Size(50257, width=768, layers=12, heads=12, length=512, batch=64)
DENSE_BF16 = {"H100": 989e12, "H200": 989e12, "A100": 312e12}
WARM, TIMED = 10, 30


def gpu_step(
    family: str, compiled: bool, size: Size = SMALL, device: str = "cuda", timed: int = TIMED
) -> dict[str, Any]:
    """Measure a training step of ddiff (forward and backward) in bfloat16.

    `family` is the model family, `size` the sizes of model and batch, and `timed` the number of
    timed steps. `compiled` compiles the backbone. Returns milliseconds, tokens and TFLOPs per
    second, MFU, peak memory in GB, and the name of the GPU.
    """
    case = Case(family, size)
    denoiser = denoiser_of(case).to(device)
    objective = objective_of(case, denoiser)
    if compiled:
        denoiser.backbone.compile(dynamic=False)
    batch, count = batch_of(tokens_of(case)), 0  # on the host, as in the trainer
    share = {"tokens": batch.scored.sum()}

    def step() -> None:
        nonlocal count
        count += 1
        denoiser.zero_grad()
        with torch.autocast(torch.device(device).type, dtype=torch.bfloat16):
            terms = objective(
                batch, CounterRng(0, count, batch.index, size.length), share, size.batch
            )
        terms.loss.backward()

    logits = _logits_of(denoiser, step)
    milliseconds, memory = _timed(step, device, timed)
    parameters = sum(
        p.numel() for name, p in denoiser.backbone.named_parameters() if "embedding" not in name
    )
    tokens = size.batch * size.length
    flops = (
        tokens * (6 * parameters + 12 * size.layers * size.length * size.width)
        + 6 * size.width * logits
    )
    rate = flops / (milliseconds / 1e3)
    peak = next((speed for name, speed in DENSE_BF16.items() if name in _card(device)), None)
    return {
        "ms": milliseconds,
        "tokens_per_second": tokens / milliseconds * 1e3,
        "tflops_per_second": rate / 1e12,
        "mfu": None if peak is None else rate / peak,
        "memory_gb": memory,
        "card": _card(device),
    }


def plain_gpu_step(
    family: str, size: Size = SMALL, device: str = "cuda", timed: int = TIMED
) -> dict[str, Any]:
    """Measure a training step of the plain reference implementation, eager, in bfloat16.

    `family` is the model family, `size` the sizes of model and batch, and `timed` the number of
    timed steps. Returns milliseconds and peak memory in GB; both are None if the step does not fit
    into memory.
    """
    try:
        step = plain_training_step(Case(family, size), device)

        def in_bfloat16() -> None:
            with (
                torch.device(device),
                torch.autocast(torch.device(device).type, dtype=torch.bfloat16),
            ):
                step()

        milliseconds, memory = _timed(in_bfloat16, device, timed)
        return {"ms": milliseconds, "memory_gb": memory}
    except torch.cuda.OutOfMemoryError:
        return {"ms": None, "memory_gb": None}


def _logits_of(denoiser: Any, step: Callable[[], None], steps: int = 4) -> float:
    """Return the mean number of logits that the head computes in a training step.

    The mean is taken over `steps` calls of `step`.
    """
    head, counted = denoiser.head, []
    total = head.total

    def counting(hidden: Tensor, node: Tensor, fn: Any) -> Any:
        counted.append(
            sum(rows * head.logits_per_row(top) for top, rows in head._group_rows(node)[1])
        )
        return total(hidden, node, fn)

    head.total = counting
    for _ in range(steps):
        step()
    head.total = total
    return statistics.mean(counted)


def _timed(step: Callable[[], None], device: str, timed: int) -> tuple[float, float]:
    """Run warm-up steps and then `timed` steps; return (median milliseconds, peak memory in GB)."""
    cuda = torch.device(device).type == "cuda"
    wait = torch.cuda.synchronize if cuda else (lambda: None)
    for _ in range(WARM if cuda else 2):
        step()
    if cuda:
        torch.cuda.reset_peak_memory_stats()
    each = []
    for _ in range(timed):
        wait()
        began = time.perf_counter()
        step()
        wait()
        each.append((time.perf_counter() - began) * 1e3)
    return statistics.median(each), torch.cuda.max_memory_allocated() / 1e9 if cuda else 0.0


def _card(device: str) -> str:
    return torch.cuda.get_device_name() if torch.device(device).type == "cuda" else "no card"
