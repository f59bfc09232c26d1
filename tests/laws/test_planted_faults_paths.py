"""Faults planted in paths of several fields; each must be detected by one law."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from faults import Fault, assert_detected
from torch import Tensor

from ddiff.core.field import JointTimes
from ddiff.core.paths import (
    Hold,
    Leg,
    LegPath,
    given_path,
    lagged_path,
)
from ddiff.core.times import Times
from ddiff.testing import assert_laws, check_path, joint

SHARED: dict[str, Leg | Hold] = {"text": Leg(0.0, 1.0), "latent": Leg(0.0, 1.0)}
LATENT_FIRST: dict[str, Leg | Hold] = {"text": Leg(0.0, 0.5), "latent": Leg(0.5, 1.0)}
GIVEN_LATENT: dict[str, Leg | Hold] = {"text": Leg(0.0, 1.0), "latent": "clean"}
ABSENT_LATENT: dict[str, Leg | Hold] = {"text": Leg(0.0, 1.0), "latent": "absent"}
LATENT_AT_PRIOR: dict[str, Leg | Hold] = {"text": Leg(0.0, 1.0), "latent": "prior"}


def change(joint_times: JointTimes, name: str, **values: Any) -> JointTimes:
    """Return joint times with other values of one field."""
    return {**joint_times, name: joint_times[name]._replace(**values)}


class HalvedSpeed(LegPath):  # type: ignore[misc]
    """Fault: the speed of `at` is half of dt/dtau."""

    def at(self, fields: Any, tau: Tensor) -> JointTimes:
        found = super().at(fields, tau)
        return change(found, "text", speed=found["text"].speed / 2.0)


class BackwardInTime(LegPath):  # type: ignore[misc]
    """Fault: one field moves from its prior to its clean end."""

    def at(self, fields: Any, tau: Tensor) -> JointTimes:
        return {**super().at(fields, tau), "text": super().at(fields, 1.0 - tau)["text"]}


class ForgottenMark(LegPath):  # type: ignore[misc]
    """Fault: an absent field is not marked as absent in the draws."""

    def draws(self, *arguments: Any) -> Sequence[JointTimes]:
        return [change(times, "latent", absent=None) for times in super().draws(*arguments)]


class NoisyGivenField(LegPath):  # type: ignore[misc]
    """Fault: a field that is held clean is noised in the draws."""

    def draws(self, *arguments: Any) -> Sequence[JointTimes]:
        drawn = []
        for times in super().draws(*arguments):
            held = times["latent"]
            noised = {"t": held.t + 0.3, "clean": torch.zeros_like(held.clean)}
            drawn.append(change(times, "latent", **noised))
        return drawn


class OneDrawOfTwo(LegPath):  # type: ignore[misc]
    """Fault: the diffusion terms of the later leg are left out."""

    def draws(self, *arguments: Any) -> Sequence[JointTimes]:
        return super().draws(*arguments)[:1]


class TimesOfTwoUniforms(LegPath):  # type: ignore[misc]
    """Fault: the fields of a joint draw have opposite times."""

    def draws(self, *arguments: Any) -> Sequence[JointTimes]:
        drawn = []
        for times in super().draws(*arguments):
            drawn.append(change(times, "latent", t=1.0 - times["latent"].t))
        return drawn


class HalvedDraws(LegPath):  # type: ignore[misc]
    """Fault: the speeds of a draw are divided by the number of fields."""

    def draws(self, *arguments: Any) -> Sequence[JointTimes]:
        drawn = []
        for times in super().draws(*arguments):
            drawn.append({name: _with_half_speed(field) for name, field in times.items()})
        return drawn


def _with_half_speed(times: Times) -> Times:
    return times._replace(speed=times.speed / 2.0)


class DrawsByBatchPosition(LegPath):  # type: ignore[misc]
    """Fault: strata are those of the position in the batch."""

    def draws(self, fields: Any, rng: Any, slot: Tensor, slots: Any) -> Sequence[JointTimes]:
        return super().draws(fields, rng, torch.arange(len(slot)), slots)


class SameDrawsInEveryStep(LegPath):  # type: ignore[misc]
    """Fault: the draws do not depend on the step."""

    def draws(self, fields: Any, rng: Any, slot: Tensor, slots: Any) -> Sequence[JointTimes]:
        rng.step = 0
        return super().draws(fields, rng, slot, slots)


class BothFieldsDecoded(LegPath):  # type: ignore[misc]
    """Fault: the decoding term of a field also counts the other field."""

    def ends(self, *arguments: Any) -> tuple[JointTimes, JointTimes]:
        first, last = super().ends(*arguments)
        counted = {}
        for name, times in first.items():
            counted[name] = times._replace(speed=torch.ones_like(times.speed))
        return counted, last


class WrongSideOfTie(LegPath):  # type: ignore[misc]
    """Fault: end terms are evaluated at the other side of a start or stop of a leg."""

    def _others_at(self, fields: Any, name: str, slot: Tensor, tau: float, side: Any) -> Any:
        other = {"before": "after", "after": "before", "at": "at"}[side]
        return super()._others_at(fields, name, slot, tau, other)


class NoSideOfTie(LegPath):  # type: ignore[misc]
    """Fault: end terms ignore that other fields start or stop at the same tau."""

    def _others_at(self, fields: Any, name: str, slot: Tensor, tau: float, side: Any) -> Any:
        return super()._others_at(fields, name, slot, tau, "at")


class MovingAtCommonStop(LegPath):  # type: ignore[misc]
    """Fault: fields that leave the prior together see each other at the end of the process."""

    def ends(self, fields: Any, name: str, *arguments: Any) -> tuple[JointTimes, JointTimes]:
        first, last = super().ends(fields, name, *arguments)
        other = next(one for one in fields if one != name)
        return first, change(last, other, at_prior=None)


def path(kind: type[LegPath], legs: dict[str, Leg | Hold]) -> Callable[[], LegPath]:
    """Return a builder of a path."""
    return lambda: kind(legs)


def fault(name: str, law: Any, kind: type[LegPath], legs: dict[str, Leg | Hold]) -> Fault:
    """Return a fault of which the healthy object is a `LegPath`."""
    return Fault(name, law, path(LegPath, legs), path(kind, legs))


FAULTS = [
    fault("the speed of a path is halved", joint.fields_move_forward, HalvedSpeed, SHARED),
    fault("a field moves backward", joint.fields_move_forward, BackwardInTime, SHARED),
    fault(
        "an absent field is not marked", joint.held_fields_do_not_move, ForgottenMark, ABSENT_LATENT
    ),
    fault("a given field moves", joint.held_fields_do_not_move, NoisyGivenField, GIVEN_LATENT),
    fault("only one of two legs is drawn", joint.draws_are_unbiased, OneDrawOfTwo, LATENT_FIRST),
    fault(
        "fields are drawn at opposite times", joint.draws_are_unbiased, TimesOfTwoUniforms, SHARED
    ),
    fault("speeds are averaged over fields", joint.draws_are_unbiased, HalvedDraws, SHARED),
    fault(
        "draws depend on the position in the batch",
        joint.draws_are_independent_of_batch,
        DrawsByBatchPosition,
        SHARED,
    ),
    fault(
        "draws are the same in every step",
        joint.draws_are_independent_of_batch,
        SameDrawsInEveryStep,
        SHARED,
    ),
    fault("two fields are decoded at once", joint.ends_are_scored_once, BothFieldsDecoded, SHARED),
    fault(
        "end terms are at the wrong side of a tie",
        joint.ends_follow_the_path,
        WrongSideOfTie,
        LATENT_FIRST,
    ),
    fault("end terms have no side of a tie", joint.ends_follow_the_path, NoSideOfTie, LATENT_FIRST),
    fault(
        "fields leave the prior one after the other",
        joint.ends_follow_the_path,
        MovingAtCommonStop,
        SHARED,
    ),
    fault("the bound has halved speeds", joint.independent_fields_add, HalvedDraws, SHARED),
    fault(
        "a given field is noised",
        joint.held_fields_add_nothing,
        NoisyGivenField,
        GIVEN_LATENT,
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_detected(fault)


PATHS = {
    "one field": LegPath({"text": Leg(0.0, 1.0)}),
    "shared": LegPath(SHARED),
    "shared, bent": LegPath(SHARED, {"latent": 2.0}),
    "shared, bent with an infinite slope": LegPath(SHARED, {"latent": 0.5}),
    "latent first": LegPath(LATENT_FIRST),
    "text first": LegPath({"text": Leg(0.5, 1.0), "latent": Leg(0.0, 0.5)}),
    "text ahead": lagged_path("text", "latent"),
    "latent ahead": lagged_path("latent", "text", 0.5),
    "nested": LegPath({"text": Leg(0.0, 1.0), "latent": Leg(0.25, 0.75)}),
    "common stop": LegPath({"text": Leg(0.0, 1.0), "latent": Leg(0.5, 1.0)}),
    "common start": LegPath({"text": Leg(0.0, 0.6), "latent": Leg(0.0, 1.0)}),
    "three, in a chain": LegPath(
        {"text": Leg(0.0, 0.5), "latent": Leg(0.3, 0.8), "image": Leg(0.8, 1.0)}
    ),
    "latent given": LegPath(GIVEN_LATENT),
    "latent at prior": LegPath(LATENT_AT_PRIOR),
    "latent absent": LegPath(ABSENT_LATENT),
    "middle of three given": given_path(
        LegPath({"a": Leg(2 / 3, 1.0), "b": Leg(1 / 3, 2 / 3), "c": Leg(0.0, 1 / 3)}),
        {"b": "clean"},
    ),
}


@pytest.mark.parametrize("name", PATHS)
def test_path_obeys_every_law(name: str) -> None:
    assert_laws(check_path(PATHS[name]))
