"""Conditions, guidance and cache of the network that a sampler queries.

conditions = SampleConditions.parse(model.denoiser, {"author": 2}, count=8)
plan = SamplingPlan.check(model, sampler, conditions, guidance=1.5, length=128)
network = plan.network(slice(0, 4))  # of the first four samples
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.information import IdentityTime
from ddiff.data.condition_forms import Form, Label, Vector
from ddiff.errors import ArgumentError, suggest
from ddiff.nn.denoiser import Context, Denoiser
from ddiff.nn.network import as_network
from ddiff.plugin.config import LARGEST
from ddiff.recipe.model import Recipe
from ddiff.runs.build import Model, ModelObjective
from ddiff.sampling.loop import Sampler
from ddiff.sampling.shaping import guide_network


@dataclass(frozen=True)
class SampleConditions:
    """Conditions of some samples by name: labels [B] long, vectors [B,d] float32."""

    values: Mapping[str, Tensor]

    @classmethod
    def parse(
        cls, denoiser: Denoiser, conditions: Mapping[str, Any], count: int
    ) -> SampleConditions:
        """Read the conditions of `count` samples, one value for all of them or one for each.

        Each is a label or a vector, as the backbone declares in `condition_forms`; without a
        declaration whole numbers are labels and fractions vectors. Raises ArgumentError for a
        condition that the denoiser does not read, for a value of another form, and for a missing
        condition that no training sample was without.
        """
        known = denoiser.condition_dropout
        for name in conditions:
            if name not in known:
                raise ArgumentError(
                    f"conditions: this denoiser reads {sorted(known) or 'no conditions'}; got "
                    f'"{name}".{suggest(name, known)} [denoiser] conditions says what a run is '
                    "trained with."
                )
        due = [name for name, share in known.items() if share == 0.0 and name not in conditions]
        if due:
            raise ArgumentError(
                f'conditions: "{due[0]}" was given with every training sample (its dropout is 0), '
                "so the model has no distribution without it. Give it: [sample] conditions, "
                f"--condition {due[0]}=... or conditions={{...}}."
            )
        forms = denoiser.condition_forms
        values = {
            name: _parse_values(name, value, count, forms.get(name))
            for name, value in conditions.items()
        }
        return cls(values)

    def rows(self, samples: slice) -> SampleConditions:
        """Select the conditions of some of the samples."""
        return SampleConditions({name: value[samples] for name, value in self.values.items()})

    def to(self, device: torch.device) -> SampleConditions:
        """Move every value to `device`."""
        return SampleConditions({name: value.to(device) for name, value in self.values.items()})


def _parse_values(name: str, value: Any, count: int, declared: Form | None) -> Tensor:
    """Read one condition as [count] or [count,d]; ArgumentError if it does not have the form."""
    try:
        values = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _form_error(name, value, count, declared) from error
    form = declared or (Vector() if values.is_floating_point() else Label())
    parsed = None
    if values.dtype != torch.bool:  # True is not the label 1
        if isinstance(form, Label):
            parsed = _parse_labels(values, count, form)
        else:
            parsed = _parse_vectors(values.float(), count, form)
    if parsed is None:
        raise _form_error(name, value, count, declared)
    return parsed


def _parse_labels(values: Tensor, count: int, form: Label) -> Tensor | None:
    """[count] long; None for fractions, another number of values, and labels out of range."""
    if values.is_floating_point() or values.dim() > 1:
        return None
    if values.dim() == 1 and len(values) != count:
        return None
    outside = values < 0
    if form.classes is not None:
        outside = outside | (values >= form.classes)
    if bool(outside.any()):
        return None
    return values.long().expand(count)


def _parse_vectors(values: Tensor, count: int, form: Vector) -> Tensor | None:
    """[count,d] float32; None for another number of vectors or width, and for NaN or infinity."""
    # not finite: NaN marks an absent vector in training and must not come in by mistake
    if values.dim() not in (1, 2) or not bool(values.isfinite().all()):
        return None
    if values.dim() == 2 and len(values) != count:
        return None
    width = values.shape[-1]
    if form.width and width != form.width:
        return None
    return values.expand(count, width)


def _form_error(name: str, value: Any, count: int, form: Form | None) -> ArgumentError:
    shown = list(value) if isinstance(value, tuple) else repr(value)
    return ArgumentError(
        f'conditions: "{name}" is {form or f"{Label()} or {Vector()}"}. Give one, or {count} of '
        f"them, one per sample; got {shown}."
    )


@dataclass(frozen=True)
class SamplingPlan:
    """A sampler with the model and the conditions that it draws from, checked to fit together.

    `check` makes one, before anything is drawn; `network` then binds it to each batch.
    """

    model: Model
    sampler: Sampler
    conditions: SampleConditions
    guidance: float
    is_cached: bool

    @classmethod
    def check(
        cls,
        model: Model,
        sampler: Sampler,
        conditions: SampleConditions,
        guidance: float,
        length: int,
    ) -> SamplingPlan:
        """Return the plan; ArgumentError if this sampler cannot draw from this model.

        Args:
            model: the denoiser with its process and objective.
            sampler: must suit the process and what the denoiser predicts.
            conditions: of all samples.
            guidance: classifier-free guidance weight; 1 is off.
            length: tokens of a sample.
        """
        if not 0.0 <= guidance < LARGEST:
            raise ArgumentError(
                f"guidance: must be a number in [0, {LARGEST:g}); got {guidance}. 1 is off, 2 to 8 "
                "are usual, and far above that only the likeliest token under the condition is "
                "left."
            )
        # here and again in `generate`, but here before a run is trained
        sampler.check_supported(model.process, model.denoiser.parameterization.predicts)
        if guidance != 1.0:
            _check_guidance(model.denoiser, conditions, guidance)
        _check_windows(model.objective, sampler, length)
        is_cached = sampler.cached and model.denoiser.caches
        return cls(model, sampler, conditions, guidance, is_cached)

    def network(self, samples: slice, valid: Tensor | None = None) -> Network:
        """Return the network of a batch of samples, under their conditions and with guidance.

        `valid` [B,L] is False at positions beyond the end of a text; None: there are none.
        """
        # moved here, batch by batch: vectors of all samples may not fit on the device
        conditions = self.conditions.rows(samples).to(self.model.device)
        network = self._network(Context(valid, None, conditions.values))
        if self.guidance == 1.0:
            return network
        # The unconditional network has a separate cache: its hidden states differ.
        return guide_network(network, self._network(Context(valid)), self.guidance)

    def _network(self, context: Context) -> Network:
        return as_network(self.model.denoiser, self.model.process, context, self.is_cached)


def check_sampling(recipe: Recipe, model: Model) -> SamplingPlan:
    """Plan the samples at the end of a run; ArgumentError if they cannot be drawn."""
    keys = recipe.sample
    sampler = recipe.sampler.build(steps=keys.steps, vocabulary=model.vocabulary)
    conditions = SampleConditions.parse(model.denoiser, keys.conditions, keys.count)
    return SamplingPlan.check(model, sampler, conditions, keys.guidance, recipe.length)


def _check_guidance(denoiser: Denoiser, conditions: SampleConditions, guidance: float) -> None:
    """Raise ArgumentError unless the model was also trained without each condition."""
    if not conditions.values:
        raise ArgumentError(
            f"guidance: {guidance} needs a condition to be guided by; got none. Give one, "
            "--condition NAME=VALUE, or leave guidance at 1."
        )
    for name in conditions.values:
        if denoiser.condition_dropout[name] == 0.0:
            raise ArgumentError(
                f'guidance: {guidance} compares the distribution under "{name}" with the one '
                "without it, and this run was never trained without: its dropout is 0. Train with "
                f"[denoiser] conditions.{name}.dropout = 0.1, or leave guidance at 1."
            )


def _check_windows(objective: ModelObjective, sampler: Sampler, length: int) -> None:
    """Raise ArgumentError if a model trained left to right would attend to later noise.

    A time rule with several blocks trains each window on the clean windows before it; such a model
    has never attended to noise after the window that it predicts.
    """
    if objective.times is None or not sampler.looks_ahead:
        return
    # a time in the middle: each end may have no window under way
    middle = torch.full((1,), 0.5, dtype=torch.float64)
    block = objective.times.at(IdentityTime(), middle, length).block
    if block is not None and bool((block != block[:, :1]).any()):
        raise ArgumentError(
            f"{type(sampler).__name__}: this run was trained in windows from left to right "
            "([objective] times) and never attended to noise after the window that it draws; this "
            "sampler shows it all positions at once. Use blockwise or hyperschedule with the width "
            "of the run, or set looks_ahead = False on your own sampler if it goes left to right."
        )
