"""Measurements that run in a separate process.

`python workers.py WORK ARGUMENTS` calls the function WORK of this module with the keyword arguments
in the JSON object ARGUMENTS, and prints the result as JSON in the last line.
"""

from __future__ import annotations

import json
import os
import sys
import time
from typing import Any

import torch
from gpu import SMALL, TIMED, gpu_step, plain_gpu_step
from handwritten import handwritten_step
from measure import measure_memory_rise, seconds_of, time_alternating
from models import (
    Case,
    Size,
    backbone_of,
    batch_of,
    denoiser_of,
    objective_of,
    our_sampler,
    our_training_step,
    tokens_of,
    vocabulary_of,
)
from plain import plain_sampling, plain_training_step

from ddiff import Context, CounterRng, DistributedBackend
from ddiff.distributed.allocator import keep_freed_memory

FAMILIES = {
    "mdlm": ["mdlm"],
    "gidd": ["gidd"],
    "hdlm": ["hdlm-tied", "hdlm-levelwise"],
    "ar": ["ar"],
}
TINY = Size(64, width=16, layers=1, heads=1, length=8, batch=2, samples=2, steps=2)


def train(family: str, vocabulary: int, rounds: int) -> dict[str, Any]:
    """Measure CPU seconds of training steps, by name of the implementation.

    Measured are ddiff with each head of the family, the reference implementation, and the backbone
    without a head. `vocabulary` is the number of tokens.
    """
    keep_freed_memory()  # for ddiff and for plain, as in training
    case = Case(FAMILIES[family][0], Size(vocabulary))
    sides = {name: our_training_step(Case(name, Size(vocabulary))) for name in FAMILIES[family]}
    return time_alternating(
        {**sides, "plain": plain_training_step(case), "trunk": backbone_step(case)}, rounds
    )


def backbone_step(case: Case) -> Any:
    backbone, ids = backbone_of(case, vocabulary_of(case)), tokens_of(case)
    t = torch.rand(ids.shape, dtype=torch.float64)

    def step() -> None:
        backbone.zero_grad()
        backbone(ids, t, Context()).square().mean().backward()

    return step


def sample(family: str, vocabulary: int, rounds: int, plain_steps: int) -> dict[str, Any]:
    """Measure CPU seconds of sampling, for ddiff and the reference implementation.

    `family` is a key of FAMILIES, which lists the ddiff models to measure. In each of `rounds`
    rounds, ddiff samples once with every model, and the reference implementation takes
    `plain_steps` sampling steps. `vocabulary` is the number of tokens.
    """
    keep_freed_memory()
    size = Size(vocabulary)
    ours = {name: our_sampler(Case(name, size)) for name in FAMILIES[family]}
    plain = plain_sampling(Case(FAMILIES[family][0], size))
    next(plain)
    seconds: dict[str, list[float]] = {name: [] for name in ours} | {"plain_step": []}
    for _ in range(rounds):
        for name, run in ours.items():
            seconds[name].append(seconds_of(run))
        seconds["plain_step"] += [seconds_of(lambda: next(plain)) for _ in range(plain_steps)]
    return seconds


def memory(what: str, side: str, family: str, vocabulary: int) -> float:
    """Measure the memory in MB that a training step or a sampling run needs besides the model.

    Args:
        what: "train" (a training step) or "sample" (a sampling run).
        side: "ours" (ddiff) or "plain" (the reference implementation).
        family: name of the model family.
        vocabulary: number of tokens.
    """
    warm, case = Case(family, TINY), Case(family, Size(vocabulary))
    make = {("train", "ours"): our_training_step, ("train", "plain"): plain_training_step}
    make |= {
        ("sample", "ours"): our_sampler,
        ("sample", "plain"): lambda case: plain_sampling(case).__next__,
    }
    make[what, side](warm)()
    return measure_memory_rise(make[what, side](case))


def handwritten(vocabulary: int, rounds: int) -> dict[str, Any]:
    keep_freed_memory()
    case = Case("mdlm", Size(vocabulary))
    return time_alternating(
        {"generic": our_training_step(case), "handwritten": handwritten_step(case)}, rounds
    )


def grow(family: str, what: str, rounds: int, levels: int = 2, **size: int) -> list[float]:
    """Return the CPU seconds of a training step or sampling run of ddiff in each of `rounds` runs.

    `family` is the name of the model family. `what` is "train" for a training step; any other value
    measures a sampling run. `levels` is the number of tree levels above the tokens. `size`
    overrides fields of `Size`, the sizes of model and batch.
    """
    keep_freed_memory()
    case = Case(family, Size(**{"vocabulary": 8192, **size}), levels)
    run = our_training_step(case) if what == "train" else our_sampler(case)
    return time_alternating({"ours": run}, rounds)["ours"]


def convolutions(taps: int, documents: int, rounds: int) -> dict[str, Any]:
    """Measure training steps of mdlm with and without convolutions and norms of queries and keys.

    The network has two layers, as in the shipped small recipes. `taps` are the taps of the
    convolutions, and `documents` the number of documents in a row of the batch.
    """
    keep_freed_memory()
    plain = Case("mdlm", Size(1024, layers=2, length=64, batch=32), documents=documents)
    cases = {
        "plain": plain,
        "convolutions": plain._replace(convolution=taps),
        "qk_norm": plain._replace(qk_norm=True),
        "both": plain._replace(convolution=taps, qk_norm=True),
    }
    return time_alternating({name: our_training_step(c) for name, c in cases.items()}, rounds)


def ddp(vocabulary: int, rounds: int) -> dict[str, Any]:
    """Measure a training step with and without the gradient all-reduce of DDP.

    All ranks run at the same time. Steps without and with all-reduce alternate, each after a
    barrier. Returns lists of seconds per round:

    - "alone": CPU seconds without all-reduce; "alone_wall": wall-clock seconds without all-reduce;
    - "together": CPU seconds with all-reduce; "together_wall": wall-clock seconds with all-reduce.
    """
    backend = DistributedBackend("cpu", int(os.environ["WORLD_SIZE"]))
    case = Case("mdlm", Size(vocabulary))
    alone, together = denoiser_of(case), denoiser_of(case)
    own, shared = objective_of(case, alone), objective_of(case, together)
    shared.module = backend.wrap(together)
    batch, rows = batch_of(tokens_of(case)), case.size.batch * backend.world_size
    share = {"tokens": batch.scored.sum() * backend.world_size}
    offset, step = backend.rank * case.size.batch, 0

    def run(objective: Any) -> None:
        objective.module.zero_grad()
        rng = CounterRng(0, step, batch.index + offset, case.size.length)
        objective(batch, rng, share, rows).loss.backward()

    figures: dict[str, list[float]] = {
        "alone": [],
        "together": [],
        "alone_wall": [],
        "together_wall": [],
    }
    for step in range(rounds + 1):
        for name, objective in (("alone", own), ("together", shared)):
            backend.barrier()
            began = time.monotonic()
            seconds = seconds_of(lambda objective=objective: run(objective))
            if step:
                figures[name].append(seconds)
                figures[f"{name}_wall"].append(time.monotonic() - began)
    both = [None] * backend.world_size
    torch.distributed.all_gather_object(both, figures)
    backend.close()
    return {
        name: [sum(each) / len(both) for each in zip(*(f[name] for f in both))] for name in figures
    }


def gpu(family: str, side: str, batch: int, rehearsal: bool = False) -> dict[str, Any]:
    """Measure a training step on the GPU, and return the results as in `gpu.gpu_step`.

    side: "compiled" or "eager" (ddiff), or "plain" (the reference implementation). batch: number of
    sequences. rehearsal: run a tiny step on the CPU instead, to test this function.
    """
    size, where = (
        (TINY._replace(batch=batch), ("cpu", 1))
        if rehearsal
        else (SMALL._replace(batch=batch), ("cuda", TIMED))
    )
    if side == "plain":
        return plain_gpu_step(family, size, *where)
    return gpu_step(family, side == "compiled", size, *where)


if __name__ == "__main__":
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", 1)))
    torch.manual_seed(0)
    result = globals()[sys.argv[1]](**json.loads(sys.argv[2]))
    print(json.dumps(result))
