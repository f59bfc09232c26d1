"""Conformance checks of a time rule, which draws the noise time of every position of a batch.

A rule draws, for each position, a noise time t and a speed, which is the weight of the position in
the bound. Positions with speed 0 are not scored. Before the window of its noise times, a position
is clean. After the window, its state is drawn from the prior ("at the prior").
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.information import IdentityTime
from ddiff.core.rng import CounterRng
from ddiff.core.times import TimeRule, Times
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

SLOTS = 64  # strata of the global batch
LENGTH = 4
DRAWS = 128  # batches
SEED = 11


def _draw(
    rule: TimeRule,
    step: int,
    slot: Tensor,
) -> Times:
    rng = CounterRng(SEED, step, slot, LENGTH)
    return rule.draw(
        IdentityTime(),
        rng,
        slot,
        SLOTS,
        LENGTH,
    )


def _draw_batch(
    rule: TimeRule,
    step: int = 0,
) -> Times:
    return _draw(rule, step, torch.arange(SLOTS))


def _ends(
    rule: TimeRule,
    step: int = 0,
) -> tuple[Times, Times]:
    slot = torch.arange(SLOTS)
    rng = CounterRng(SEED, step, slot, LENGTH)
    return rule.ends(
        IdentityTime(),
        rng,
        slot,
        SLOTS,
        LENGTH,
    )


def _window(rule: TimeRule) -> tuple[Tensor, Tensor]:
    """Return the first noise time [L] and the last noise time [L] at which each position is scored.

    The bound scores a position if the position's speed, its weight in the bound, is above 0.
    """
    first, last = _ends(rule)
    return _mean_scored_time(first), _mean_scored_time(last)


def _mean_scored_time(end: Times) -> Tensor:
    """Return the mean noise time [L] of each position over the sequences that score the position.

    `end` holds the times of n sequences. A sequence scores a position if the speed of the position
    (its weight in the bound) is above 0.
    """
    # with windows, only some sequences score a position
    scored = (end.speed > 0).double()
    return (end.t * scored).sum(0) / scored.sum(0)


def _at_prior(times: Times) -> Tensor:
    """Return a bool mask [B,L] of the positions whose state is drawn from the prior."""
    return torch.zeros_like(times.clean) if times.at_prior is None else times.at_prior


def _outside(times: Times) -> Tensor:
    """Return a bool mask [B,L] of the positions that are clean or at the prior.

    The bound does not score these positions.
    """
    return times.clean | _at_prior(times)


@law("times: within [0, 1], speeds not negative", tolerance=0.0)
def times_are_valid(rule: TimeRule) -> Iterator[Gap]:
    """Check that noise times lie in [0, 1] and that speeds are finite and not negative.

    The speed of a position is its weight in the bound. The speed must be 0 if the position is clean
    or if its state is drawn from the prior. Tolerance 0: the conditions are exact.
    """
    drawn = _draw_batch(rule)
    yield compare(
        drawn.t.clamp(0.0, 1.0),
        drawn.t,
        {"t": drawn.t},
    )
    is_valid = (drawn.speed >= 0.0) & drawn.speed.isfinite()
    yield compare(
        is_valid.double(),
        1.0,
        {"speed": drawn.speed},
    )
    outside = torch.where(_outside(drawn), drawn.speed, 0.0)
    yield compare(outside, 0.0, {"speed of a position that is not scored, t": drawn.t})


@law("times: a sample's time does not depend on its batch", tolerance=0.0)
def times_are_independent_of_batch(rule: TimeRule) -> Iterator[Gap]:
    """Check that a sample has the same noise times and speeds in the whole batch as in any subset.

    Several ranks or micro-batches then draw the same times as a single process. Tolerance 0: the
    values must be bitwise identical.
    """
    whole = _draw_batch(rule)
    for slots in (torch.arange(8), torch.arange(40, 48), torch.arange(3, SLOTS, 7)):
        part = _draw(rule, 0, slots)
        yield compare(
            part.t,
            whole.t[slots],
            {"slot": slots},
        )
        yield compare(
            part.speed,
            whole.speed[slots],
            {"slot": slots},
        )


@law("times: weighted sums are unbiased over the window", tolerance=0.04)
def speeds_are_unbiased(rule: TimeRule) -> Iterator[Gap]:
    """Check that the mean of speed * g(t) is the integral of g over the window of each position.

    The speed is the weight of a position in the bound, t its noise time, and the window the
    interval of its noise times. The functions g are 1, t and t^2. The error is relative to the
    integral. Tolerance 0.04: the standard error over 128 batches of 64 samples is at most 0.01. The
    largest standard error is that of a rule that scores each position in one of five sequences,
    with weight 5.
    """
    batches = [_draw_batch(rule, step) for step in range(DRAWS)]
    t = torch.stack([times.t for times in batches])
    speed = torch.stack([times.speed for times in batches])
    first, last = _window(rule)
    for power in range(3):
        expected = (last ** (power + 1) - first ** (power + 1)) / (power + 1)
        got = (speed * t**power).mean((0, 1))
        labels = {"position": torch.arange(LENGTH), "g = t to the": power}
        yield compare(got, expected, labels, relative_to=expected)


@law("times: every position is scored once at each end of its window", tolerance=0.1)
def ends_are_scored_once(rule: TimeRule) -> Iterator[Gap]:
    """Check that every position has a mean speed of 1 at both ends of its window of noise times.

    The speed is the weight of a position in the bound. Its mean over many sequences must be 1, so
    that the decoding and prior terms of the bound count once. The noise time of a position with
    positive speed must be the first or last time. Tolerance 0.1: for a position that is scored in
    one of four sequences with speed 4, the mean over 128 batches of 64 samples has a standard error
    of 0.02.
    """
    first, last = _window(rule)
    pairs = [_ends(rule, step) for step in range(DRAWS)]
    yield from _end_gaps(
        "first",
        first,
        [pair[0] for pair in pairs],
    )
    yield from _end_gaps(
        "last",
        last,
        [pair[1] for pair in pairs],
    )


def _end_gaps(
    name: str,
    expected: Tensor,
    ends: list[Times],
) -> Iterator[Gap]:
    speed = torch.stack([end.speed for end in ends])
    yield compare(
        speed.mean((0, 1)),
        1.0,
        {"end": name, "position": torch.arange(LENGTH)},
    )
    t = torch.stack([torch.where(end.speed > 0, end.t, expected) for end in ends])
    largest = (t - expected).abs().amax((0, 1))
    yield compare(largest, 0.0, {"end": name, "t of scored positions": expected})


@law("times: every part of a batch covers the whole window", tolerance=0.15)
def parts_are_balanced(rule: TimeRule) -> Iterator[Gap]:
    """Check that eight contiguous parts of a batch have nearly the same mean noise time.

    The parts stand for ranks or micro-batches. Each noise time is rescaled to [0, 1] over the
    window of its position. Clean positions count as 0, and positions whose state is drawn from the
    prior count as 1. Tolerance 0.15: with 8 samples per part in van der Corput order, means differ
    by up to 1/8. If each part drew a contiguous slice of times, means would differ by 0.45.
    """
    drawn = _draw_batch(rule)
    first, last = _window(rule)
    place = (drawn.t - first) / (last - first)
    # a clean position is before its window, a position at the prior after it
    place = place.masked_fill(drawn.clean, 0.0).masked_fill(_at_prior(drawn), 1.0)
    means = place.reshape(8, -1).mean(-1)
    yield compare(
        means,
        float(means.mean()),
        {"part": torch.arange(8)},
    )


@law("times: the path moves forward at its declared speed", tolerance=1e-9)
def paths_move_forward(rule: TimeRule) -> Iterator[Gap]:
    """Check that the noise times t of `rule.at(tau)` never decrease and grow at the declared speed.

    tau runs from 0 to 1. Each position must first be clean, then pass through its window of noise
    times, and then be at the prior, with a state drawn from the prior. Within the window,
    difference quotients of t are compared with the speed dt/dtau. Tolerance 1e-9: difference
    quotients of straight lines have an error of 1e-10.
    """
    tau = torch.linspace(0.0, 1.0, 241, dtype=torch.float64)
    path = rule.at(IdentityTime(), tau, LENGTH)
    labels = {"after tau": tau[:-1].unsqueeze(-1).expand(-1, LENGTH)}
    stage = 1.0 - path.clean.double() + _at_prior(path).double()  # 0 clean, 1 scored, 2 at prior
    yield compare(
        stage.diff(dim=0).clamp(max=0.0),
        0.0,
        labels,
    )
    scored = path.speed > 0
    # a quotient across an end of the window mixes two speeds
    both = scored[1:] & scored[:-1]
    quotient = path.t.diff(dim=0) / tau.diff().unsqueeze(-1)
    got = torch.where(both, quotient, 0.0)
    expected = torch.where(both, path.speed[1:], 0.0)
    yield compare(got, expected, labels)
    yield compare(
        path.t.diff(dim=0).clamp(max=0.0),
        0.0,
        labels,
    )


@law("times: no scored position attends to a position at the prior", tolerance=0.0)
def prior_positions_are_hidden(rule: TimeRule) -> Iterator[Gap]:
    """Check that no scored position attends to a position whose state is drawn from the prior.

    The bound scores a position if its speed (weight in the bound) is above 0. A position attends to
    its own block and to earlier blocks. Block numbers must not decrease from left to right. Clean
    positions must be in earlier blocks than every scored position, and positions with states from
    the prior must be in later blocks. Tolerance 0: block numbers are integers.
    """
    path = rule.at(
        IdentityTime(),
        torch.linspace(0.0, 1.0, 61).double(),
        LENGTH,
    )
    for times in (_draw_batch(rule), path):
        if times.block is None:
            labels = {"a clean or prior position without blocks, t": times.t}
            yield compare(_outside(times).double(), 0.0, labels)
        else:
            yield from _block_gaps(
                times,
                times.block.expand(times.t.shape).double(),
            )


def _block_gaps(
    times: Times,
    block: Tensor,
) -> Iterator[Gap]:
    yield compare(
        block.diff(dim=-1).clamp(max=0.0),
        0.0,
        {"block": block[:, 1:]},
    )
    scored = times.speed > 0
    # compare blocks within a sequence; one without scored positions has no constraint
    latest = torch.where(scored, block, -torch.inf).amax(-1, keepdim=True)
    earliest = torch.where(scored, block, torch.inf).amin(-1, keepdim=True)
    too_early = _at_prior(times) & (block <= latest)
    too_late = times.clean & (block >= earliest)
    yield compare(too_early.double(), 0.0, {"block of a position at the prior": block})
    yield compare(too_late.double(), 0.0, {"block of a clean position": block})


TIME_RULE_LAWS: tuple[Law, ...] = (
    times_are_valid,
    times_are_independent_of_batch,
    speeds_are_unbiased,
    ends_are_scored_once,
    parts_are_balanced,
    paths_move_forward,
    prior_positions_are_hidden,
)


def check_time_rule(rule: TimeRule) -> list[LawReport]:
    """Apply every conformance check of time rules to a time rule.

    The checks require that the rule stratifies the times of a batch, and that the times of each
    position cover its whole window of noise times.
    """
    return evaluate_laws(rule, TIME_RULE_LAWS)
