"""Model of a server: makes rows from requests, and draws batches of rows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from ddiff.errors import ArgumentError
from ddiff.runs.conditioning import SampleConditions, SamplingPlan
from ddiff.runs.prompts import (
    Template,
    check_no_suffix,
    encode_infill,
    encode_prompt,
    make_frame,
)
from ddiff.runs.run import Run
from ddiff.runs.sampling import build_sampler, find_left_to_right, make_plan
from ddiff.runs.trajectory import find_start, find_undrawn, hide_undrawn
from ddiff.sampling.loop import Canvas, generate
from ddiff.serve.requests import BatchKey, Row, SamplingOptions

OnStates = Callable[[int, Callable[[int], list[int]]], None]
"""on_states(step, states) after each step; states(k) are the states of row k of the batch."""


@dataclass(frozen=True)
class Drawn:
    """Sample of a row: token ids and number of network evaluations."""

    ids: list[int]
    nfe: int


class RunEngine:
    """Model of a trained run.

    `draw` is called by one thread only. The other methods do not evaluate the network, and may be
    called by other threads.
    """

    def __init__(self, run: Run) -> None:
        self.run = run
        self.name = run.recipe.name
        self.length = run.recipe.length
        self.tokenizer = run.tokenizer
        self.start = find_start(run)
        self._undrawn = find_undrawn(run)
        run.objective.module.eval()  # no dropout

    def encode_prompts(self, texts: Sequence[str], room: int | None) -> list[Template]:
        """Return the templates of prompts that are continued by `room` tokens.

        None: the samples have the length of the run. Raises ArgumentError if a prompt and its
        continuation are longer than the samples.
        """
        return [self._encode_prompt(text, room) for text in texts]

    def _encode_prompt(self, text: str, room: int | None) -> Template:
        template = encode_prompt(text, self.tokenizer, self.length)
        size = len(template.ids)
        left = self.length - size
        if left == 0:
            raise ArgumentError(
                f"prompt: the model has {self.length} positions ([data] length of the run); got a "
                f"prompt of {size} tokens, which leaves no position. Shorten the prompt."
            )
        if room is None:
            return template
        if room > left:
            raise ArgumentError(
                f"max_tokens: the prompt has {size} tokens and the model {self.length} positions, "
                f"so max_tokens must be at most {left}; got {room}. Leave it out for all positions."
            )
        ids = torch.cat([template.ids, torch.zeros(room, dtype=torch.long)])
        given = torch.cat([template.given, torch.zeros(room, dtype=torch.bool)])
        return Template(text, ids, given, whole=True)

    def encode_infills(self, texts: Sequence[str]) -> list[Template]:
        """Return the templates of infill texts."""
        return [encode_infill(text, self.tokenizer, self.length) for text in texts]

    def make_rows(
        self, templates: Sequence[Template], seed: int, options: SamplingOptions
    ) -> list[Row]:
        """Return the rows of a request. Raises an error if the run cannot draw them."""
        run = self.run
        sampler = build_sampler(
            run.recipe, run.model, options.sampler, options.settings, options.steps
        )
        plan = make_plan(run.recipe, run.model, sampler, options.conditions, options.guidance, 1)
        if found := find_left_to_right(plan):
            check_no_suffix(templates, *found)
        return [
            Row(template, seed, index, plan, self._make_key(template, plan, options))
            for index, template in enumerate(templates)
        ]

    def _make_key(
        self, template: Template, plan: SamplingPlan, options: SamplingOptions
    ) -> BatchKey:
        return BatchKey(
            options.sampler,
            options.settings,
            options.steps,
            tuple(sorted(plan.conditions.values)),
            plan.guidance,
            # The attention mask of a batch selects the attention kernel, so that a text with an end
            # in the batch would change the rounding of other rows.
            has_end=template.whole and self.tokenizer.fill_id is None,
        )

    def draw(self, rows: Sequence[Row], on_states: OnStates) -> list[Drawn]:
        """Draw rows with equal keys in one batch."""
        plan = _join_plans([row.plan for row in rows])
        device = self.run.device
        frame = make_frame([row.template for row in rows], self.length, self.tokenizer).to(device)

        def on_step(step: int, canvas: Canvas) -> None:
            shown = hide_undrawn(canvas, self._undrawn)
            on_states(step, lambda row: shown[row].tolist())

        drawn = generate(
            plan.sampler,
            self.run.process,
            plan.network(slice(0, len(rows)), frame.valid),
            index=torch.tensor([row.index for row in rows], device=device),
            length=self.length,
            seed=[row.seed for row in rows],
            prompt=frame.tokens,
            prompt_mask=frame.clamped,
            on_step=on_step,
        )
        found = []
        for row, ids, nfe in zip(rows, drawn.ids.tolist(), drawn.runs.tolist()):
            end = len(row.template.ids) if row.template.whole else self.length
            found.append(Drawn(ids[:end], nfe))
        return found


def _join_plans(plans: Sequence[SamplingPlan]) -> SamplingPlan:
    """Return the plan of a batch from plans of one sample, which differ only in conditions."""
    first = plans[0]
    values = {
        name: torch.cat([plan.conditions.values[name] for plan in plans])
        for name in first.conditions.values
    }
    return replace(first, conditions=SampleConditions(values))
