"""Check that sampling and evaluation use only states of the fields that occur in training.

A *situation* says which fields move and in which state the others are held, such as "image moves,
text is clean". Between two neighbouring ends of legs, a path is in one situation. The progress of
the fields that move then follows a curve. A network predicts well only at joint states that
occurred in its training, so sampling and evaluation may use no other ones:

    require_trained(path, trained, "FieldsRun.sample")

Independent times train every curve.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence, Set
from typing import Literal, NamedTuple, get_args

import torch
from torch import Tensor

from ddiff.core.field import Field, Fields
from ddiff.core.paths import HeldAt, Hold, Leg, LegPath, Path
from ddiff.core.training_paths import CyclePaths, IndependentTimes, MixedPaths, TrainingPath
from ddiff.errors import ArgumentError

State = Hold | HeldAt | Literal["moves"]
"""State of a field: it moves, or is held."""

Lacking = Collection[Set[str]]
"""Combinations of fields that samples lack: each is the set of all fields that one sample lacks."""

Situation = Mapping[str, State]
"""State of every field by name, in the order of the recipe."""

HOLDS: tuple[Hold, ...] = get_args(Hold)
WORDS: Mapping[Hold, str] = {"clean": "clean", "prior": "at the prior", "absent": "absent"}
POINTS = 64  # of a segment that are compared with training
NEAR_END = 0.01  # largest distance of the end of a time rule from information time 0 or 1
NEAR = 1e-9  # largest distance of progress between equal points of two curves


class Segment(NamedTuple):
    """Part of a path in one situation.

    Attributes:
        situation: state of every field.
        start: smallest tau.
        stop: largest tau.
        legs: legs of the fields that move.
        power: exponents of their progress, by name; 1 if missing.
    """

    situation: Situation
    start: float
    stop: float
    legs: Mapping[str, Leg]
    power: Mapping[str, float]

    def progress(self, name: str, tau: Tensor) -> Tensor:
        """Return the progress of a field that moves, at values of tau."""
        leg = self.legs[name]
        return ((tau - leg.start) / (leg.stop - leg.start)) ** self.power.get(name, 1.0)

    def find_tau(self, name: str, other: Segment, tau: Tensor) -> Tensor:
        """Return the tau at which a field has the progress that it has on `other` at `tau`."""
        leg = self.legs[name]
        power = self.power.get(name, 1.0)
        other_leg = other.legs[name]
        other_power = other.power.get(name, 1.0)
        if leg == other_leg and power == other_power:
            return tau
        # A large power of the share would be rounded to 0, the ratio of both powers is not.
        share = ((tau - other_leg.start) / (other_leg.stop - other_leg.start)).clamp(0.0, 1.0)
        return leg.start + (leg.stop - leg.start) * share ** (other_power / power)


def situations(path: TrainingPath) -> list[Situation]:
    """Return the situations of a path or of a rule of training, each once.

    Independent times have one situation here, in which all fields move.
    """
    found: list[Situation] = []
    for situation in _all_situations(path):
        if situation not in found:
            found.append(situation)
    return found


def segments(path: Path) -> list[Segment]:
    """Return the parts of a path between neighbouring ends of legs, by rising tau."""
    moving = {name: leg for name, leg in path.legs.items() if isinstance(leg, Leg)}
    power = path.power if isinstance(path, LegPath) else {}
    points = sorted({end for leg in moving.values() for end in leg})
    found = []
    for start, stop in itertools.pairwise(points):
        states = {name: _state(leg, start, stop) for name, leg in path.legs.items()}
        legs = {name: leg for name, leg in moving.items() if states[name] == "moves"}
        found.append(Segment(states, start, stop, legs, power))
    return found


def is_trained(
    segment: Segment,
    trained: TrainingPath,
    lacking: Lacking = (),
    fields: Fields | None = None,
) -> bool:
    """Return whether the joint states of a part of a path occur in training.

    With independent times, every field has every time from clean to prior while the others move,
    so all situations without absent fields occur, at least as a limit.

    Args:
        segment: part of a path.
        trained: path or rule of training.
        lacking: combinations of fields that some training samples lack. In these samples exactly
            the fields of the combination are absent.
        fields: fields by name, whose time rules limit independent times; None: no limits.
    """
    width = (segment.stop - segment.start) / POINTS
    tau = segment.start + width * (torch.arange(POINTS, dtype=torch.float64) + 0.5)
    return bool(_is_trained_at(segment, tau, trained, lacking, fields).all())


def require_trained(
    path: Path,
    trained: TrainingPath,
    caller: str,
    guidance: Mapping[str, Mapping[str, Hold]] | None = None,
    lacking: Lacking = (),
    fields: Fields | None = None,
) -> None:
    """Raise ArgumentError if a path uses joint states that do not occur in training.

    Args:
        path: path of sampling or evaluation.
        trained: path or rule of training.
        caller: subject of the message, such as `[sample] targets, "image | text"`.
        guidance: for every guided field, the fields that its second prediction leaves out, with
            their states. The second prediction needs further situations.
        lacking: combinations of fields that some training samples lack.
        fields: fields by name, whose time rules limit independent times; None: no limits.
    """
    for segment in segments(path):
        if not is_trained(segment, trained, lacking, fields):
            raise _untrained_error(segment, trained, f"{caller}: the path")
    for guided, without in (guidance or {}).items():
        for segment in segments(path):
            if segment.situation.get(guided) != "moves":
                continue
            second = _hold_fields(segment, without)
            if not is_trained(second, trained, lacking, fields):
                raise _untrained_error(second, trained, f"{caller}: the guidance of {guided}")


def describe_situation(situation: Situation) -> str:
    """Describe a situation in words: `image moves, text is clean`."""
    moving = [name for name, state in situation.items() if state == "moves"]
    parts = [f"{_join(moving)} {'moves' if len(moving) == 1 else 'move'}"]
    for hold in HOLDS:
        held = [name for name, state in situation.items() if state == hold]
        if held:
            parts.append(f"{_join(held)} {'is' if len(held) == 1 else 'are'} {WORDS[hold]}")
    for name, state in situation.items():
        if isinstance(state, HeldAt):
            parts.append(f"{name} has noise of deviation {state.deviation:g}")
    return ", ".join(parts)


def part_of_recipe(situation: Situation) -> str:
    """Return the part of a mixture, in TOML, that trains a situation."""
    keys = ['path = "shared"']
    for hold in HOLDS:
        held = [f'"{name}"' for name, state in situation.items() if state == hold]
        if held:
            keys.append(f"{hold} = [{', '.join(held)}]")
    noisy = []
    for name, state in situation.items():
        if isinstance(state, HeldAt):
            noisy.append(f"{name} = {state.deviation:g}")
    if noisy:
        keys.append(f"noisy = {{{', '.join(noisy)}}}")
    return f"{{{', '.join(keys)}}}"


# ---------------------------------------------------------------------- helpers


def _all_situations(path: TrainingPath) -> list[Situation]:
    if isinstance(path, MixedPaths | CyclePaths):
        return [one for part, _ in path.parts for one in _all_situations(part)]
    if isinstance(path, IndependentTimes):
        return [dict.fromkeys(path.names, "moves")]
    return [segment.situation for segment in segments(path)]


def _state(leg: Leg | Hold | HeldAt, start: float, stop: float) -> State:
    """Return the state of a field between two neighbouring ends of legs."""
    if not isinstance(leg, Leg):
        return leg
    if leg.start >= stop:
        # The leg has not begun: the field is decoded.
        return "clean"
    return "prior" if leg.stop <= start else "moves"


def _hold_fields(segment: Segment, held: Mapping[str, Hold]) -> Segment:
    """Return a segment with the states of some fields replaced."""
    states = {name: held.get(name, state) for name, state in segment.situation.items()}
    legs = {name: leg for name, leg in segment.legs.items() if name not in held}
    return segment._replace(situation=states, legs=legs)


def _is_trained_at(
    asked: Segment,
    tau: Tensor,
    trained: TrainingPath,
    lacking: Lacking,
    fields: Fields | None,
) -> Tensor:
    """Return whether training has the joint states of a segment at values of tau, bool [n]."""
    found = torch.zeros_like(tau, dtype=torch.bool)
    if isinstance(trained, CyclePaths | MixedPaths):
        for path, _ in trained.parts:
            found = found | _is_trained_at(asked, tau, path, lacking, fields)
        return found
    absent = {name for name, state in asked.situation.items() if state == "absent"}
    # Complete samples lack no field. A sample that lacks fields trains every situation of the path
    # with exactly these fields absent.
    combinations: list[Set[str]] = [frozenset(), *lacking]
    if isinstance(trained, IndependentTimes):
        reaches = all(
            _reaches(fields[name], state)
            for name, state in asked.situation.items()
            if fields is not None
        )
        return torch.full_like(found, absent in combinations and reaches)
    for known in segments(trained):
        states = known.situation
        differing = {name for name, state in asked.situation.items() if state != states[name]}
        left_out = {name for name, state in states.items() if state == "absent"}
        for combination in combinations:
            if differing <= combination and absent == left_out | combination:
                found = found | _is_on_curve(asked, tau, known)
                break
    return found


def _reaches(field: Field, state: State) -> bool:
    """Return whether the times of a field come near to its clean end or its noisy end."""
    if state not in ("clean", "prior"):
        return True
    clock = field.process.information_time
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    near, _ = clock.at((ends - NEAR_END).abs())
    first, last = field.rule.at(clock, ends, field.positions).t
    if state == "clean":
        return bool((first <= near.min()).all())
    return bool((last >= near.max()).all())


def _is_on_curve(asked: Segment, tau: Tensor, known: Segment) -> Tensor:
    """Return whether the progress of the fields at tau occurs on another segment, bool [n]."""
    first, *others = asked.legs
    # The progress of one field says where on the other segment the point would be.
    place = known.find_tau(first, asked, tau)
    is_on = (place >= known.start - NEAR) & (place <= known.stop + NEAR)
    inside = place.clamp(known.start, known.stop)
    for name in others:
        distance = asked.progress(name, tau) - known.progress(name, inside)
        is_on = is_on & (distance.abs() <= NEAR)
    return is_on


def _untrained_error(segment: Segment, trained: TrainingPath, subject: str) -> ArgumentError:
    situation = segment.situation
    known = situations(trained)
    listed = "; ".join(describe_situation(one) for one in known)
    if isinstance(trained, IndependentTimes):
        listed += ", at independent times"
        known = []
    start = (
        f"{subject} needs predictions for which the network was not trained. It needs them where "
        f"{describe_situation(situation)}"
    )
    if situation in known:
        return ArgumentError(
            f"{start}, at other progress of these fields than in training. Use the kind of path, "
            "lag and power of [objective] times here, or train with [objective] times = "
            '"independent", which trains all paths.'
        )
    parts = ", ".join(part_of_recipe(one) for one in [*known, situation])
    rule = f'{{kind = "mixture", parts = [{parts}]}}'
    if any(isinstance(state, HeldAt) for state in situation.values()):
        # Independent times train a field with every amount of noise.
        rule += ' or "independent"'
    return ArgumentError(
        f"{start}. Trained: {listed}. Train it with [objective] times = {rule}, or choose another "
        "target or path."
    )


def _join(names: Sequence[str]) -> str:
    return " and ".join(names) if len(names) < 3 else f"{', '.join(names[:-1])} and {names[-1]}"
