"""Sampling of a run of several fields: values of every field, pictures, and the judge's input."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.field_targets import Target, parse_target
from ddiff.data.fields_batch import FieldBatch
from ddiff.distributed.ranks import Ranks
from ddiff.errors import ArgumentError, DataError
from ddiff.nn.joint_denoiser import JointContext
from ddiff.nn.joint_network import JointDenoiserNetwork
from ddiff.progress import show_progress
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.runs.fields.batches import find_present
from ddiff.runs.fields.build import FieldsModel, shapes_of
from ddiff.runs.fields.checks import build_joint_sampler, check_target
from ddiff.runs.fields.data import RunFields
from ddiff.runs.fields.given import repeat_given
from ddiff.runs.sampling import check_numbers
from ddiff.sampling.fields import (
    JointSampler,
    OnJointStep,
    generate_fields,
    initial_canvases,
)
from ddiff.training.device import to_device


@dataclass(frozen=True)
class FieldsRequest:
    """Arguments of `FieldsRun.sample`. An argument that is None takes its value from the recipe."""

    count: int | None = None
    target: str | None = None
    given: Mapping[str, Any] = field(default_factory=dict)
    only: Sequence[str] = ()
    steps: int | None = None
    seed: int | None = None
    batch: int | None = None


@dataclass(frozen=True)
class DrawnSamples:
    """Samples of one target.

    Attributes:
        target: fields that were drawn, and fields that were given.
        values: plain values of every drawn and given field, one entry per sample.
        states: tokens [N,n] or normalized vectors [N,n,d] of the same fields, on the CPU.
        nfe: number of network evaluations of every sample.
        numbers: numbers [N] of the validation samples whose fields were given; None if all given
            values came from the caller, or if nothing was given.
    """

    target: Target
    values: Mapping[str, list[Any]]
    states: Mapping[str, Tensor]
    nfe: Sequence[int]
    numbers: NDArray[np.int64] | None

    def to_dicts(self) -> list[dict[str, Any]]:
        """Return one dict per sample."""
        found = []
        for index, nfe in enumerate(self.nfe):
            values = {name: column[index] for name, column in self.values.items()}
            found.append(
                {
                    "index": index,
                    "target": str(self.target),
                    "given": list(self.target.given),
                    "fields": values,
                    "nfe": nfe,
                }
            )
        return found


def draw_fields(
    recipe: FieldsRecipe,
    model: FieldsModel,
    data: RunFields,
    request: FieldsRequest,
    on_step: OnJointStep | None = None,
    ranks: Ranks | None = None,
) -> DrawnSamples:
    """Check the arguments of `FieldsRun.sample` in `request`, then draw samples batch by batch.

    `FieldsRun.sample` explains `on_step` and `ranks`.
    """
    ranks = ranks or Ranks()
    keys = recipe.sample
    count = keys.count if request.count is None else request.count
    seed = keys.seed if request.seed is None else request.seed
    size = keys.batch if request.batch is None else request.batch
    check_numbers(count, size, seed, keys.steps if request.steps is None else request.steps)
    target = choose_target(list(model.fields), request)
    sampler = build_joint_sampler(recipe, shapes_of(data.fields), target, request.steps)
    check_target(model, sampler, target, data.lacking)
    given, plain, numbers = _read_given(data, target, request.given, count, keys.given)
    model.objective.module.eval()  # no dropout
    names = (*target.drawn, *target.given)
    batches = [torch.arange(first, min(first + size, count)) for first in range(0, count, size)]
    own = len(ranks.share(len(batches)))
    with show_progress(own, ranks.label("sampling"), console=ranks.console()) as bar:

        def draw(index: Tensor) -> tuple[dict[str, Tensor], list[int]]:
            parts = {name: _slice(values, index) for name, values in given.items()}
            states, nfe = draw_batch(model, sampler, parts, index, seed, on_step)
            bar.advance()
            return {name: states[name].cpu() for name in names}, nfe

        drawn = ranks.map(draw, batches)
    states = {name: torch.cat([found[name] for found, _ in drawn]) for name in names}
    runs = [evaluations for _, nfe in drawn for evaluations in nfe]
    values = {name: data.fields[name].decode(column) for name, column in states.items()}
    # The result contains each given value as it came from the caller or the data. A value that
    # was normalized and decoded would have rounding errors.
    for name in target.given:
        values[name] = _replace_given(values[name], plain[name])
    return DrawnSamples(target, values, states, runs, numbers)


def draw_batch(
    model: FieldsModel,
    sampler: JointSampler,
    given: Mapping[str, FieldBatch],
    index: Tensor,
    seed: int,
    on_step: OnJointStep | None = None,
) -> tuple[dict[str, Tensor], list[int]]:
    """Draw one batch. Returns the states by field, and the number of evaluations per sample.

    `given`: whole fields to keep. `index` [B]: numbers of the samples. `on_step` is called with 0
    before the first step, and after every step.
    """
    padding = {}
    states = {}
    for name, values in given.items():
        moved = to_device(values, model.device)
        states[name] = (moved.values, None)
        if not bool(values.valid.all()):
            padding[name] = moved.valid
    network = JointDenoiserNetwork(model.denoiser, model.fields, JointContext(padding))
    index = index.to(model.device)
    if on_step is not None:
        on_step(0, initial_canvases(model.fields, index=index, seed=seed, given=states))
    samples = generate_fields(
        sampler,
        model.fields,
        network,
        index=index,
        seed=seed,
        given=states,
        on_step=on_step,
    )
    return dict(samples.states), samples.runs.tolist()


def _slice(values: FieldBatch, index: Tensor) -> FieldBatch:
    return FieldBatch(*(part[index] for part in values))


# ---------------------------------------------------------------------- targets


def choose_target(names: Sequence[str], request: FieldsRequest) -> Target:
    """Return the target of a request.

    Raises ArgumentError if the target contradicts the given fields or `only`.
    """
    for argument, chosen in (("given", request.given), ("only", request.only)):
        unknown = [name for name in chosen if name not in names]
        if unknown:
            raise ArgumentError(
                f"sample: {argument} must name fields of this run ({', '.join(names)}); got "
                f'"{unknown[0]}".'
            )
    if request.target is None:
        drawn = request.only or [name for name in names if name not in request.given]
        text = ", ".join(drawn)
        if request.given:
            text += f" | {', '.join(request.given)}"
        if not drawn:
            raise ArgumentError("sample: all fields are given, so nothing is drawn. Leave one out.")
        return parse_target(text, names)
    if request.only:
        raise ArgumentError(
            f'sample: target "{request.target}" and only = {list(request.only)} exclude each '
            "other, because both choose the drawn fields. Give one of them."
        )
    target = parse_target(request.target, names)
    wrong = [name for name in request.given if name not in target.given]
    if wrong:
        drawn = [name for name in target.drawn if name not in request.given]
        given = [name for name in names if name in request.given or name in target.given]
        advice = "All drawn fields have given values. Leave one of them out."
        if drawn:
            advice = f'Write the field after the bar: "{", ".join(drawn)} | {", ".join(given)}".'
        raise ArgumentError(
            f'sample: target "{target}" does not give "{wrong[0]}", but a value of it was given. '
            f"{advice}"
        )
    return target


# ---------------------------------------------------------------------- given values


def _read_given(
    data: RunFields, target: Target, given: Mapping[str, Any], count: int, most: int | None
) -> tuple[dict[str, FieldBatch], dict[str, list[Any]], NDArray[np.int64] | None]:
    """Return the given values of `count` samples, and the numbers of their validation samples.

    The values are returned as states for the network, and as texts, ids or vectors in units of the
    data. Fields without values in `given` take those of the first `most` validation samples that
    have them (None: of all), again from the first one if these are fewer than `count`.
    """
    found = {}
    plain: dict[str, list[Any]] = {}
    for name, value in given.items():
        repeated = repeat_given(data.fields[name], value, count)
        found[name] = data.fields[name].encode_values(repeated)
        plain[name] = data.fields[name].list_values(repeated)
    missing = [name for name in target.given if name not in found]
    if not missing:
        return found, plain, None
    present = find_present(data, missing)
    if not len(present):
        raise DataError(
            f"sample: no validation sample has the fields {', '.join(missing)} of the target "
            f'"{target}". Give their values.'
        )
    numbers = np.resize(present[:most], count)
    for name in missing:
        found[name] = data.fields[name].encode(numbers, "validation")
        plain[name] = data.fields[name].read_values(numbers, "validation")
    return found, plain, numbers


def _replace_given(decoded: list[dict[str, Any]], plain: list[Any]) -> list[dict[str, Any]]:
    """Return decoded values with the text, ids or vectors that were given.

    The ids of a text stay those that the network has read.
    """
    replaced = []
    for value, given in zip(decoded, plain, strict=True):
        first = next(iter(value))  # "text", "ids" or "vectors"
        replaced.append({**value, first: given})
    return replaced
