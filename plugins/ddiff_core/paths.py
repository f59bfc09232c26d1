"""Paths of several fields as recipe components: how far each field has gone in a sample.

A path leads from clean fields (tau = 0) to noise (tau = 1). Sampling follows it backwards.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Annotated, Any, Literal, final

from pydantic import BeforeValidator, Field, model_validator

from ddiff import (
    ArgumentError,
    ComponentConfig,
    CyclePaths,
    HeldAt,
    Hold,
    IndependentTimes,
    LegPath,
    MixedPaths,
    PositiveFloat,
    PositiveInt,
    first_path,
    lagged_path,
    shared_path,
)

Lag = Annotated[float, Field(ge=0.0, lt=1.0)]
LAG = 0.25


def _to_tuple(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value


# `PathConfig._expand_name` turns JSON into Python values, where strict tuples refuse lists.
Order = Annotated[tuple[str, ...], BeforeValidator(_to_tuple)]
# Keys of each kind of path inside a part of a mixture or cycle.
PATH_KEYS = {
    "shared": ("power",),
    "first": ("order", "power"),
    "lagged": ("ahead", "behind", "lag", "power"),
    "independent": (),
}


class PowerConfig(ComponentConfig):
    """Key of the paths on which fields move at different speeds."""

    power: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Exponent of the progress of a field during its leg, by name; 1 by default. With an exponent
    below 1, the field is noisy on most of the path."""


@final
class Shared:
    """Path on which all fields move together: they are drawn at the same time."""

    Config = PowerConfig

    @staticmethod
    def build(config: PowerConfig, *, names: Sequence[str]) -> LegPath:
        return add_power(shared_path(names), config.power)


@final
class First:
    """Path on which fields move one after the other: each is drawn given those before it."""

    class Config(PowerConfig):
        order: tuple[str, ...]
        """Names of all fields, in the order in which sampling draws them."""

    @staticmethod
    def build(config: Config, *, names: Sequence[str]) -> LegPath:
        return add_power(build_first(config.order, names), config.power)


@final
class Lagged:
    """Path on which one field is always less noisy than the other, and is drawn earlier."""

    class Config(PowerConfig):
        ahead: str
        """Name of the field that is less noisy."""
        behind: str
        """Name of the field that is more noisy."""
        lag: Lag = LAG
        """Distance of the two fields as a share of the path; 0 is the shared path."""

    @staticmethod
    def build(config: Config, *, names: Sequence[str]) -> LegPath:
        path = build_lagged(config.ahead, config.behind, config.lag, names)
        return add_power(path, config.power)


@final
class Independent:
    """Rule of training that draws an independent time for every field. It has no bound.

    Evaluation refuses it: the sum of the terms of the fields can be below -ln p(x).
    """

    @staticmethod
    def build(config: ComponentConfig, *, names: Sequence[str]) -> IndependentTimes:
        return IndependentTimes(names)


class PathConfig(ComponentConfig):
    """Path of the fields that move in a part of a mixture or cycle."""

    kind: Literal["shared", "first", "lagged", "independent"] = "shared"
    """Kind of the path."""
    power: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Exponent of the progress of a field, by name; 1 by default."""
    order: Order = ()
    """For "first": names of the moving fields, in the order in which sampling draws them."""
    ahead: str = ""
    """For "lagged": name of the field that is less noisy."""
    behind: str = ""
    """For "lagged": name of the field that is more noisy."""
    lag: Lag | None = None
    """For "lagged": distance of the two fields as a share of the path; None is 0.25."""

    @model_validator(mode="before")
    @classmethod
    def _expand_name(cls, value: Any) -> Any:
        return {"kind": value} if isinstance(value, str) else value

    @model_validator(mode="after")
    def _check_keys(self) -> PathConfig:
        given = {
            "power": bool(self.power),
            "order": bool(self.order),
            "ahead": bool(self.ahead),
            "behind": bool(self.behind),
            "lag": self.lag is not None,
        }
        others = [key for key, is_given in given.items() if is_given]
        others = [key for key in others if key not in PATH_KEYS[self.kind]]
        if others:
            raise ValueError(
                f'a path of kind = "{self.kind}" has the keys '
                f"{', '.join(PATH_KEYS[self.kind]) or 'kind only'}; got {', '.join(others)}"
            )
        if self.kind == "first" and not self.order:
            raise ValueError(
                'a path of kind = "first" needs order, the names of the moving fields in the order '
                "in which sampling draws them"
            )
        if self.kind == "lagged" and not (self.ahead and self.behind):
            raise ValueError(
                'a path of kind = "lagged" needs ahead and behind, the names of the less noisy '
                "and of the more noisy field"
            )
        return self


class PartConfig(ComponentConfig):
    """Part of a mixture or cycle: a path, and the fields that do not move on it."""

    path: PathConfig = Field(default_factory=PathConfig)
    """Path of the fields that move: "shared", or a table such as {kind = "first", order = [..]}."""
    clean: tuple[str, ...] = ()
    """Names of fields that are given: they stay clean."""
    prior: tuple[str, ...] = ()
    """Names of fields that are held at their prior."""
    absent: tuple[str, ...] = ()
    """Names of fields that are left out: no other field attends to them."""
    noisy: dict[str, PositiveFloat] = Field(default_factory=dict)
    """Fields of vectors that are held with noise of a standard deviation, such as {latent = 0.3}.

    The deviation is in normalized units. Trains a target of [evaluate] such as "text through
    latent"."""


class MixturePart(PartConfig):
    weight: PositiveFloat = 1.0
    """Share of the samples that follow this path, relative to the other parts."""


class CyclePart(PartConfig):
    steps: PositiveInt = 1
    """Number of consecutive training steps that follow this path."""


@final
class Mixture:
    """Rule of training in which each sample follows one of several paths, drawn at random.

    A network that shall draw one field given another one needs a part in which the other one is
    clean.
    """

    class Config(ComponentConfig):
        parts: Annotated[tuple[MixturePart, ...], Field(min_length=1)]
        """Parts {path = "shared", weight = 1.0, clean = [..], prior = [..], absent = [..],
        noisy = {NAME = deviation}}."""

    @staticmethod
    def build(config: Config, *, names: Sequence[str]) -> MixedPaths:
        parts = []
        for number, part in enumerate(config.parts, start=1):
            path = build_part(part, names, f"part {number}")
            if isinstance(path, IndependentTimes):
                raise ArgumentError(
                    f'part {number}: a part of a mixture must be a path; got "independent". Use '
                    'times = "independent", or a cycle, whose parts may have independent times.'
                )
            parts.append((path, part.weight))
        return MixedPaths(parts)


@final
class Cycle:
    """Rule of training in which all samples of a step follow one path, which changes by the step.

    The path is a function of the training step: part 1 for its steps, then part 2, and so on.
    """

    class Config(ComponentConfig):
        parts: Annotated[tuple[CyclePart, ...], Field(min_length=1)]
        """Parts {path = "shared", steps = 1, clean = [..], prior = [..], absent = [..]}."""

    @staticmethod
    def build(config: Config, *, names: Sequence[str]) -> CyclePaths:
        parts = []
        for number, part in enumerate(config.parts, start=1):
            parts.append((build_part(part, names, f"part {number}"), part.steps))
        return CyclePaths(parts)


# ---------------------------------------------------------------------- building paths


def build_part(part: PartConfig, names: Sequence[str], label: str) -> LegPath | IndependentTimes:
    """Return the path of a part. `label` names the part in messages."""
    held = hold_fields(part, names, label)
    moving = [name for name in names if name not in held]
    if not moving:
        raise ArgumentError(
            f"{label}: at least one field must move; got all of {', '.join(names)} as clean, "
            "prior, absent or noisy. Leave the field out that this part shall train."
        )
    path = part.path
    if path.kind == "independent":
        if held:
            raise ArgumentError(
                f"{label}: independent times move every field; got {', '.join(held)} as clean, "
                'prior, absent or noisy. Use path = "shared" for the other fields.'
            )
        return IndependentTimes(names)
    try:
        if path.kind == "first":
            moved = build_first(path.order, moving)
        elif path.kind == "lagged":
            lag = LAG if path.lag is None else path.lag
            moved = build_lagged(path.ahead, path.behind, lag, moving)
        else:
            moved = shared_path(moving)
        moved = add_power(moved, path.power)
    except ArgumentError as error:
        error.args = (f"{label}: {error}",)
        raise
    # The legs of all fields, in the order of the recipe.
    legs = {name: held.get(name) or moved.legs[name] for name in names}
    return LegPath(legs, moved.power)


def hold_fields(part: PartConfig, names: Sequence[str], label: str) -> dict[str, Hold | HeldAt]:
    """Return the state of every field that does not move in a part."""
    held: dict[str, Hold | HeldAt] = {}
    key_of: dict[str, str] = {}
    states: tuple[tuple[Hold, tuple[str, ...]], ...] = (
        ("clean", part.clean),
        ("prior", part.prior),
        ("absent", part.absent),
    )
    chosen: list[tuple[str, str, Hold | HeldAt]] = []
    for state, fields in states:
        chosen += [(state, name, state) for name in fields]
    chosen += [("noisy", name, HeldAt(deviation)) for name, deviation in part.noisy.items()]
    for key, name, hold in chosen:
        if name not in names:
            raise ArgumentError(
                f'{label}: {key} must have names of fields; got "{name}". '
                f"Fields: {', '.join(names)}."
            )
        if name in held:
            raise ArgumentError(
                f"{label}: clean, prior, absent and noisy must have different fields; got "
                f'"{name}" in {key_of[name]} and in {key}.'
            )
        held[name] = hold
        key_of[name] = key
    return held


def build_first(order: Sequence[str], names: Sequence[str]) -> LegPath:
    """Return the path on which the fields `names` are drawn in the given order."""
    if sorted(order) != sorted(names):
        raise ArgumentError(
            f"order must have every moving field once; got {list(order)}. "
            f"Moving fields: {', '.join(names)}."
        )
    return first_path(order)


def build_lagged(ahead: str, behind: str, lag: float, names: Sequence[str]) -> LegPath:
    """Return the path on which `ahead` is less noisy than `behind`."""
    if sorted((ahead, behind)) != sorted(names):
        raise ArgumentError(
            "a lagged path has two moving fields, ahead and behind; got "
            f'ahead = "{ahead}" and behind = "{behind}". Moving fields: {", ".join(names)}.'
        )
    return lagged_path(ahead, behind, lag)


def add_power(path: LegPath, power: Mapping[str, float]) -> LegPath:
    """Return the path with other exponents of the progress of its fields."""
    check_names(power, path.legs)
    return LegPath(path.legs, power)


def check_names(chosen: Iterable[str], names: Iterable[str]) -> None:
    """Raise ArgumentError if a key of `power` is not the name of a moving field."""
    known = list(names)
    for name in chosen:
        if name not in known:
            raise ArgumentError(
                f'power must have names of moving fields; got "{name}". '
                f"Moving fields: {', '.join(known)}."
            )
