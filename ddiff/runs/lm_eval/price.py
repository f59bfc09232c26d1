"""Cost of a job, computed before it starts: requests, network evaluations, estimated time."""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np

from ddiff.evaluation.conditional import Continuation, RowBatch
from ddiff.nn.denoiser import Denoiser
from ddiff.runs.lm_eval.requests import Generation, make_gap
from ddiff.runs.lm_eval.scoring import Request, RequestScorer
from ddiff.runs.prompts import Template
from ddiff.runs.sampling import build_sampler, draw_templates
from ddiff.sampling.loop import Canvas

PAIRS = "loglikelihood"
DOCUMENTS = "loglikelihood_rolling"
GENERATIONS = "generate_until"
"""Types of requests of the harness."""

TIMED_STEPS = 2  # of a sampler; the first one includes the start of the libraries


@dataclass(frozen=True)
class Price:
    """Price of a job.

    Attributes:
        requests: number of requests by type.
        evaluations: number of network evaluations, each of one row. Those of the sampler are an
            estimate if its number of steps depends on its draws.
        seconds: estimated time of the network evaluations, from a timed batch.
    """

    requests: Mapping[str, int]
    evaluations: int
    seconds: float

    def __str__(self) -> str:
        counts = [f"{count:,} {kind}" for kind, count in self.requests.items() if count]
        minutes = timedelta(seconds=round(self.seconds))
        shown = f"{self.seconds:.1f} s" if self.seconds < 60 else str(minutes)
        return (
            f"{', '.join(counts) or 'no'} requests: {self.evaluations:,} network evaluations of a "
            f"row, about {shown} on this device"
        )

    def to_dict(self) -> dict[str, Any]:
        """Return all figures by name."""
        return {
            "requests": dict(self.requests),
            "network_evaluations": self.evaluations,
            "estimated_seconds": self.seconds,
        }


def price_requests(scorer: RequestScorer, requests: Mapping[str, Sequence[Request]]) -> Price:
    """Encode all requests, time one batch of each type, and return the price of the job.

    `requests` are the requests by type. Raises an error if a request cannot be answered. `scorer`
    counts the encoded requests; use a new one for the job.
    """
    pairs = scorer.encode_pairs(requests.get(PAIRS, ()))
    windows = []
    for document in scorer.encode_documents(requests.get(DOCUMENTS, ())):
        windows += document
    generations = scorer.encode_generations(requests.get(GENERATIONS, ()))
    parts = [_price_likelihood(scorer, [*pairs, *windows])]
    asked = scorer.find_greedy(pairs)
    gaps = [make_gap(pairs[number]) for number in asked]
    parts.append(_price_samples(scorer, gaps, ("temperature=0",)))
    for settings, templates in _by_settings(generations).items():
        parts.append(_price_samples(scorer, templates, settings))
    counts = {kind: len(found) for kind, found in requests.items()}
    return Price(counts, sum(part[0] for part in parts), sum(part[1] for part in parts))


def _by_settings(generations: Sequence[Generation]) -> dict[tuple[str, ...], list[Template]]:
    groups: dict[tuple[str, ...], list[Template]] = {}
    for generation in generations:
        groups.setdefault(generation.settings, []).append(generation.template)
    return groups


def _price_likelihood(
    scorer: RequestScorer, continuations: Sequence[Continuation]
) -> tuple[int, float]:
    """Return network evaluations and seconds of the likelihoods of continuations."""
    if not continuations:
        return 0, 0.0
    scorer.run.objective.module.eval()  # no dropout
    plan = list(scorer.conditional.plan(continuations))
    # the most frequent shape stands for all
    common = Counter(rows.shape for rows in plan).most_common(1)[0][0]
    timed = next(rows for rows in plan if rows.shape == common)
    scorer.conditional.score_rows(continuations, _first_row(timed))  # starts the libraries
    with _count_evaluations(scorer.run.denoiser) as counted:
        start = time.monotonic()
        scorer.conditional.score_rows(continuations, timed)
        seconds = time.monotonic() - start
    rows = sum(len(part.numbers) for part in plan)
    positions = sum(len(part.numbers) * part.shape.positions for part in plan)
    evaluations = round(counted["rows"] / len(timed.numbers) * rows)
    return evaluations, seconds / (len(timed.numbers) * common.positions) * positions


def _first_row(rows: RowBatch) -> RowBatch:
    return RowBatch(rows.numbers[:1], rows.draws[:1], rows.shape)


def _price_samples(
    scorer: RequestScorer, templates: Sequence[Template], settings: Sequence[str]
) -> tuple[int, float]:
    """Return network evaluations and seconds of one sample of each template."""
    if not templates:
        return 0, 0.0
    run = scorer.run
    request = scorer.sample_request(settings)
    sampler = build_sampler(run.recipe, run.model, request.sampler, request.settings, request.steps)
    size = request.batch or run.recipe.sample.batch
    batches = [templates[first : first + size] for first in range(0, len(templates), size)]
    steps = []
    for batch in batches:
        free = max(_count_free(template, run.recipe.length) for template in batch)
        steps.append(free if sampler.steps is None else sampler.steps)
    timer = _StepTimer()
    with suppress(_EnoughSteps):
        draw_templates(run.recipe, run.model, run.tokenizer, batches[0], request, timer)
    # a smaller last batch is counted as a full one
    evaluations = int(np.dot(steps, [len(batch) for batch in batches]))
    return evaluations, timer.seconds_per_step * sum(steps)


def _count_free(template: Template, length: int) -> int:
    """Return the number of positions of a template that are sampled."""
    if template.whole:
        return int((~template.given).sum())
    return length - len(template.ids)


class _EnoughSteps(Exception):
    """Exception that ends a timed sampling."""


class _StepTimer:
    """Callback of a sampler that measures its last step, and ends the sampling early."""

    def __init__(self) -> None:
        self.seconds_per_step = 0.0
        self._last = time.monotonic()

    def __call__(self, step: int, canvas: Canvas) -> None:
        canvas.zt.cpu()  # waits for the device
        now = time.monotonic()
        self.seconds_per_step = now - self._last
        self._last = now
        if step >= TIMED_STEPS:
            raise _EnoughSteps


@contextmanager
def _count_evaluations(denoiser: Denoiser) -> Iterator[dict[str, int]]:
    """Count the rows on which the backbone is evaluated inside the `with` block."""
    counted = {"rows": 0}

    def count(module: Any, arguments: tuple[Any, ...]) -> None:
        counted["rows"] += len(arguments[0])

    hook = denoiser.backbone.register_forward_pre_hook(count)
    try:
        yield counted
    finally:
        hook.remove()
