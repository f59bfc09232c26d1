"""Conditions and guidance of the network that a sampler queries.

conditions = SampleConditions.parse(model.denoiser, {"author": 2}, count=8)
plan = SamplingPlan.check(model, sampler, conditions, guidance=1.5, length=128)
network = plan.network(slice(0, 4))  # for the first four samples
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
    """Conditions of B samples, by the name of the condition.

    A label condition is an int64 tensor [B]. A vector condition of width d is a float32 tensor
    [B,d].
    """

    values: Mapping[str, Tensor]

    @classmethod
    def parse(
        cls, denoiser: Denoiser, conditions: Mapping[str, Any], count: int
    ) -> SampleConditions:
        """Parse the conditions of `count` samples.

        Each condition has one value for all samples or one value per sample. A value is a label or
        a vector, as the backbone declares in `condition_forms`. Without a declaration, an integer
        is a label and a floating-point value is a vector.

        Raises ArgumentError for a condition that the denoiser does not use, for a value of the
        wrong form, and if a condition that was always present in training (dropout 0) is missing.
        """
        known = denoiser.condition_dropout
        for name in conditions:
            if name not in known:
                raise ArgumentError(
                    f"conditions: this denoiser reads {sorted(known) or 'no conditions'}; got "
                    f'"{name}".{suggest(name, known)} [denoiser] conditions lists the conditions '
                    "of a run."
                )
        due = [name for name, share in known.items() if share == 0.0 and name not in conditions]
        if due:
            raise ArgumentError(
                f'conditions: "{due[0]}" was given with every training sample (its dropout is 0), '
                f'so the model has no distribution without "{due[0]}". Give a value: '
                f"[sample] conditions, --condition {due[0]}=... or conditions={{...}}."
            )
        forms = denoiser.condition_forms
        values = {
            name: _parse_values(name, value, count, forms.get(name))
            for name, value in conditions.items()
        }
        return cls(values)

    def rows(self, samples: slice) -> SampleConditions:
        """Return the conditions of the samples with indices `samples`."""
        return SampleConditions({name: value[samples] for name, value in self.values.items()})

    def to(self, device: torch.device) -> SampleConditions:
        """Move every value to `device`."""
        return SampleConditions({name: value.to(device) for name, value in self.values.items()})


def _parse_values(name: str, value: Any, count: int, declared: Form | None) -> Tensor:
    """Convert one condition to a tensor [count] of labels or [count,d] of vectors.

    `declared` is the form (label or vector) that the model declares, or None. Raises ArgumentError
    if the value does not have this form, or is not valid for `count` samples.
    """
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
    """Convert the labels of a condition to a long tensor [count].

    Returns None if the labels are not valid: fractions, labels outside the range that `form`
    declares, or a number of labels other than 1 and `count`.
    """
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
    """Convert the vectors of a condition to a float32 tensor [count,d].

    Returns None if the vectors are not valid: NaN or infinity, a width d other than the width that
    `form` declares, or a number of vectors other than 1 and `count`.
    """
    # NaN marks an absent vector in training, so a given vector must be finite
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
        f'conditions: "{name}" is {form or f"{Label()} or {Vector()}"}. Give one value for all '
        f"samples, or {count} values, one per sample; got {shown}."
    )


@dataclass(frozen=True)
class SamplingPlan:
    """Sampler with a compatible model and conditions.

    `SamplingPlan.check` returns a plan, or raises an error before anything is sampled.
    `SamplingPlan.network` returns the network for one batch of samples.
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
        """Return the plan of a sampler on a model.

        Args:
            model: the denoiser with its process and objective.
            sampler: must support the process and the prediction of the denoiser.
            conditions: conditions of all samples.
            guidance: classifier-free guidance weight; 1 turns guidance off.
            length: number of tokens per sample.

        Raises ArgumentError if the sampler does not support the model, if the guidance weight is
        out of range, or if guidance has no condition.
        """
        check_guidance(model.denoiser, conditions, guidance)
        # `generate` makes this check too, but only after a run is trained
        sampler.check_supported(model.process, model.denoiser.parameterization.predicts)
        _check_windows(model.objective, sampler, length)
        is_cached = sampler.cached and model.denoiser.caches
        return cls(model, sampler, conditions, guidance, is_cached)

    def network(self, samples: slice, valid: Tensor | None = None) -> Network:
        """Return the network for a batch of samples, with their conditions and guidance.

        `samples`: indices of the B samples in the batch. `valid`: a tensor [B,L] bool, False at
        positions after the end of a text; None if every position is valid.
        """
        # move one batch at a time: the vectors of all samples may not fit on the device
        conditions = self.conditions.rows(samples).to(self.model.device)
        network = self._network(Context(valid, None, conditions.values))
        if self.guidance == 1.0:
            return network
        # The unconditional network has a separate cache, because its hidden states differ.
        return guide_network(network, self._network(Context(valid)), self.guidance)

    def _network(self, context: Context) -> Network:
        return as_network(self.model.denoiser, self.model.process, context, self.is_cached)


def check_sampling(recipe: Recipe, model: Model) -> SamplingPlan:
    """Return the plan for the samples that a run draws after training.

    Raises ArgumentError if the recipe's sampler, conditions or guidance do not fit the model.
    """
    keys = recipe.sample
    sampler = recipe.sampler.build(steps=keys.steps, vocabulary=model.vocabulary)
    conditions = SampleConditions.parse(model.denoiser, keys.conditions, keys.count)
    return SamplingPlan.check(model, sampler, conditions, keys.guidance, recipe.length)


def check_guidance(denoiser: Denoiser, conditions: SampleConditions, guidance: float) -> None:
    """Raise ArgumentError for a weight out of range, and if guidance is not possible.

    A weight of 1 turns guidance off. Guidance compares the distributions with and without the
    conditions. The model must therefore also have been trained without each condition (with a
    dropout above 0).
    """
    if not 0.0 <= guidance < LARGEST:
        raise ArgumentError(
            f"guidance: must be a number in [0, {LARGEST:g}); got {guidance}. 1 is off, 2 to 8 "
            "are usual. A very large weight makes sampling almost deterministic."
        )
    if guidance == 1.0:
        return
    if not conditions.values:
        raise ArgumentError(
            f"guidance: a weight of {guidance} needs a condition; got no condition. Give "
            "conditions (ddiff sample --condition NAME=VALUE), or leave guidance at 1."
        )
    for name in conditions.values:
        if denoiser.condition_dropout[name] == 0.0:
            raise ArgumentError(
                f"guidance: a weight of {guidance} compares the distributions with and without "
                f'"{name}", and this run was never trained without "{name}" (dropout 0). Train '
                f"with [denoiser] conditions.{name}.dropout = 0.1, or leave guidance at 1."
            )


def _check_windows(objective: ModelObjective, sampler: Sampler, length: int) -> None:
    """Raise ArgumentError if the sampler queries a block diffusion model at all positions at once.

    A block diffusion model is trained to predict each block from the clean tokens of the previous
    blocks. In training, the model never attends to noisy tokens after the predicted block.
    """
    if sampler.looks_ahead and is_trained_in_windows(objective, length):
        raise ArgumentError(
            f"{type(sampler).__name__}: the model of this run was trained in windows from left to "
            "right ([objective] times) and never attended to noise after the current window, but "
            "this sampler passes all positions to the network at once. Use the sampler blockwise "
            "or hyperschedule with the width of the run, or set looks_ahead = False on a custom "
            "sampler that works from left to right."
        )


def is_trained_in_windows(objective: ModelObjective, length: int) -> bool:
    """Return whether the time rule of the training divides a row into several blocks."""
    if objective.times is None:
        return False
    # t = 0.5, because at t = 0 and t = 1 possibly no block is partly noised
    middle = torch.full((1,), 0.5, dtype=torch.float64)
    block = objective.times.at(IdentityTime(), middle, length).block
    return block is not None and bool((block != block[:, :1]).any())
