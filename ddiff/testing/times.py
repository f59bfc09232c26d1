"""Laws of a time rule."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.noise import Noise
from ddiff.core.times import TimeRule, Times
from ddiff.testing.report import Gap, Law, LawReport, check, gap, law

SLOTS, LENGTH, DRAWS = 64, 4, 32


def _drawn(rule: TimeRule, step: int, slot: Tensor) -> Times:
    return rule.draw(Noise(11, step, slot, LENGTH), slot, SLOTS, LENGTH)


@law("times: within [0, 1], speeds not negative", tolerance=0.0)
def times_are_times(rule: TimeRule) -> Iterator[Gap]:
    """Every t lies in [0, 1], every speed is >= 0 and finite, and a clean position has speed 0. Exactly."""
    drawn = _drawn(rule, 0, torch.arange(SLOTS))
    yield gap(drawn.t.clamp(0.0, 1.0), drawn.t, {"t": drawn.t})
    yield gap(((drawn.speed >= 0.0) & drawn.speed.isfinite()).double(), 1.0, {"speed": drawn.speed})
    yield gap(torch.where(drawn.clean, drawn.speed, 0.0), 0.0, {"speed of a clean position at t": drawn.t})


@law("times: a sample's time does not depend on its batch", tolerance=0.0)
def times_are_their_own(rule: TimeRule) -> Iterator[Gap]:
    """A slot has the same times in the whole batch and in any share of it, so ranks and micro-batches agree. Exactly."""
    whole = _drawn(rule, 0, torch.arange(SLOTS))
    for share in (torch.arange(8), torch.arange(40, 48), torch.arange(3, SLOTS, 7)):
        yield gap(_drawn(rule, 0, share).t, whole.t[share], {"slot": share})
        yield gap(_drawn(rule, 0, share).speed, whole.speed[share], {"slot": share})


@law("times: speeds make the sum a mean over the window", tolerance=0.02)
def speeds_are_unbiased(rule: TimeRule) -> Iterator[Gap]:
    """The mean of speed * g(t) is the integral of g over each position's window, for g = 1, t, t^2.

    Relative; 32 batches of 64 strata: an unstratified rule with speeds of order 1 would err by 0.02 at one standard error.
    """
    slot = torch.arange(SLOTS)
    draws = [_drawn(rule, step, slot) for step in range(DRAWS)]
    t, speed = (torch.stack(parts) for parts in list(zip(*draws))[:2])
    first, last = (end.t[0] for end in rule.ends(Noise(11, 0, slot, LENGTH), slot, SLOTS, LENGTH))
    for power in range(3):
        expected = (last ** (power + 1) - first ** (power + 1)) / (power + 1)
        got = (speed * t**power).mean((0, 1))
        yield gap(got, expected, {"position": torch.arange(LENGTH), "g = t to the": power}, expected)


@law("times: every share of the batch sees the whole window", tolerance=0.15)
def shares_are_balanced(rule: TimeRule) -> Iterator[Gap]:
    """Eight contiguous shares of a batch of 64 (ranks, micro-batches) have nearly the same mean time.

    As a share of the window: a share of 8 strata in van der Corput order is off by its stratum's width 1/8, slices by 0.45.
    """
    drawn = _drawn(rule, 0, torch.arange(SLOTS))
    slot = torch.arange(SLOTS)
    first, last = (end.t[0] for end in rule.ends(Noise(11, 0, slot, LENGTH), slot, SLOTS, LENGTH))
    means = ((drawn.t - first) / (last - first)).reshape(8, -1).mean(-1)
    yield gap(means, float(means.mean()), {"share": torch.arange(8)})


TIME_RULE_LAWS: tuple[Law, ...] = (times_are_times, times_are_their_own, speeds_are_unbiased, shares_are_balanced)


def check_time_rule(rule: TimeRule) -> list[LawReport]:
    """Every law of a rule that draws times for a stratified global batch, each sequence through the whole window."""
    return check(rule, TIME_RULE_LAWS)
