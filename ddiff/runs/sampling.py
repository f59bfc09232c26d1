"""Sampling from a run: text, token ids and number of network evaluations of each sample."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ddiff.data.chat import read_answer
from ddiff.data.tokenizer import Tokenizer
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, shorten
from ddiff.plugin.config import COUNTS
from ddiff.progress import Progress, show_progress
from ddiff.recipe.model import Recipe
from ddiff.recipe.resolve import configure_sampler
from ddiff.runs.build import Model
from ddiff.runs.conditioning import SampleConditions, SamplingPlan
from ddiff.runs.prompts import Template, check_no_suffix, make_frame, make_templates
from ddiff.sampling.loop import Canvas, OnStep, Sampler, generate


@dataclass(frozen=True)
class SampleRequest:
    """Arguments of `Run.sample`. An argument that is None takes its value from the recipe."""

    count: int | None = None
    steps: int | None = None
    seed: int | None = None
    batch: int | None = None
    prompt: str | Sequence[str] | None = None
    infill: str | Sequence[str] | None = None
    conditions: Mapping[str, Any] | None = None
    guidance: float | None = None
    sampler: str | Sampler | None = None
    settings: Sequence[str] = ()


def build_sampler(
    recipe: Recipe,
    model: Model,
    sampler: str | Sampler | None = None,
    settings: Sequence[str] = (),
    steps: int | None = None,
) -> Sampler:
    """Build the sampler of the recipe, or the sampler that is named `sampler`.

    `settings`: `key=value` texts that override keys of the sampler. If `sampler` is a sampler
    object, the object is returned unchanged. Raises ArgumentError if settings or steps are given
    together with a sampler object.
    """
    if sampler is not None and not isinstance(sampler, str):
        if settings or steps is not None:
            raise ArgumentError(
                "run.sample: steps and settings apply to the name of a sampler; got a sampler "
                "object, which has its own steps and settings. Leave both arguments out."
            )
        return sampler
    spec = configure_sampler(recipe, sampler, settings)
    steps = _or_default(steps, recipe.sample.steps)
    return spec.build(steps=steps, vocabulary=model.vocabulary)


def draw_samples(
    recipe: Recipe,
    model: Model,
    tokenizer: Tokenizer,
    request: SampleRequest,
    on_step: OnStep | None = None,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """Check the arguments of `Run.sample` in `request`, then draw samples batch by batch.

    `Run.sample` explains the arguments and the result.
    """
    templates = make_templates(request.prompt, request.infill, tokenizer, recipe.length)
    return draw_templates(recipe, model, tokenizer, templates, request, on_step, ranks)


def draw_templates(
    recipe: Recipe,
    model: Model,
    tokenizer: Tokenizer,
    templates: Sequence[Template],
    request: SampleRequest,
    on_step: OnStep | None = None,
    ranks: Ranks | None = None,
    title: str = "sampling",
) -> list[dict[str, Any]]:
    """Draw samples that contain the given tokens of templates.

    Without templates, every token is sampled. The prompts and infill texts of `request` are not
    read. `title` names the progress bar. `Run.sample` explains the other arguments and the result.
    """
    keys = recipe.sample
    seed = _or_default(request.seed, keys.seed)
    batch = _or_default(request.batch, keys.batch)
    count = _or_default(request.count, keys.count if len(templates) <= 1 else 1)
    check_numbers(count, batch, seed, _or_default(request.steps, keys.steps))
    per_sample = [template for template in templates for _ in range(count)]
    total = len(per_sample) or count  # without templates, every position is sampled
    sampler = build_sampler(recipe, model, request.sampler, request.settings, request.steps)
    plan = make_plan(recipe, model, sampler, request.conditions, request.guidance, total)
    _check_suffixes(templates, plan)
    writer = _BatchSampler(plan, tokenizer, recipe.length, seed)

    def draw(numbers: slice, report: OnStep) -> list[dict[str, Any]]:
        return writer.draw(numbers, per_sample[numbers], report)

    return draw_batches(plan, draw, total, batch, title, on_step, ranks)


def make_plan(
    recipe: Recipe,
    model: Model,
    sampler: Sampler,
    conditions: Mapping[str, Any] | None,
    guidance: float | None,
    total: int,
) -> SamplingPlan:
    """Return the plan of `total` samples, with conditions and guidance of the recipe by default."""
    keys = recipe.sample
    values = keys.conditions if conditions is None else conditions
    weight = keys.guidance if guidance is None else guidance
    parsed = SampleConditions.parse(model.denoiser, values, total)
    return SamplingPlan.check(model, sampler, parsed, weight, recipe.length)


def draw_batches(
    plan: SamplingPlan,
    draw: Callable[[slice, OnStep], list[dict[str, Any]]],
    total: int,
    batch: int,
    title: str,
    on_step: OnStep | None,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """Draw `total` samples in batches, with a progress bar.

    Args:
        plan: plan of the samples.
        draw: draw(numbers, on_step) returns the samples with indices `numbers`.
        total: number of samples.
        batch: largest number of samples in a batch.
        title: text of the progress bar.
        on_step: called after each sampling step of a batch of this process.
        ranks: processes that divide the batches; None: only this process.
    """
    ranks = ranks or Ranks()
    plan.model.objective.module.eval()  # no dropout
    batches = [slice(first, min(first + batch, total)) for first in range(0, total, batch)]
    # None: the number of steps is random, and the progress bar has no end
    steps = plan.sampler.steps
    own = None if steps is None else len(ranks.share(len(batches))) * steps
    with show_progress(own, ranks.label(title), console=ranks.console()) as bar:
        report = _report_steps(bar, on_step)
        parts = ranks.map(lambda numbers: draw(numbers, report), batches)
    return [sample for part in parts for sample in part]


def find_left_to_right(plan: SamplingPlan) -> tuple[str, str] | None:
    """Return the part of a plan that ignores the tokens after a gap, and what to use instead.

    An autoregressive network and some samplers ignore these tokens. Returns None if the network and
    the sampler attend to both sides of a gap.
    """
    if plan.model.denoiser.inputs == "previous":
        return "this run's network", "a run whose network attends to both sides"
    if not plan.sampler.looks_ahead:
        remedy = (
            "a sampler that attends to later positions (ancestral, or blockwise with sight=all) if "
            "the network was trained to do so"
        )
        return f"the sampler {type(plan.sampler).__name__}", remedy
    return None


def _check_suffixes(templates: Sequence[Template], plan: SamplingPlan) -> None:
    """Raise ArgumentError if a template has text after a gap and later tokens are ignored."""
    if found := find_left_to_right(plan):
        check_no_suffix(templates, *found)


def _report_steps(bar: Progress, on_step: OnStep | None) -> OnStep:
    """Return a callback that advances a progress bar by one step and then calls `on_step`."""

    def report(step: int, canvas: Canvas) -> None:
        bar.advance(1)
        if on_step:
            on_step(step, canvas)

    return report


class _BatchSampler:
    """Sampler of batches, which returns each sample as a dictionary."""

    def __init__(self, plan: SamplingPlan, tokenizer: Tokenizer, length: int, seed: int) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self.length = length
        self.seed = seed

    def draw(
        self, numbers: slice, templates: Sequence[Template], on_step: OnStep
    ) -> list[dict[str, Any]]:
        """Draw the samples with indices `numbers`.

        `templates` has the prompt or infill text of each sample, or is empty. `on_step` is called
        after every sampling step.
        """
        device = self.plan.model.device
        # The index of a sample keys the random generator, so a sample does not depend on its batch.
        index = torch.arange(numbers.start, numbers.stop, device=device)
        frame = None
        if templates:
            frame = make_frame(templates, self.length, self.tokenizer).to(device)
        drawn = generate(
            self.plan.sampler,
            self.plan.model.process,
            self.plan.network(numbers, frame.valid if frame else None),
            index=index,
            length=self.length,
            seed=self.seed,
            prompt=frame.tokens if frame else None,
            prompt_mask=frame.clamped if frame else None,
            on_step=on_step,
        )
        ids = self._cut(drawn.ids.tolist(), templates)
        texts = self.tokenizer.decode(ids)
        runs = drawn.runs.tolist()
        return [
            {
                "index": number,
                **_template_field(templates, row),
                **self._answer_field(templates, row, ids[row]),
                "text": texts[row],
                "ids": ids[row],
                "nfe": runs[row],
            }
            for row, number in enumerate(index.tolist())
        ]

    def _answer_field(
        self, templates: Sequence[Template], row: int, ids: list[int]
    ) -> dict[str, str]:
        """Return the field `answer` of a sample; an empty dict if its prompt is not a message."""
        start = templates[row].answer if templates else None
        if start is None:
            return {}
        return {"answer": read_answer(ids[start:], self.tokenizer)}

    def _cut(self, rows: list[list[int]], templates: Sequence[Template]) -> list[list[int]]:
        """Truncate each sample of an infill text to the length of that text.

        `rows` are the token ids of the samples, and `templates` their prompts or infill texts.
        Samples of prompts keep their length.
        """
        if not templates:
            return rows
        return [
            row[: len(template.ids)] if template.whole else row
            for row, template in zip(rows, templates, strict=True)
        ]


def _template_field(templates: Sequence[Template], row: int) -> dict[str, str]:
    if not templates:
        return {}
    template = templates[row]
    if template.answer is not None:
        return {"message": template.text}
    return {"infill" if template.whole else "prompt": template.text}


def check_numbers(count: int, batch: int, seed: int, steps: int) -> None:
    """Raise ArgumentError if the count of samples, batch size, seed or step count is invalid."""
    for name, number in (("count", count), ("batch", batch), ("steps", steps)):
        if not 1 <= number < COUNTS:
            raise ArgumentError(
                f"run.sample: {name} must be at least 1 and below 2^31; got {shorten(str(number))}."
            )
    if not 0 <= seed < 2**64:
        raise ArgumentError(f"run.sample: seed must be in [0, 2^64); got {shorten(str(seed))}.")


def _or_default(value: int | None, default: int) -> int:
    return default if value is None else value
