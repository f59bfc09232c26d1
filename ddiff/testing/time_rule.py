"""Laws of a time rule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.information import IdentityTime
from ddiff.core.rng import CounterRng
from ddiff.core.times import TimeRule, Times
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

SLOTS, LENGTH, DRAWS = 64, 4, 128


def _drawn(rule: TimeRule, step: int, slot: Tensor) -> Times:
    return rule.draw(IdentityTime(), CounterRng(11, step, slot, LENGTH), slot, SLOTS, LENGTH)


def _draws(rule: TimeRule) -> list[Times]:
    return [_drawn(rule, step, torch.arange(SLOTS)) for step in range(DRAWS)]


def _window(rule: TimeRule) -> tuple[Tensor, Tensor]:
    """[L] each: the times between which each position is charged, as the ends that are read say."""
    slot, found = torch.arange(SLOTS), []
    for which in (0, 1):
        end = rule.ends(IdentityTime(), CounterRng(11, 0, slot, LENGTH), slot, SLOTS, LENGTH)[which]
        read = (end.speed > 0).double()
        found.append((end.t * read).sum(0) / read.sum(0))
    return found[0], found[1]


def _nowhere(times: Times) -> Tensor:
    """Where a position is not charged: it is clean, or waits."""
    return times.clean if times.at_prior is None else times.clean | times.at_prior


@law("times: within [0, 1], speeds not negative", tolerance=0.0)
def times_are_times(rule: TimeRule) -> Iterator[Gap]:
    """Every t lies in [0, 1], every speed is >= 0 and finite, and who is clean or waits has speed 0. Exactly."""
    drawn = _drawn(rule, 0, torch.arange(SLOTS))
    yield compare(drawn.t.clamp(0.0, 1.0), drawn.t, {"t": drawn.t})
    yield compare(
        ((drawn.speed >= 0.0) & drawn.speed.isfinite()).double(), 1.0, {"speed": drawn.speed}
    )
    yield compare(
        torch.where(_nowhere(drawn), drawn.speed, 0.0),
        0.0,
        {"speed of an uncharged position at t": drawn.t},
    )


@law("times: a sample's time does not depend on its batch", tolerance=0.0)
def times_are_their_own(rule: TimeRule) -> Iterator[Gap]:
    """A slot has the same times in the whole batch and in any share of it, so ranks and micro-batches agree. Exactly."""
    whole = _drawn(rule, 0, torch.arange(SLOTS))
    for share in (torch.arange(8), torch.arange(40, 48), torch.arange(3, SLOTS, 7)):
        yield compare(_drawn(rule, 0, share).t, whole.t[share], {"slot": share})
        yield compare(_drawn(rule, 0, share).speed, whole.speed[share], {"slot": share})


@law("times: speeds make the sum a mean over the window", tolerance=0.04)
def speeds_are_unbiased(rule: TimeRule) -> Iterator[Gap]:
    """The mean of speed * g(t) is the integral of g over each position's window, for g = 1, t, t^2: each position's own
    time is uniform there.

    Relative; 128 batches of 64 strata. The standard error is at most 0.01: where a position is charged in one of five
    sequences, for all five, one stratum in a batch is cut by the ends of its window.
    """
    t, speed = (torch.stack(parts) for parts in list(zip(*_draws(rule)))[:2])
    first, last = _window(rule)
    for power in range(3):
        expected = (last ** (power + 1) - first ** (power + 1)) / (power + 1)
        got = (speed * t**power).mean((0, 1))
        yield compare(
            got, expected, {"position": torch.arange(LENGTH), "g = t to the": power}, expected
        )


@law("times: every position is read once at either end", tolerance=0.1)
def ends_are_read_once(rule: TimeRule) -> Iterator[Gap]:
    """The mean speed of each position in `ends` is 1, and it is read at one time only, its window's.

    Where one of four positions is read with speed 4, a mean over 128 batches of 64 has a standard error of 0.02.
    """
    first, last = _window(rule)
    slot = torch.arange(SLOTS)
    pairs = [
        rule.ends(IdentityTime(), CounterRng(11, step, slot, LENGTH), slot, SLOTS, LENGTH)
        for step in range(DRAWS)
    ]
    for name, times, ends in (
        ("first", first, [a for a, _ in pairs]),
        ("last", last, [b for _, b in pairs]),
    ):
        speed = torch.stack([end.speed for end in ends])
        yield compare(speed.mean((0, 1)), 1.0, {"end": name, "position": torch.arange(LENGTH)})
        t = torch.stack([torch.where(end.speed > 0, end.t, times) for end in ends])
        yield compare(
            (t - times).abs().amax((0, 1)), 0.0, {"end": name, "t where it is read": times}
        )


@law("times: every share of the batch sees the whole window", tolerance=0.15)
def shares_are_balanced(rule: TimeRule) -> Iterator[Gap]:
    """Eight contiguous shares of a batch of 64 (ranks, micro-batches) have nearly the same mean time.

    As a share of the window, clean positions being at 0 and waiting ones at 1: a share of 8 strata in van der Corput order
    is off by its stratum's width 1/8, slices by 0.45.
    """
    drawn, (first, last) = _drawn(rule, 0, torch.arange(SLOTS)), _window(rule)
    waiting = torch.zeros_like(drawn.clean) if drawn.at_prior is None else drawn.at_prior
    along = (
        ((drawn.t - first) / (last - first)).masked_fill(drawn.clean, 0.0).masked_fill(waiting, 1.0)
    )
    means = along.reshape(8, -1).mean(-1)
    yield compare(means, float(means.mean()), {"share": torch.arange(8)})


@law("times: the path goes forwards, at its speed", tolerance=1e-9)
def paths_go_forwards(rule: TimeRule) -> Iterator[Gap]:
    """Along `at`, with tau from 0 to 1, every position goes from clean over its window to waiting and never back, and
    where it is charged dt/dtau is its speed. Difference quotients of straight lines leave 1e-10."""
    tau = torch.linspace(0.0, 1.0, 241, dtype=torch.float64)
    path, after = (
        rule.at(IdentityTime(), tau, LENGTH),
        {"after tau": tau[:-1].unsqueeze(-1).expand(-1, LENGTH)},
    )
    waiting = torch.zeros_like(path.clean) if path.at_prior is None else path.at_prior
    stage = 1.0 - path.clean.double() + waiting.double()
    yield compare(stage.diff(dim=0).clamp(max=0.0), 0.0, after)
    charged = path.speed > 0
    both = charged[1:] & charged[:-1]
    quotient = path.t.diff(dim=0) / tau.diff().unsqueeze(-1)
    yield compare(torch.where(both, quotient, 0.0), torch.where(both, path.speed[1:], 0.0), after)
    yield compare(path.t.diff(dim=0).clamp(max=0.0), 0.0, after)


@law("times: nobody who is charged sees a position that waits", tolerance=0.0)
def waiting_is_unseen(rule: TimeRule) -> Iterator[Gap]:
    """Blocks rise from left to right; what is clean is not after, and what waits is after, all that is charged. Exactly."""
    for times in (
        _drawn(rule, 0, torch.arange(SLOTS)),
        rule.at(IdentityTime(), torch.linspace(0.0, 1.0, 61).double(), LENGTH),
    ):
        if times.block is None:
            yield compare(
                _nowhere(times).double(),
                0.0,
                {"no blocks, and yet a position is clean or waits at t": times.t},
            )
            continue
        block = times.block.expand(times.t.shape).double()
        yield compare(block.diff(dim=-1).clamp(max=0.0), 0.0, {"block": block[:, 1:]})
        latest = torch.where(times.speed > 0, block, -torch.inf).amax(-1, keepdim=True)
        earliest = torch.where(times.speed > 0, block, torch.inf).amin(-1, keepdim=True)
        waiting = torch.zeros_like(times.clean) if times.at_prior is None else times.at_prior
        yield compare((waiting & (block <= latest)).double(), 0.0, {"block of who waits": block})
        yield compare(
            (times.clean & (block >= earliest)).double(), 0.0, {"block of a clean position": block}
        )


TIME_RULE_LAWS: tuple[Law, ...] = (
    times_are_times,
    times_are_their_own,
    speeds_are_unbiased,
    ends_are_read_once,
    shares_are_balanced,
    paths_go_forwards,
    waiting_is_unseen,
)


def check_time_rule(rule: TimeRule) -> list[LawReport]:
    """Every law of a rule that draws times for a stratified global batch, each position through its whole window."""
    return evaluate_laws(rule, TIME_RULE_LAWS)
