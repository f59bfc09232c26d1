"""Editing of texts with a run: some tokens are noised and sampled again under a condition."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ddiff.core.network import Predicts
from ddiff.data.condition_forms import Label
from ddiff.data.paths import printable
from ddiff.data.tokenizer import Tokenizer
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, DataError
from ddiff.nn.denoiser import Denoiser
from ddiff.recipe.model import Recipe
from ddiff.runs.build import Model
from ddiff.runs.conditioning import SamplingPlan
from ddiff.runs.prompts import Template, as_list, encode_source, make_frame
from ddiff.runs.sampling import build_sampler, check_numbers, draw_batches, make_plan
from ddiff.sampling.editing import EditMode, check_edit, edit
from ddiff.sampling.loop import OnStep, Sampler


@dataclass(frozen=True)
class EditRequest:
    """Arguments of `Run.edit`. An argument that is None takes its value from the recipe."""

    texts: str | Sequence[str]
    ratio: float = 0.3
    mode: EditMode = "random"
    conditions: Mapping[str, Any] | None = None
    guidance: float | None = None
    steps: int | None = None
    sampler: str | Sampler | None = None
    settings: Sequence[str] = ()
    seed: int | None = None
    batch: int | None = None


def edit_texts(
    recipe: Recipe,
    model: Model,
    tokenizer: Tokenizer,
    request: EditRequest,
    on_step: OnStep | None = None,
    ranks: Ranks | None = None,
) -> list[dict[str, Any]]:
    """Check the arguments of `Run.edit` in `request`, then edit the texts batch by batch.

    `Run.edit` explains the arguments and the result.
    """
    if model.process is None or model.denoiser.inputs == "previous":
        raise ArgumentError(
            "run.edit: an edit noises tokens and samples them between their neighbours, but the "
            "network of this run is autoregressive and attends only to earlier tokens. Use a run "
            "with a diffusion process, or continue the text with run.sample(prompt=...)."
        )
    sources = as_list(request.texts)
    if not sources:
        raise ArgumentError("run.edit: texts must have at least one text; got an empty list.")
    keys = recipe.sample
    seed = keys.seed if request.seed is None else request.seed
    batch = keys.batch if request.batch is None else request.batch
    templates = [encode_source(text, tokenizer, recipe.length) for text in sources]
    steps = keys.steps if request.steps is None else request.steps
    check_numbers(len(templates), batch, seed, steps)
    sampler = build_sampler(recipe, model, request.sampler, request.settings, request.steps)
    predicts: Predicts = model.denoiser.parameterization.predicts
    check_edit(sampler, model.process, predicts, request.ratio, request.mode)
    total = len(templates)
    plan = make_plan(recipe, model, sampler, request.conditions, request.guidance, total)
    editor = _BatchEditor(plan, tokenizer, recipe.length, request, seed)

    def draw(numbers: slice, report: OnStep) -> list[dict[str, Any]]:
        return editor.edit(numbers, templates[numbers], report)

    return draw_batches(plan, draw, total, batch, "editing", on_step, ranks)


def add_target(
    recipe: Recipe,
    denoiser: Denoiser,
    conditions: Mapping[str, Any] | None,
    path: str | Path,
) -> dict[str, Any]:
    """Add the vectors of a .npy file to the conditions, under the name of the vector condition.

    `conditions` are the given conditions; None selects those of the recipe. The file contains one
    vector [d] for all texts or one per text [n,d]. Raises ArgumentError if the denoiser does not
    read exactly one vector condition, or if this condition is also given.
    """
    names = []
    for name in denoiser.condition_dropout:
        if not isinstance(denoiser.condition_forms.get(name), Label):
            names.append(name)
    if len(names) != 1:
        raise ArgumentError(
            "--toward: the run must read exactly one vector condition ([denoiser] conditions); it "
            f"reads {sorted(names) or 'none'}. Give the target with --condition NAME=VALUE."
        )
    if conditions is not None and names[0] in conditions:
        raise ArgumentError(
            f'--toward: the condition "{names[0]}" is also given by --condition. Give it once.'
        )
    shown = printable(str(path))
    try:
        vectors = np.load(path, allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise DataError(
            f"--toward: {shown} cannot be read as a .npy file of numbers: {error}. Write it with "
            "numpy.save."
        ) from error
    if not isinstance(vectors, np.ndarray) or vectors.dtype.kind not in "fiu":
        raise DataError(
            f"--toward: {shown} must contain one array of real numbers, [d] or [texts,d]. Write it "
            "with numpy.save."
        )
    base = recipe.sample.conditions if conditions is None else conditions
    return {**base, names[0]: vectors.astype(np.float32)}


class _BatchEditor:
    """Editor of batches of texts, which returns each edited text as a dictionary."""

    def __init__(
        self,
        plan: SamplingPlan,
        tokenizer: Tokenizer,
        length: int,
        request: EditRequest,
        seed: int,
    ) -> None:
        self.plan = plan
        self.tokenizer = tokenizer
        self.length = length
        self.request = request
        self.seed = seed

    def edit(
        self, numbers: slice, templates: Sequence[Template], on_step: OnStep
    ) -> list[dict[str, Any]]:
        """Edit the texts with indices `numbers`; `on_step` is called after every sampling step."""
        process = self.plan.model.process
        assert process is not None
        device = self.plan.model.device
        frame = make_frame(templates, self.length, self.tokenizer).to(device)
        done = edit(
            self.plan.sampler,
            process,
            self.plan.network(numbers, frame.valid),
            source=frame.tokens,
            editable=~frame.clamped,
            ratio=self.request.ratio,
            mode=self.request.mode,
            index=torch.arange(numbers.start, numbers.stop, device=device),
            seed=self.seed,
            on_step=on_step,
        )
        sizes = [len(template.ids) for template in templates]
        ids = [row[:size] for row, size in zip(done.samples.ids.tolist(), sizes, strict=True)]
        texts = self.tokenizer.decode(ids)
        runs = done.samples.runs.tolist()
        return [
            {
                "index": numbers.start + row,
                "source": template.text,
                "text": texts[row],
                "ids": ids[row],
                "edited": done.edited[row].nonzero().squeeze(-1).tolist(),
                "ratio": self.request.ratio,
                "mode": self.request.mode,
                "nfe": runs[row],
            }
            for row, template in enumerate(templates)
        ]
