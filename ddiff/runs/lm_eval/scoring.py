"""Likelihoods and generated texts for requests of the lm-evaluation-harness, from a text run.

This module does not import the harness.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray

from ddiff.core.times import FlatTimes, TimeRule
from ddiff.errors import ArgumentError
from ddiff.evaluation.conditional import (
    ConditionalScorer,
    Continuation,
    check_draws,
    error_of_sum,
    is_undecided,
)
from ddiff.progress import show_progress
from ddiff.recipe.fields_recipe import require_text_recipe
from ddiff.runs.conditioning import SampleConditions
from ddiff.runs.lm_eval.requests import (
    Encoder,
    Generation,
    Limits,
    make_continuation,
    make_gap,
    make_generation,
    make_windows,
)
from ddiff.runs.prompts import Template
from ddiff.runs.run import Run
from ddiff.runs.sampling import SampleRequest, draw_templates

Greedy = Literal["auto", "always", "never"]
Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Settings:
    """Settings of the evaluation of a run by the harness.

    Attributes:
        draws: draws of times and noise per likelihood: 1, or an even number. More draws narrow the
            Monte-Carlo error. No effect on exact likelihoods.
        seed: seed of times, noise and samples; None: the seeds of [evaluate] and [sample].
        batch: rows per batch; None: [evaluate] batch and [sample] batch. No result depends on it.
        truncate: leave out the beginning of a context that is too long for a row. Otherwise such a
            context is an error.
        greedy: whether the result "is the continuation the greedy one?" is computed, which takes
            one sample. "auto": only for questions with a single continuation, since tasks with
            several answers compare likelihoods.
        sampler: name of a sampler for generated text; None: the sampler of the recipe.
        steps: steps of the sampler; None: [sample] steps.
        settings: `key=value` texts for the sampler, which replace those of the task.
        conditions: name of a condition -> label or vector, for all requests.
    """

    draws: int = 64
    seed: int | None = None
    batch: int | None = None
    truncate: bool = False
    greedy: Greedy = "auto"
    sampler: str | None = None
    steps: int | None = None
    settings: tuple[str, ...] = ()
    conditions: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        check_draws(self.draws)
        if self.greedy not in get_args(Greedy):
            raise ArgumentError(f'greedy must be "auto", "always" or "never"; got {self.greedy!r}.')
        if self.batch is not None and self.batch < 1:
            raise ArgumentError(f"batch must be at least 1; got {self.batch}.")


@dataclass(frozen=True)
class Request:
    """Request of a task.

    Attributes:
        task: name of the task.
        document: number of the document (the question) in the task.
        arguments: (context, continuation), (text,), or (context, generation arguments).
    """

    task: str
    document: int
    arguments: tuple[Any, ...]

    @property
    def key(self) -> str:
        """Key of the random numbers, equal for all answers of a question."""
        return f"{self.task}/{self.document}"

    @property
    def name(self) -> str:
        """Name for messages."""
        return f"task {self.task}, document {self.document}"


@dataclass
class TaskErrors:
    """Likelihoods of the requests of a task, with their Monte-Carlo errors.

    Attributes:
        nats: draws [K] of -ln p of each request.
        sums: draws [K] of the sum of the requests of each question, by the key of the question.
        questions: number of questions with several answers.
        undecided: number of these questions whose most likely answer is uncertain.
    """

    nats: list[Floats] = field(default_factory=list)
    sums: dict[str, Floats] = field(default_factory=dict)
    questions: int = 0
    undecided: int = 0

    def add(self, key: str, draws: Floats) -> None:
        """Add the draws [K] of a request to the question with this key."""
        self.nats.append(draws)
        self.sums[key] = self.sums.get(key, 0.0) + draws

    def to_dict(self) -> dict[str, Any]:
        """Return the sum over the requests, with its error; None if an error is unknown."""
        nats = np.stack(self.nats)
        # The answers of a question share their random numbers, so their errors do not cancel.
        # Only the sums of different questions are independent.
        total = error_of_sum(np.stack(list(self.sums.values())))
        single = error_of_sum(nats)
        return {
            "requests": len(nats),
            "nats": float(nats.mean(-1).sum()),
            "standard_error_nats": None if total is None else total.standard,
            "half_width_nats": None if total is None else total.half_width,
            "request_standard_error_nats": (
                None if single is None else single.standard / math.sqrt(len(nats))
            ),
            "questions": self.questions,
            "undecided": self.undecided / self.questions if self.questions else None,
        }


class RequestScorer:
    """Answers requests of the harness with a text run.

    Args:
        run: the run.
        settings: settings of the evaluation.

    Attributes:
        errors: Monte-Carlo errors of the likelihoods, by task.
        num_truncated: number of requests whose context was truncated.
        sampled: settings of the sampler, number of samples and mean number of network evaluations
            per sample, of each group of samples.
        encoder: encoder of the texts, which counts texts that the tokenizer changes.

    Raises ArgumentError for a run of several fields, and if a condition is missing.
    """

    def __init__(self, run: Run, settings: Settings) -> None:
        require_text_recipe(run.recipe, "lm-eval")
        self.run = run
        self.settings = settings
        self.encoder = Encoder(run.tokenizer)
        self.limits = Limits(run.recipe.length, settings.truncate)
        self.errors: dict[str, TaskErrors] = {}
        self.num_truncated = 0
        self.sampled: list[dict[str, Any]] = []
        keys = run.recipe.evaluate
        conditions = SampleConditions.parse(run.denoiser, settings.conditions, 1)
        self.conditional = ConditionalScorer(
            run.objective,
            self._times_for,
            longest=run.recipe.length,
            draws=settings.draws,
            seed=keys.seed if settings.seed is None else settings.seed,
            batch=settings.batch or keys.batch,
            device=run.device,
            conditions=conditions.values,
        )

    @property
    def is_exact(self) -> bool:
        """True if likelihoods are exact, False if they are lower bounds of ln p."""
        return self.run.objective.bound == "NLL"

    # ------------------------------------------------------------------ likelihood

    def encode_pairs(self, requests: Sequence[Request]) -> list[Continuation]:
        """Return the continuation of each request (context, continuation)."""
        continuations = []
        for request in requests:
            context, continuation = request.arguments
            pair = self.encoder.encode_pair(context, continuation, request.name)
            made, is_cut = make_continuation(pair, request.key, request.name, self.limits)
            self.num_truncated += is_cut
            continuations.append(made)
        return continuations

    def encode_documents(self, requests: Sequence[Request]) -> list[list[Continuation]]:
        """Return the windows of the text of each request (text,)."""
        documents = []
        for request in requests:
            ids = self.encoder.encode_document(request.arguments[0], request.name)
            documents.append(make_windows(ids, request.key, self.limits))
        return documents

    def score_pairs(self, requests: Sequence[Request]) -> list[tuple[float, bool]]:
        """Return ln p(continuation | context) and whether the continuation is the greedy one.

        The first is exact, or the estimate of a lower bound.
        """
        continuations = self.encode_pairs(requests)
        nats = self._score(continuations)
        self._record(requests, nats, _group(continuations))
        is_greedy = np.zeros(len(requests), dtype=bool)
        asked = self.find_greedy(continuations)
        if asked:
            chosen = [continuations[number] for number in asked]
            is_greedy[asked] = self._compare_greedy(chosen)
        means = nats.mean(-1)
        return [(-float(mean), bool(same)) for mean, same in zip(means, is_greedy)]

    def score_documents(self, requests: Sequence[Request]) -> list[float]:
        """Return ln p of each text, the sum over its windows."""
        documents = self.encode_documents(requests)
        every = [window for windows in documents for window in windows]
        owner = np.repeat(np.arange(len(documents)), [len(windows) for windows in documents])
        nats = self._score(every)
        # windows have separate random numbers, so the draws of their sum are draws of the text
        sums = np.zeros((len(documents), nats.shape[1]))
        np.add.at(sums, owner, nats)
        self._record(requests, sums, {})
        return [-float(mean) for mean in sums.mean(-1)]

    def find_greedy(self, continuations: Sequence[Continuation]) -> list[int]:
        """Return the numbers of the continuations that are compared with a greedy sample."""
        if self.settings.greedy == "never":
            return []
        asked = list(range(len(continuations)))
        if self.settings.greedy == "auto":
            groups = _group(continuations).values()
            asked = [numbers[0] for numbers in groups if len(numbers) == 1]
        if asked and self.run.denoiser.parameterization.predicts != "distribution":
            raise ArgumentError(
                "greedy: this run predicts scores, from which no greedy continuation can be drawn. "
                'Pass greedy="never" (--greedy never). Metrics that count greedy continuations, '
                "such as acc of tasks with one continuation, are then 0 and have no meaning."
            )
        return asked

    def _score(self, continuations: Sequence[Continuation]) -> Floats:
        self.run.objective.module.eval()  # no dropout
        rows = len(continuations) * self.conditional.draws
        with show_progress(rows, "scoring") as bar:
            return self.conditional.score(continuations, bar)

    def _record(
        self, requests: Sequence[Request], nats: Floats, questions: Mapping[str, list[int]]
    ) -> None:
        """Add the draws [N,K] of N requests to the errors of their tasks.

        `questions` has the numbers of the requests of each question.
        """
        for request, draws in zip(requests, nats):
            self.errors.setdefault(request.task, TaskErrors()).add(request.key, draws)
        for numbers in questions.values():
            if len(numbers) > 1:
                task = self.errors[requests[numbers[0]].task]
                task.questions += 1
                task.undecided += is_undecided(nats[numbers])

    def _times_for(self, tokens: int) -> TimeRule:
        # an objective without times computes the exact likelihood and draws none
        times = self.run.objective.times or FlatTimes()
        return times.with_window(*self.run.recipe.evaluate.window, tokens)

    # ------------------------------------------------------------------ generation

    def encode_generations(self, requests: Sequence[Request]) -> list[Generation]:
        """Return the generation of each request (context, generation arguments)."""
        generations = []
        for request in requests:
            context, options = request.arguments
            made = make_generation(context, options, request.name, self.encoder, self.limits)
            self.num_truncated += made.is_cut
            generations.append(made)
        return generations

    def generate(self, requests: Sequence[Request]) -> list[str]:
        """Return the generated text of each request."""
        generations = self.encode_generations(requests)
        by_settings: dict[tuple[str, ...], list[int]] = {}
        for number, generation in enumerate(generations):
            by_settings.setdefault(generation.settings, []).append(number)
        texts = [""] * len(generations)
        for settings, numbers in by_settings.items():
            templates = [generations[number].template for number in numbers]
            for number, ids in zip(numbers, self._draw(templates, settings)):
                texts[number] = generations[number].finish(ids, self.run.tokenizer)
        return texts

    def sample_request(self, settings: Sequence[str]) -> SampleRequest:
        """Return the arguments of the sampler; `settings` are those of the task."""
        own = self.settings
        return SampleRequest(
            count=1,
            steps=own.steps,
            seed=own.seed,
            batch=own.batch,
            conditions=own.conditions,
            guidance=None if own.conditions else 1.0,
            sampler=own.sampler,
            settings=(*settings, *own.settings),
        )

    def _draw(self, templates: Sequence[Template], settings: Sequence[str]) -> list[list[int]]:
        """Return the token ids of one sample of each template."""
        run = self.run
        request = self.sample_request(settings)
        drawn = draw_templates(run.recipe, run.model, run.tokenizer, templates, request)
        self.sampled.append(
            {
                "settings": list(request.settings),
                "samples": len(drawn),
                "nfe": float(np.mean([sample["nfe"] for sample in drawn])),
            }
        )
        return [sample["ids"] for sample in drawn]

    def _compare_greedy(self, continuations: Sequence[Continuation]) -> list[bool]:
        """Return whether the sampler draws each continuation at temperature 0 in its gap."""
        templates = [make_gap(continuation) for continuation in continuations]
        drawn = self._draw(templates, ["temperature=0"])
        same = []
        for continuation, ids in zip(continuations, drawn):
            same.append(tuple(ids[len(continuation.context) :]) == continuation.tokens)
        return same


def _group(continuations: Sequence[Continuation]) -> dict[str, list[int]]:
    """Return the numbers of the continuations with each key."""
    groups: dict[str, list[int]] = {}
    for number, continuation in enumerate(continuations):
        groups.setdefault(continuation.key, []).append(number)
    return groups
