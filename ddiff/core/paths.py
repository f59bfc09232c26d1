"""Paths of several fields: how far each field of a sample has gone at every progress tau.

A path leads from tau = 0, where every field is clean, to tau = 1, where every field is noise. Each
field either moves during a leg, an interval of tau, or is held fixed on the whole path. The bound
of a sample along a path is the sum of the terms of its fields, and every path gives a valid bound.

    LegPath({"text": Leg(0.0, 1.0), "latent": Leg(0.0, 1.0)})    # both fields together
    LegPath({"text": Leg(0.0, 0.5), "latent": Leg(0.5, 1.0)})    # sampling draws the latent first
    LegPath({"text": Leg(0.0, 1.0), "latent": "clean"})          # text given the latent

Shapes: B samples, n positions of a field.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal, NamedTuple, Protocol, final, get_args

import torch
from torch import Tensor

from ddiff.core.field import Field, Fields, JointTimes, rng_of_field
from ddiff.core.progress_density import LeastVariance, ProgressDensity, UniformDensity
from ddiff.core.rng import CounterRng
from ddiff.core.times import Times, draw_strata
from ddiff.errors import ArgumentError

Hold = Literal["clean", "prior", "absent"]
"""State of a field that does not move.

"clean": the field is given. "prior": its states are draws from the prior. "absent": no other field
attends to it."""

Side = Literal["before", "at", "after"]
"""Side of a value of tau from which a path is evaluated, where fields start or stop."""

# The smallest share of a leg at which its slope is evaluated.
SMALLEST_SHARE = 2.0**-53


class HeldAt(NamedTuple):
    """Hold of a field of vectors at a known time: its states have noise of a given deviation.

    The time is that at which sigma / a is `deviation` > 0, so that the states divided by a are the
    clean vectors plus noise of this standard deviation. For training and evaluation; samplers draw
    no such states.
    """

    deviation: float


class Leg(NamedTuple):
    """Interval of tau in which a field moves from its clean end to its noisy end."""

    start: float
    stop: float


class Path(Protocol):
    """Path of the fields of a sample. Every path has a bound."""

    @property
    def legs(self) -> Mapping[str, Leg | Hold | HeldAt]:
        """Leg or hold of every field, by name."""

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """Names of the fields that move in each entry of `draws`."""

    def at(self, fields: Fields, tau: Tensor) -> JointTimes:
        """Return the times of all fields at progress tau [B]. Samplers follow them."""

    def draws(
        self, fields: Fields, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> Sequence[JointTimes]:
        """Draw joint times at which the sum of the diffusion terms estimates their integral.

        Each entry needs one evaluation of the network.
        """

    def ends(
        self, fields: Fields, name: str, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> tuple[JointTimes, JointTimes]:
        """Return the joint times of the end terms of one field: decoding and prior term.

        The prior term is called closing in code. The speeds of the other fields are 0.
        """


@final
class LegPath:
    """Path on which the progress of every field is linear during its leg.

    The progress p of a field is 0 before its leg, rises linearly to 1, and is 1 after its leg. With
    `power` other than 1, p is the share of the leg to this power. A field whose leg has not begun
    at tau is decoded: its states are clean. A field whose leg has ended is at the prior. Fields
    whose legs begin at the same tau are decoded together.

    Args:
        legs: leg or hold of every field, by name. At least one field moves, and the legs cover
            [0,1].
        power: exponent of the progress of each field; fields that are not named have 1.
    """

    def __init__(
        self, legs: Mapping[str, Leg | Hold | HeldAt], power: Mapping[str, float] | None = None
    ) -> None:
        self._legs = dict(legs)
        self._power = dict(power or {})
        self._moving = {name: leg for name, leg in legs.items() if isinstance(leg, Leg)}
        _check_legs(self._legs, self._power)
        self._groups = _group_overlapping(self._moving)

    @property
    def legs(self) -> Mapping[str, Leg | Hold | HeldAt]:
        return self._legs

    @property
    def power(self) -> Mapping[str, float]:
        """Exponent of the progress of every field that has another one than 1."""
        return self._power

    @property
    def groups(self) -> Sequence[Sequence[str]]:
        """Names of the moving fields, in groups whose legs overlap, by rising tau."""
        return self._groups

    def __repr__(self) -> str:
        parts = []
        for name, leg in self._legs.items():
            if isinstance(leg, Leg):
                parts.append(f"{name} {leg.start:g}..{leg.stop:g}")
            elif isinstance(leg, HeldAt):
                parts.append(f"{name} with noise {leg.deviation:g}")
            else:
                parts.append(f"{name} {leg}")
        return f"LegPath({', '.join(parts)})"

    def at(self, fields: Fields, tau: Tensor) -> JointTimes:
        self.check_fields(fields)
        return {name: self._field_at(fields, name, tau) for name in self._legs}

    def draws(
        self, fields: Fields, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> Sequence[JointTimes]:
        self.check_fields(fields)
        drawn = []
        for group in self._groups:
            if len(group) == 1:
                drawn.append(self._draw_alone(fields, group[0], rng, slot, slots))
            else:
                drawn.append(self._draw_together(fields, group, rng, slot, slots))
        return drawn

    def ends(
        self, fields: Fields, name: str, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> tuple[JointTimes, JointTimes]:
        self.check_fields(fields)
        leg = self._moving[name]
        # Sampling decodes the field at the end of the interval of tau above the start of its leg,
        # and begins to move it at the stop of its leg, when fields with later legs are decoded.
        first = self._others_at(fields, name, slot, leg.start, "after")
        last = self._others_at(fields, name, slot, leg.stop, "before")
        for other, other_leg in self._moving.items():
            # Fields that leave their prior at the same tau are all at the prior there.
            if other != name and other_leg.stop == leg.stop:
                last[other] = _hold_times("prior", slot, fields[other], other)
        field = fields[name]
        clock = field.process.information_time
        length = field.positions
        first[name], last[name] = field.rule.ends(
            clock, rng_of_field(rng, fields, name), slot, slots, length
        )
        return first, last

    def check_fields(self, fields: Fields) -> None:
        """Raise ArgumentError if the names differ, or if a time rule cannot follow this path."""
        if set(fields) != set(self._legs):
            raise ArgumentError(
                f"LegPath: legs must name every field once; got legs for {sorted(self._legs)} and "
                f"fields {sorted(fields)}."
            )
        together = {name for group in self._groups if len(group) > 1 for name in group}
        for name in sorted(together):
            if not fields[name].rule.has_one_time:
                others = ", ".join(sorted(together - {name}))
                raise ArgumentError(
                    f'LegPath: the field "{name}" has a time rule with windows, whose end terms '
                    f"lie inside the leg, but {others} moves at the same time. Use a rule with one "
                    "time for all positions (flat), or let the fields move one after the other "
                    '(kind = "first").'
                )

    # ------------------------------------------------------------------ draws

    def _draw_alone(
        self, fields: Fields, name: str, rng: CounterRng, slot: Tensor, slots: int | Tensor
    ) -> JointTimes:
        """Draw times on the leg of a field that moves while no other field moves."""
        leg = self._moving[name]
        middle = (leg.start + leg.stop) / 2.0
        drawn = self._others_at(fields, name, slot, middle, "at")
        field = fields[name]
        drawn[name] = field.rule.draw(
            field.process.information_time,
            rng_of_field(rng, fields, name),
            slot,
            slots,
            field.positions,
        )
        return drawn

    def _draw_together(
        self,
        fields: Fields,
        group: Sequence[str],
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
    ) -> JointTimes:
        """Draw one tau per sample for fields whose legs overlap.

        tau is drawn from a mixture with one part per field, in equal shares. The part of a field
        has the density of least variance for its number of positions.
        """
        v = draw_strata(rng, slot, slots).squeeze(-1)
        count = len(group)
        part = (v * count).long().clamp(max=count - 1)
        share = v * count - part
        tau = torch.zeros_like(v)
        for number, name in enumerate(group):
            leg = self._moving[name]
            progress = _density(fields, name).quantile(share)
            drawn = leg.start + (leg.stop - leg.start) * progress ** (1.0 / self._exponent(name))
            tau = torch.where(part == number, drawn, tau)
        density = torch.zeros_like(tau)
        for name in group:
            leg = self._moving[name]
            progress, slope = self._progress(name, tau)
            is_inside = (tau >= leg.start) & (tau <= leg.stop)
            each = _density(fields, name).density(progress) * slope
            density = density + torch.where(is_inside, each, 0.0) / count
        times = {}
        for name in self._legs:
            at = self._field_at(fields, name, tau)
            times[name] = at._replace(speed=at.speed / density.unsqueeze(-1))
        return times

    def _others_at(
        self, fields: Fields, name: str, slot: Tensor, tau: float, side: Side
    ) -> dict[str, Times]:
        """Return the times of all fields but one at tau, with speed 0."""
        at = torch.full(slot.shape, tau, dtype=torch.float64, device=slot.device)
        times = {}
        for other in self._legs:
            if other != name:
                found = self._field_at(fields, other, at, side)
                times[other] = found._replace(speed=torch.zeros_like(found.speed))
        return times

    def _exponent(self, name: str) -> float:
        return self._power.get(name, 1.0)

    def _progress(self, name: str, tau: Tensor) -> tuple[Tensor, Tensor]:
        """Return the progress p [B] of a moving field at tau [B], and dp/dtau inside its leg."""
        leg = self._moving[name]
        width = leg.stop - leg.start
        share = ((tau - leg.start) / width).clamp(0.0, 1.0)
        power = self._exponent(name)
        # With a power below 1 the slope is infinite at the start of the leg.
        inside = share.clamp(min=SMALLEST_SHARE)
        return share**power, power * inside ** (power - 1.0) / width

    def _field_at(self, fields: Fields, name: str, tau: Tensor, side: Side = "at") -> Times:
        """Return the times of one field at tau [B]; the speed is the change per unit of tau.

        At a start or stop of a leg, `side` says whether the state just before (smaller tau) or just
        after (larger tau) is returned. "at": the moving state at both ends of the leg.
        """
        leg = self._legs[name]
        field = fields[name]
        if not isinstance(leg, Leg):
            return _hold_times(leg, tau, field, name)
        progress, slope = self._progress(name, tau)
        times = field.rule.at(field.process.information_time, progress, field.positions)
        is_decoded = tau <= leg.start if side == "before" else tau < leg.start
        is_noise = tau >= leg.stop if side == "after" else tau > leg.stop
        is_decoded = is_decoded.unsqueeze(-1)
        is_noise = is_noise.unsqueeze(-1)
        at_prior = is_noise.expand_as(times.clean)
        if times.at_prior is not None:
            at_prior = at_prior | times.at_prior
        moves = ~(is_decoded | is_noise)
        if times.block is not None and not bool(moves.any()):
            # A field that does not move has no windows: other fields attend to all its positions.
            times = times._replace(block=None)
        clean = (times.clean & ~is_noise) | is_decoded
        return times._replace(
            t=torch.where(is_noise, 1.0, times.t),
            speed=torch.where(moves, times.speed * slope.unsqueeze(-1), 0.0),
            clean=clean,
            at_prior=at_prior & ~clean,
        )


def shared_path(names: Sequence[str]) -> LegPath:
    """Return the path on which all fields move together over the whole of [0,1]."""
    return LegPath({name: Leg(0.0, 1.0) for name in names})


def first_path(order: Sequence[str]) -> LegPath:
    """Return the path on which fields move one after the other.

    `order` is the order of sampling: the first field is drawn while all others are at the prior,
    the last one given all others.
    """
    count = len(order)
    legs: dict[str, Leg | Hold] = {}
    for number, name in enumerate(order):
        # Sampling goes from tau = 1 to tau = 0, so the first field has the last leg.
        legs[name] = Leg((count - 1 - number) / count, (count - number) / count)
    return LegPath(legs)


def lagged_path(ahead: str, behind: str, lag: float = 0.25) -> LegPath:
    """Return the path on which `ahead` is less noisy than `behind` by `lag` of tau.

    Both legs have the length 1 - lag. lag = 0 is the shared path.
    """
    if not 0.0 <= lag < 1.0:
        raise ArgumentError(f"lagged_path: lag must be in [0, 1); got {lag}.")
    return LegPath({ahead: Leg(lag, 1.0), behind: Leg(0.0, 1.0 - lag)})


def given_path(path: LegPath, given: Mapping[str, Hold | HeldAt]) -> LegPath:
    """Return `path` with some fields held.

    Intervals of tau in which no other field moves are cut out, and the rest is stretched to [0,1].
    """
    legs: dict[str, Leg | Hold | HeldAt] = {**path.legs, **given}
    moving = [leg for leg in legs.values() if isinstance(leg, Leg)]
    points = sorted({end for leg in moving for end in leg})
    place = {}
    total = 0.0
    for start, stop in itertools.pairwise(points):
        place[start] = total
        if any(leg.start <= start and stop <= leg.stop for leg in moving):
            total += stop - start
        place[stop] = total
    for name, leg in legs.items():
        if isinstance(leg, Leg):
            legs[name] = Leg(place[leg.start] / total, place[leg.stop] / total)
    power = {name: exponent for name, exponent in path.power.items() if name not in given}
    return LegPath(legs, power)


# ---------------------------------------------------------------------- helpers


def _density(fields: Fields, name: str) -> ProgressDensity:
    """Return the density of the progress of a field in draws of a path."""
    field = fields[name]
    if field.process.information_time.is_noise_at_start:
        return UniformDensity()
    return LeastVariance(field.rule.tokens or field.positions)


def _hold_times(hold: Hold | HeldAt, like: Tensor, field: Field, name: str) -> Times:
    """Return the times of the field `name`, which does not move; `like` is [B]."""
    shape = (len(like), field.positions)
    zeros = torch.zeros(shape, dtype=torch.float64, device=like.device)
    nothing = torch.zeros(shape, dtype=torch.bool, device=like.device)
    if isinstance(hold, HeldAt):
        return Times(zeros + _find_time(hold, field, name), zeros, nothing)
    if hold == "clean":
        return Times(zeros, zeros, ~nothing)
    absent = torch.ones_like(nothing[:, 0]) if hold == "absent" else None
    return Times(torch.ones_like(zeros), zeros, nothing, ~nothing, absent=absent)


def _find_time(hold: HeldAt, field: Field, name: str) -> float:
    """Return the time at which a field has the noise of a hold."""
    process: Any = field.process
    if process.states != "vectors":
        raise ArgumentError(
            f'LegPath: only a field of vectors can be held with noise; "{name}" has tokens. Hold '
            'it "clean", "prior" or "absent".'
        )
    try:
        time: float = process.time_of_deviation(hold.deviation)
    except ArgumentError as error:
        error.args = (f'LegPath: the noise of "{name}": {error}',)
        raise
    return time


def _check_legs(legs: Mapping[str, Leg | Hold | HeldAt], power: Mapping[str, float]) -> None:
    moving = [leg for leg in legs.values() if isinstance(leg, Leg)]
    for name, leg in legs.items():
        if isinstance(leg, Leg):
            if not 0.0 <= leg.start < leg.stop <= 1.0:
                raise ArgumentError(
                    f'LegPath: the leg of "{name}" must satisfy 0 <= start < stop <= 1; got '
                    f"[{leg.start}, {leg.stop}]."
                )
        elif isinstance(leg, HeldAt):
            if not 0.0 < leg.deviation < math.inf:
                raise ArgumentError(
                    f'LegPath: the noise of "{name}" must have a finite deviation above 0; got '
                    f"{leg.deviation}."
                )
        elif leg not in get_args(Hold):
            raise ArgumentError(
                f'LegPath: "{name}" must have a Leg, or be held: {", ".join(get_args(Hold))}; got '
                f"{leg!r}."
            )
    for name, exponent in power.items():
        has_leg = isinstance(legs.get(name), Leg)
        if not has_leg or not exponent > 0 or not math.isfinite(exponent):
            raise ArgumentError(
                f'LegPath: the power of "{name}" must be above 0, for a field with a leg; got '
                f"{exponent}."
            )
    if not moving:
        raise ArgumentError(f"LegPath: at least one field must move; got {dict(legs)}.")
    reached = 0.0
    for start, stop in sorted(moving):
        if start > reached:
            raise ArgumentError(
                f"LegPath: some field must move at every tau in [0, 1]; no field moves from "
                f"{reached} to {start}."
            )
        reached = max(reached, stop)
    if reached < 1.0:
        raise ArgumentError(f"LegPath: some field must move until tau = 1; got {reached}.")


def _group_overlapping(moving: Mapping[str, Leg]) -> list[list[str]]:
    """Return the names of fields in groups whose legs overlap, in the order of their starts."""
    groups: list[list[str]] = []
    reached = -1.0
    for name, leg in sorted(moving.items(), key=lambda item: item[1]):
        if leg.start < reached:
            groups[-1].append(name)
        else:
            groups.append([name])
        reached = max(reached, leg.stop)
    return groups
