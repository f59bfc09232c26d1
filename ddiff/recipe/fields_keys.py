"""Keys that ddiff itself defines for a recipe of several fields.

A field is one part of a sample, such as a text, a picture or a vector. Its table is [fields.NAME].
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, field_validator

from ddiff.plugin.config import (
    ComponentConfig,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Seed,
)
from ddiff.recipe.keys import Decay, TrainLoopKeys

Share = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Share of samples, in [0, 1)."""

Targets = Annotated[tuple[str, ...], Field(min_length=1)]
"""Names of targets: "joint" for all fields, or "A | B" for the fields A given the fields B."""

Deviation = PositiveFloat | dict[str, PositiveFloat]
"""Standard deviation of noise, or one for each field by name."""


class FieldKeys(ComponentConfig):
    """Keys of the recipe table [fields.NAME]."""

    weight: NonNegativeFloat = 1.0
    """Factor of the loss of this field in the sum over the fields. The bound has no such factor."""
    length: PositiveInt | None = None
    """Number of tokens of each sample. Required for a field of texts, and refused for others.

    Shorter texts are filled with end marks."""
    long: Literal["refuse", "cut"] = "refuse"
    """Texts with more than `length` tokens: "refuse" them with an error, or "cut" their ends."""
    encode: str | None = Field(None, min_length=1)
    """Name of a field of texts, whose vectors this field holds. [encoder] computes the vectors."""
    steps: PositiveInt | None = None
    """Number of sampling steps while only this field moves; by default [sample] steps."""


class FieldsObjectiveKeys(ComponentConfig):
    """Keys of the recipe table [objective] in a recipe of several fields."""

    normalization: Literal["item", "sample"] = "item"
    """Number by which the loss of a field is divided.

    "item": the tokens of the field, or the numbers of its vectors. "sample": the samples. With
    "sample", weights of 1 and losses of the bound, the loss is the bound of a sample."""
    decoding_share: Share | None = None
    """Share of the samples that train the decoding term of a field that is noisy at t = 0.

    By default 0.1, or 0 if the loss of the field cannot train this term."""


class FieldsTrainKeys(TrainLoopKeys):
    """Keys of the recipe table [train] in a recipe of several fields."""

    ema: Decay = 0.0
    """Decay of the exponential moving average of the weights, such as 0.9999; 0: no average."""


class FieldsEvaluateKeys(ComponentConfig):
    """Keys of the recipe table [evaluate] in a recipe of several fields."""

    every: PositiveInt | None = None
    """Number of training steps between two evaluations; by default only after the last step."""
    batch: PositiveInt = 64
    """Number of samples in a batch."""
    samples: PositiveInt | None = None
    """Number of validation samples to evaluate, spread evenly over them; by default all."""
    draws: PositiveInt = 1
    """Number of noise times drawn per sample.

    With two or more, the confidence interval is computed from the differences between samples."""
    seed: Seed = 0
    """Seed of the noise times and the noise."""
    weights: Literal["auto", "ema", "trained"] = "auto"
    """Weights for evaluation and sampling.

    "auto": the moving average if [train] ema is not 0, else the trained weights."""
    targets: Targets = ("joint",)
    """Targets that are evaluated: "joint", "A" or "A | B" (A given B), for fields A and B.

    "A through B" is the bound of the text A through the vector B, by rate plus distortion."""
    deviation: Deviation | None = None
    """Standard deviation of the noise of B in targets "A through B", in normalized units.

    Every value gives a valid bound. A table {NAME = 0.3} has one value for each field. The training
    must contain the text with this noise: {path = "shared", noisy = {NAME = 0.3}}."""
    unnamed: Literal["prior", "absent"] = "prior"
    """State of the fields that a target does not name.

    "prior": the field is noise. "absent": no other field attends to the field."""
    controls: bool = True
    """Evaluate every target with given fields two more times, as controls.

    The given fields are replaced by those of another sample, and then by noise. A network that uses
    the given fields has larger bounds for the controls."""

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        return _check_distinct(targets)


class GuidanceKeys(ComponentConfig):
    """Keys of the recipe table [sample.guidance.NAME]: classifier-free guidance of a field."""

    weight: NonNegativeFloat
    """Weight of the guidance.

    0: the fields in `without` have no influence; 1: no guidance; above 1: they have more."""
    without: dict[str, Literal["prior", "absent"]] = Field(min_length=1)
    """Fields that the second prediction leaves out, and their state in this prediction.

    "prior": the field is noise. "absent": no other field attends to the field."""


class FieldsSampleKeys(ComponentConfig):
    """Keys of the recipe table [sample] in a recipe of several fields."""

    steps: PositiveInt = 64
    """Number of sampling steps."""
    count: PositiveInt = 8
    """Number of samples of each target."""
    given: PositiveInt | None = None
    """Largest number of validation samples whose fields are given; by default `count`.

    With `given = 50` and `count = 400`, every one of 50 validation samples has eight draws. A judge
    averages them."""
    batch: PositiveInt = 8
    """Number of samples in a batch. Does not change the samples."""
    seed: Seed = 0
    """Seed of the samples."""
    every: PositiveInt | None = None
    """Number of training steps between two samples that are drawn and shown during training.

    Such a sample has at most 16 steps, and its texts are shown. By default, samples are drawn only
    after the last step."""
    targets: Targets = ("joint",)
    """Targets that are sampled: "joint", "A" or "A | B" (A given B), for fields A and B."""
    unnamed: Literal["prior", "absent"] = "prior"
    """State of the fields that a target does not name: noise, or left out of the sample."""
    update: Literal["jacobi", "gauss-seidel"] = "jacobi"
    """Order in which fields that move together are updated in a step.

    "jacobi": all from the same state, with one evaluation of the network. "gauss-seidel": one after
    the other, with one evaluation per field."""
    guidance: dict[str, GuidanceKeys] = Field(default_factory=dict)
    """Classifier-free guidance by the name of the guided field."""

    @field_validator("targets")
    @classmethod
    def _check_targets(cls, targets: tuple[str, ...]) -> tuple[str, ...]:
        return _check_distinct(targets)


def _check_distinct(targets: tuple[str, ...]) -> tuple[str, ...]:
    """Raise ValueError if a target occurs twice, since results are stored by target."""
    # "a|b" and "a | b" are the same target
    names = ["".join(target.split()) for target in targets]
    for target, name in zip(targets, names, strict=True):
        if names.count(name) > 1:
            raise ValueError(f"targets must not repeat a target; got {target!r} twice")
    return targets
