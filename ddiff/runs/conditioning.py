"""How a denoiser is asked for samples: under which conditions, with how much guidance, with which cache."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.process import ForwardProcess
from ddiff.data.condition_forms import Form, Label, Vector
from ddiff.errors import ArgumentError, suggest
from ddiff.nn.denoiser import Context, Denoiser, as_network
from ddiff.plugin.config import LARGEST
from ddiff.sampling.loop import Sampler
from ddiff.sampling.shaping import guided


@dataclass(frozen=True)
class SampleConditions:
    """Conditions of some samples by name: labels [B] long, vectors [B,d] float32."""

    values: Mapping[str, Tensor]

    def rows(self, chosen: slice) -> SampleConditions:
        return SampleConditions({name: value[chosen] for name, value in self.values.items()})

    def to(self, device: torch.device) -> SampleConditions:
        return SampleConditions({name: value.to(device) for name, value in self.values.items()})


def told(denoiser: Denoiser, conditions: Mapping[str, Any], count: int) -> SampleConditions:
    """The conditions of `count` samples, one for all or one for each.

    Each is a label or a vector as the backbone declares (`condition_forms`); where it does not, whole numbers are labels
    and fractions vectors. ArgumentError for a condition that the denoiser does not read, for a value of another form, and
    for a condition that it was never trained without and that is not there.
    """
    known = denoiser.condition_dropout
    for name in conditions:
        if name not in known:
            raise ArgumentError(
                f'conditions: this denoiser reads {sorted(known) or "no conditions"}; got "{name}".'
                f"{suggest(name, known)} [denoiser] conditions says what a run is trained with."
            )
    if due := [name for name, share in known.items() if share == 0.0 and name not in conditions]:
        raise ArgumentError(
            f'conditions: "{due[0]}" was told of every training sample (its dropout is 0), so there is no law without it. '
            f"Tell it: [sample] conditions, --condition {due[0]}=... or conditions={{...}}."
        )
    return SampleConditions(
        {
            name: _values(name, value, count, denoiser.condition_forms.get(name))
            for name, value in conditions.items()
        }
    )


def _values(name: str, value: Any, count: int, declared: Form | None) -> Tensor:
    """[count] or [count,d]; ArgumentError for what is not of the form, labels below 0 and numbers that are not finite."""
    try:
        values = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError, OverflowError) as error:
        raise _unfit(name, value, count, declared) from error
    form = declared or (Vector() if values.is_floating_point() else Label())
    taken = None
    if values.dtype != torch.bool:
        taken = (
            _labels(values, count, form)
            if isinstance(form, Label)
            else _vectors(values.float(), count, form)
        )
    if taken is None:
        raise _unfit(name, value, count, declared)
    return taken


def _labels(values: Tensor, count: int, form: Label) -> Tensor | None:
    if (
        values.is_floating_point()
        or values.dim() > 1
        or (values.dim() == 1 and len(values) != count)
    ):
        return None
    outside = values < 0 if form.classes is None else (values < 0) | (values >= form.classes)
    return None if bool(outside.any()) else values.long().expand(count)


def _vectors(values: Tensor, count: int, form: Vector) -> Tensor | None:
    if (
        values.dim() not in (1, 2)
        or (values.dim() == 2 and len(values) != count)
        or not bool(values.isfinite().all())
    ):
        return None
    width = values.shape[-1]
    return values.expand(count, width) if width == (form.width or width) else None


def _unfit(name: str, value: Any, count: int, form: Form | None) -> ArgumentError:
    return ArgumentError(
        f'conditions: "{name}" is {form or f"{Label()} or {Vector()}"}. Give one, or {count} of them, one per sample; got '
        f"{list(value) if isinstance(value, tuple) else value!r}."
    )


def network_for(
    denoiser: Denoiser,
    process: ForwardProcess | None,
    sampler: Sampler,
    conditions: SampleConditions,
    guidance: float = 1.0,
    valid: Tensor | None = None,
) -> Network:
    """The denoiser under the conditions, guided where `guidance` is not 1; valid [B,L] is False where nothing is.

    ArgumentError where the sampler does not suit the process or what the denoiser says, and for guidance by a condition
    that was never withheld in training: there is no unconditional law then to compare with.
    """
    if not 0.0 <= guidance < LARGEST:
        raise ArgumentError(
            f"guidance: must be a number in [0, {LARGEST:g}); got {guidance}. 1 is off, 2 to 8 are usual, and far above "
            "that only the likeliest token under the condition is left."
        )
    sampler.needs(process, denoiser.reading.predicts)
    cached = bool(getattr(sampler, "cached", False)) and denoiser.caches
    network = as_network(denoiser, process, Context(valid, None, conditions.values), cached)
    if guidance == 1.0:
        return network
    if not conditions.values:
        raise ArgumentError(
            f"guidance: {guidance} needs a condition to be guided by; got none. Give one, --condition NAME=VALUE, or "
            "leave guidance at 1."
        )
    if untrained := [name for name in conditions.values if denoiser.condition_dropout[name] == 0.0]:
        raise ArgumentError(
            f'guidance: {guidance} compares the law under "{untrained[0]}" with the law without it, and this run was never '
            f"trained without: its dropout is 0. Train with [denoiser] conditions.{untrained[0]}.dropout = 0.1, or leave "
            "guidance at 1."
        )
    return guided(network, as_network(denoiser, process, Context(valid), cached), guidance)
