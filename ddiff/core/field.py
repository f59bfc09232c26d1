"""Field of a sample: text, a vector or an image, with its process and its time rule."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from torch import Tensor

from ddiff.core.information import InformationTime
from ddiff.core.process import States
from ddiff.core.rng import CounterRng
from ddiff.core.times import TimeRule, Times


class FieldProcess(Protocol):
    """Members of a process that paths and bounds of fields use.

    `ForwardProcess` and `GaussianProcess` have these members.
    """

    states: States
    prior: Any
    closes_at_clean: bool
    closes_at_prior: bool
    uniforms_per_sample: int
    uniforms_per_step: int
    uniforms_per_decode: int

    @property
    def information_time(self) -> InformationTime: ...

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor: ...

    def active(self, zt: Tensor) -> Tensor: ...

    def scope(self, zt: Tensor) -> Tensor: ...

    def closing_scope(self, zt: Tensor) -> Tensor: ...

    def end_needs_network(self, t: Tensor) -> Tensor: ...

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor: ...

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor: ...

    def decode_nll(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor: ...

    def closing_kl(self, prediction: Any, x0: Tensor, t: Tensor) -> Tensor: ...

    def step(self, query: Any, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor: ...

    def decode(self, query: Any, zt: Tensor, t: Tensor, u: Tensor) -> Tensor: ...


class Field(NamedTuple):
    """Field of a sample.

    Attributes:
        process: process of the states of one position.
        rule: time rule of the positions inside the field, as functions of the field's progress.
        positions: number of positions n.
    """

    process: FieldProcess
    rule: TimeRule
    positions: int


Fields = Mapping[str, Field]
JointTimes = Mapping[str, Times]
"""Times of every field by name."""


def rng_of_field(rng: CounterRng, fields: Fields, name: str) -> CounterRng:
    """Return the generator of a field: its numbers differ from those of every other field.

    A single field gets the plain generator, so that its numbers are those of a model without
    fields.
    """
    purpose = rng.purpose if len(fields) == 1 else f"{rng.purpose}/{name}"
    return rng.derive(purpose, fields[name].positions)
