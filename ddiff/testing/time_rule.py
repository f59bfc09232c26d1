"""Laws of a time rule, which draws the times at which each position of a batch is noised."""

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
    """First and last time [L] at which each position is charged, according to `ends`."""
    first, last = _ends(rule)
    return _mean_read_time(first), _mean_read_time(last)


def _mean_read_time(end: Times) -> Tensor:
    """Mean time [L] over the sequences in which a position is read."""
    # a position is read in some sequences only if the rule uses windows
    read = (end.speed > 0).double()
    return (end.t * read).sum(0) / read.sum(0)


def _at_prior(times: Times) -> Tensor:
    """bool [B,L]: positions that hold a draw of the prior."""
    return torch.zeros_like(times.clean) if times.at_prior is None else times.at_prior


def _outside(times: Times) -> Tensor:
    """bool [B,L]: positions that are clean or at the prior, and so not charged."""
    return times.clean | _at_prior(times)


@law("times: within [0, 1], speeds not negative", tolerance=0.0)
def times_are_valid(rule: TimeRule) -> Iterator[Gap]:
    """Every t is in [0, 1]; every speed is >= 0 and finite, and 0 at positions that are clean or at
    the prior. Tolerance: none."""
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
    yield compare(outside, 0.0, {"speed of an uncharged position at t": drawn.t})


@law("times: a sample's time does not depend on its batch", tolerance=0.0)
def times_are_independent_of_batch(rule: TimeRule) -> Iterator[Gap]:
    """A slot has the same times in the whole batch and in any part of it.

    Ranks and micro-batches then agree. Tolerance: none.
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
    """The mean of speed * g(t) is the integral of g over each position's window.

    Tried for g = 1, t, t^2. Tolerance: relative, for 128 batches of 64 strata. The standard error
    is at most 0.01. It is largest for a rule that charges a position in one of five sequences, for
    all five, where the ends of the window cut one stratum of every batch.
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


@law("times: every position is read once at each end", tolerance=0.1)
def ends_are_read_once(rule: TimeRule) -> Iterator[Gap]:
    """Each position is read at the ends of its window, with a mean speed of 1.

    Tolerance: if one of four positions is read with speed 4, the mean over 128 batches of 64 has a
    standard error of 0.02.
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
    yield compare(largest, 0.0, {"end": name, "t where it is read": expected})


@law("times: every part of the batch covers the whole window", tolerance=0.15)
def parts_are_balanced(rule: TimeRule) -> Iterator[Gap]:
    """Eight contiguous parts of a batch (ranks, micro-batches) have nearly the same mean time.

    Times are in units of the window, with clean positions at 0 and positions at the prior at 1.
    Tolerance: with 8 strata in van der Corput order the mean differs by up to the width 1/8 of a
    stratum of the part; with contiguous slices it differs by 0.45.
    """
    drawn = _draw_batch(rule)
    first, last = _window(rule)
    place = (drawn.t - first) / (last - first)
    # clean is before the window, the prior is after it
    place = place.masked_fill(drawn.clean, 0.0).masked_fill(_at_prior(drawn), 1.0)
    means = place.reshape(8, -1).mean(-1)
    yield compare(
        means,
        float(means.mean()),
        {"part": torch.arange(8)},
    )


@law("times: the path moves forward at its declared speed", tolerance=1e-9)
def paths_move_forward(rule: TimeRule) -> Iterator[Gap]:
    """Along `at`, positions go from clean through their windows to the prior, and never back.

    tau runs from 0 to 1. While a position is charged, dt/dtau is its speed. Tolerance: difference
    quotients of straight lines have an error of 1e-10.
    """
    tau = torch.linspace(0.0, 1.0, 241, dtype=torch.float64)
    path = rule.at(IdentityTime(), tau, LENGTH)
    labels = {"after tau": tau[:-1].unsqueeze(-1).expand(-1, LENGTH)}
    stage = 1.0 - path.clean.double() + _at_prior(path).double()  # 0 clean, 1 charged, 2 at prior
    yield compare(
        stage.diff(dim=0).clamp(max=0.0),
        0.0,
        labels,
    )
    charged = path.speed > 0
    # a quotient across an end of the window mixes two speeds
    both = charged[1:] & charged[:-1]
    quotient = path.t.diff(dim=0) / tau.diff().unsqueeze(-1)
    got = torch.where(both, quotient, 0.0)
    expected = torch.where(both, path.speed[1:], 0.0)
    yield compare(got, expected, labels)
    yield compare(
        path.t.diff(dim=0).clamp(max=0.0),
        0.0,
        labels,
    )


@law("times: no charged position attends to one at the prior", tolerance=0.0)
def prior_positions_are_hidden(rule: TimeRule) -> Iterator[Gap]:
    """No charged position attends to a position at the prior.

    Block numbers rise from left to right; no clean position is in a later block, and no position at
    the prior in an earlier or the same block, than a charged one. Tolerance: none.
    """
    path = rule.at(
        IdentityTime(),
        torch.linspace(0.0, 1.0, 61).double(),
        LENGTH,
    )
    for times in (_draw_batch(rule), path):
        if times.block is None:
            labels = {"no blocks, and yet a position is clean or at the prior, t": times.t}
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
    charged = times.speed > 0
    # per sequence; no charged position: no constraint
    latest = torch.where(charged, block, -torch.inf).amax(-1, keepdim=True)
    earliest = torch.where(charged, block, torch.inf).amin(-1, keepdim=True)
    too_early = _at_prior(times) & (block <= latest)
    too_late = times.clean & (block >= earliest)
    yield compare(too_early.double(), 0.0, {"block of a position at the prior": block})
    yield compare(too_late.double(), 0.0, {"block of a clean position": block})


TIME_RULE_LAWS: tuple[Law, ...] = (
    times_are_valid,
    times_are_independent_of_batch,
    speeds_are_unbiased,
    ends_are_read_once,
    parts_are_balanced,
    paths_move_forward,
    prior_positions_are_hidden,
)


def check_time_rule(rule: TimeRule) -> list[LawReport]:
    """Apply every law of a rule whose batches are stratified and cover each position's window."""
    return evaluate_laws(rule, TIME_RULE_LAWS)
