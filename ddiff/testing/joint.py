"""Laws of a path of several fields, and of the bound of a sample along it.

A path says how far each field has gone at every progress tau in [0,1]. The laws use small fields:
two masked tokens under the first name of the path, and vectors of one or two numbers under the
others. Shapes: B samples, n positions of a field.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from ddiff.core.elbo import NelboTerms, nelbo
from ddiff.core.field import Fields, JointTimes
from ddiff.core.fields import joint_nelbo
from ddiff.core.paths import Path
from ddiff.core.rng import CounterRng
from ddiff.core.times import Times
from ddiff.testing.joint_probes import (
    SEED,
    NodeRng,
    RecordingNetwork,
    clean_samples,
    constant_network,
    constant_vector,
    moving_legs,
    path_nodes,
    small_fields,
    time_nodes,
)
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

SLOTS = 64  # strata of the global batch
NEAR = 1e-9  # distance from a start or stop of a leg at which the path is evaluated
STEP = 1e-6  # of a difference quotient


def _draw(path: Path, fields: Fields, slot: Tensor, step: int = 0) -> Sequence[JointTimes]:
    return path.draws(fields, CounterRng(SEED, step, slot, 1), slot, SLOTS)


def _ends(path: Path, fields: Fields, name: str, slot: Tensor) -> tuple[JointTimes, JointTimes]:
    return path.ends(fields, name, CounterRng(SEED, 0, slot, 1), slot, SLOTS)


def _held(path: Path) -> dict[str, str]:
    return {name: leg for name, leg in path.legs.items() if isinstance(leg, str)}


def _at_prior(times: Times) -> Tensor:
    return torch.zeros_like(times.clean) if times.at_prior is None else times.at_prior


def _stage(times: Times) -> Tensor:
    """Return 0 where a position is clean, 1 where it moves and 2 where it is at the prior."""
    return 1.0 - times.clean.double() + _at_prior(times).double()


# ------------------------------------------------------------------ times


@law("path: fields move from clean to prior at the declared speed", tolerance=1e-4)
def fields_move_forward(path: Path) -> Iterator[Gap]:
    """Check that times of `at` never decrease, from 0 to 1, and that the speed is dt/dtau.

    At tau = 0 a moving field is clean or at t = 0, and at tau = 1 at the prior or at t = 1. Speeds
    are finite and not negative. Difference quotients are compared inside the legs, with an error
    relative to 1 + the speed. Tolerance 1e-4: t = 0 and t = 1 may stand for times at a distance of
    1e-12, and quotients over 2e-6 have an error of 1e-5 near the ends of a leg.
    """
    fields = small_fields(path)
    tau = torch.linspace(0.0, 1.0, 241, dtype=torch.float64)
    times = path.at(fields, tau)
    before = path.at(fields, (tau - STEP).clamp(min=0.0))
    after = path.at(fields, (tau + STEP).clamp(max=1.0))
    for name, leg in moving_legs(path).items():
        field = times[name]
        labels = {"field": name, "tau": tau}
        yield compare(field.t.diff(dim=0).clamp(max=0.0), 0.0, {"field": name, "tau": tau[:-1]})
        falls = _stage(field).diff(dim=0).clamp(max=0.0)
        yield compare(falls, 0.0, {"stage of": name, "tau": tau[:-1]})
        yield compare(field.t[0] * (~field.clean[0]).double(), 0.0, {"tau = 0, field": name})
        yield compare(field.t[-1], 1.0, {"tau = 1, field": name})
        is_valid = field.speed.isfinite() & (field.speed >= 0)
        yield compare(is_valid.double(), 1.0, {"speed of": name, "tau": tau})
        quotient = (after[name].t - before[name].t) / (2.0 * STEP)
        inside = (tau > leg.start + 0.02) & (tau < leg.stop - 0.02)
        yield compare(
            quotient[inside],
            field.speed[inside],
            {**labels, "tau": tau[inside]},
            relative_to=1.0 + field.speed[inside],
        )


@law("path: held fields do not move", tolerance=0.0)
def held_fields_do_not_move(path: Path) -> Iterator[Gap]:
    """Check that a field held "clean", "prior" or "absent" is in this state in every draw.

    Its speed must be 0 in `at`, in the draws and in the end terms. Only an absent field is marked
    as absent. Tolerance 0: the states are exact.
    """
    fields = small_fields(path)
    slot = torch.arange(SLOTS)
    found = [path.at(fields, torch.linspace(0.0, 1.0, SLOTS).double())]
    found += _draw(path, fields, slot)
    for name in moving_legs(path):
        found += _ends(path, fields, name, slot)
    for joint in found:
        for name, hold in _held(path).items():
            times = joint[name]
            labels = {"field": name, "held": hold}
            yield compare(times.speed, 0.0, {"speed, t": times.t, **labels})
            yield compare(_stage(times), 0.0 if hold == "clean" else 2.0, {"stage": "", **labels})
            yield compare(times.t, 0.0 if hold == "clean" else 1.0, {"t": times.t, **labels})
            absent = torch.zeros(len(times.t)) if times.absent is None else times.absent.double()
            yield compare(absent, float(hold == "absent"), {"absent": "", **labels})


@law("path: draws are unbiased", tolerance=2e-3)
def draws_are_unbiased(path: Path) -> Iterator[Gap]:
    """Check that the sum of draws of speed * g is the integral of g dt along `at`.

    g is 1 - t of the field, times a function of the joint state: 1, the time of the field, the
    times of the other fields, products of these, and whether another field is clean. The mean over
    the uniform of a draw is a quadrature. The error is relative to 1 + the integral. Tolerance
    2e-3: the quadrature has an error of 1e-3 in a panel in which another field starts or stops.
    """
    fields = small_fields(path)
    nodes, node_weight = time_nodes()
    slot = torch.zeros(len(nodes), dtype=torch.long)
    drawn = path.draws(fields, NodeRng(nodes), slot, 1)
    tau, weight = path_nodes(path)
    along = path.at(fields, tau)
    for name in moving_legs(path):
        expected = _moments(along, name, weight)
        got = torch.zeros_like(expected)
        for joint in drawn:
            got = got + _moments(joint, name, node_weight)
        labels = {"field": name, "function number": torch.arange(len(got))}
        yield compare(got, expected, labels, relative_to=1.0 + expected.abs())


def _moments(joint: JointTimes, name: str, weight: Tensor) -> Tensor:
    """Return the weighted means of speed * g for several functions g of a joint state."""
    own = joint[name].t[:, 0]
    functions = [torch.ones_like(own), own, own**2]
    for other, times in joint.items():
        if other != name:
            t = times.t[:, 0]
            functions += [t, t**2, own * t, times.clean[:, 0].double()]
    # The factor 1 - t keeps the integrand bounded: the speed of a vector is infinite at t = 1.
    return torch.stack(functions) @ (weight * joint[name].speed[:, 0] * (1.0 - own))


@law("path: a sample's times do not depend on its batch", tolerance=1e-12)
def draws_are_independent_of_batch(path: Path) -> Iterator[Gap]:
    """Check that a sample has the same times in the whole batch as in any part of it.

    Draws are a function of seed, step and global index, and they differ from step to step.
    Errors are relative to 1 + the value. Tolerance 1e-12: vectorized functions round differently in
    tensors of another size.
    """
    fields = small_fields(path)
    whole = _draw(path, fields, torch.arange(SLOTS))
    other = _draw(path, fields, torch.arange(SLOTS), step=1)
    for name in moving_legs(path):
        pairs = [(one[name].t, two[name].t) for one, two in zip(whole, other)]
        is_new = any(bool((one != two).any()) for one, two in pairs)
        yield compare(torch.tensor(float(is_new)), 1.0, {"another step draws new times of": name})
    for slot in (torch.arange(8), torch.arange(40, 48), torch.arange(3, SLOTS, 7)):
        part = _draw(path, fields, slot)
        for got, expected in zip(part, whole):
            for name in fields:
                labels = {"field": name, "slot": slot}
                yield compare(got[name].t, expected[name].t[slot], labels)
                speed = expected[name].speed[slot]
                yield compare(got[name].speed, speed, labels, relative_to=1.0 + speed)


# ------------------------------------------------------------------ end terms


@law("path: end terms are evaluated once, at the ends of the field", tolerance=1e-9)
def ends_are_scored_once(path: Path) -> Iterator[Gap]:
    """Check that the decoding term of a field is at t = 0 and its closing term at t = 1.

    Both have speed 1, and all other fields have speed 0 there. Tolerance 1e-9: an information time
    may let the interior times 1e-12 and 1 - 1e-12 stand for t = 0 and t = 1.
    """
    fields = small_fields(path)
    slot = torch.arange(SLOTS)
    for name in moving_legs(path):
        for time, joint in zip((0.0, 1.0), _ends(path, fields, name, slot)):
            own = joint[name]
            labels = {"field": name, "end": time}
            yield compare(own.t, time, {"t of": name, **labels})
            yield compare(own.speed, 1.0, {"speed of": name, **labels})
            outside = own.clean | _at_prior(own)
            yield compare(outside.double(), 0.0, {"moving state of": name, **labels})
            for other in fields:
                if other != name:
                    yield compare(joint[other].speed, 0.0, {"speed of": other, **labels})


@law("path: end terms see the other fields where the path has them", tolerance=1e-3)
def ends_follow_the_path(path: Path) -> Iterator[Gap]:
    """Check the states of the other fields in the decoding and in the closing term of a field.

    Sampling decodes a field at the start of its leg, so the others are as just after the start. It
    begins to move the field at the stop of its leg, so the others are as just before the stop:
    those with later legs are clean. Fields that stop at the same tau leave the prior together, so
    all of them are at the prior. Compared are times, clean fields and fields at the prior, with
    `at` at a distance of 1e-9. Tolerance 1e-3: t moves by this distance at most as its square root.
    """
    fields = small_fields(path)
    slot = torch.arange(4)
    moving = moving_legs(path)
    for name, leg in moving.items():
        first, last = _ends(path, fields, name, slot)
        after = path.at(fields, torch.full(slot.shape, leg.start + NEAR, dtype=torch.float64))
        before = path.at(fields, torch.full(slot.shape, leg.stop - NEAR, dtype=torch.float64))
        for other in fields:
            if other == name:
                continue
            labels = {"field": name, "state of": other}
            yield compare(first[other].t, after[other].t, {"decoding": "t", **labels})
            yield compare(_stage(first[other]), _stage(after[other]), {"decoding": "", **labels})
            other_leg = moving.get(other)
            stops_too = other_leg is not None and other_leg.stop == leg.stop
            stage = torch.full_like(_stage(last[other]), 2.0)
            expected = stage if stops_too else _stage(before[other])
            yield compare(last[other].t, before[other].t, {"closing": "t", **labels})
            yield compare(_stage(last[other]), expected, {"closing": "", **labels})


# ------------------------------------------------------------------ bound


@law("bound: that of independent fields is the sum of the single ones", tolerance=2e-3)
def independent_fields_add(path: Path) -> Iterator[Gap]:
    """Check that each field has the same terms along the path as it has without other fields.

    Every field has vectors and a constant prediction, so no field depends on another. The noise is
    0, and the mean over times is a quadrature. The error is relative to 1 + the term. Tolerance
    2e-3: the quadrature has an error of 1e-3 in a panel in which another field starts or stops.
    """
    fields = small_fields(path, has_tokens=False)
    nodes, weight = time_nodes()
    slot = torch.zeros(len(nodes), dtype=torch.long)
    x0, scored = clean_samples(fields, 1)
    x0 = {name: values.expand(len(slot), -1, -1) for name, values in x0.items()}
    scored = {name: values.expand(len(slot), -1) for name, values in scored.items()}
    rng = NodeRng(nodes)
    terms = joint_nelbo(fields, constant_network(fields), x0, scored, path, rng, slot, 1)
    for name in moving_legs(path):
        field = fields[name]
        single = nelbo(
            field.process,
            constant_vector,
            x0[name],
            scored[name],
            field.rule,
            rng.derive("train", field.positions),
            slot,
            1,
        )
        for term in ("closing", "diffusion", "decoding"):
            got = weight @ getattr(terms[name], term).sum(-1)
            expected = weight @ getattr(single, term).sum(-1)
            labels = {"field": name, "term": term}
            yield compare(got, expected, labels, relative_to=1.0 + expected.abs())


@law("bound: held fields add nothing and keep their states", tolerance=0.0)
def held_fields_add_nothing(path: Path) -> Iterator[Gap]:
    """Check that the terms of held fields are 0, and the states of clean fields those of the data.

    The network sees the clean vectors and tokens of a field that is held clean, marked as clean,
    in every evaluation. Tolerance 0: the values must be bitwise identical.
    """
    held = _held(path)
    fields = small_fields(path)
    slot = torch.arange(SLOTS)
    x0, scored = clean_samples(fields, len(slot))
    network = RecordingNetwork(constant_network(fields))
    rng = CounterRng(SEED, 0, slot, 1)
    terms = joint_nelbo(fields, network, x0, scored, path, rng, slot, SLOTS)
    for name, hold in held.items():
        yield compare(_total(terms[name]), 0.0, {"terms of": name, "held": hold})
        if hold != "clean":
            continue
        for state in network.states:
            labels = {"field": name, "held": hold}
            yield compare(state[name].zt, x0[name], {"state": "", **labels})
            yield compare(state[name].clean.double(), 1.0, {"clean": "", **labels})


def _total(terms: NelboTerms) -> Tensor:
    return terms.closing.abs() + terms.diffusion.abs() + terms.decoding.abs()


PATH_LAWS: tuple[Law, ...] = (
    fields_move_forward,
    held_fields_do_not_move,
    draws_are_unbiased,
    draws_are_independent_of_batch,
    ends_are_scored_once,
    ends_follow_the_path,
    independent_fields_add,
    held_fields_add_nothing,
)


def check_path(path: Path) -> list[LawReport]:
    """Apply every law of paths to a path of one or more fields."""
    return evaluate_laws(path, PATH_LAWS)
