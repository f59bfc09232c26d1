"""Laws of a level clock: the chain of levels that a token passes in the tree."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ddiff.core.clock import LevelClock
from ddiff.core.oracle import propagate
from ddiff.testing.chain import PAIRS, TRIPLES
from ddiff.testing.probes import ENDS, INNER, NEAR_ENDS, integral, product, times
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

OPEN = (*INNER, *NEAR_ENDS, 1e-4, 1.0 - 1e-3)  # times inside (0, 1)
PAIRS_FROM_CLEAN = ((0.0, 1e-6), (0.0, 0.31), (0.0, 1.0), (0.02, 0.77), (0.5, 1.0 - 1e-6))


@law("clock: occupation is a distribution", tolerance=1e-12)
def occupation_is_a_distribution(clock: LevelClock) -> Iterator[Gap]:
    """The probability pi_l(t) of level l is >= 0 and sums to 1, also at both ends. Tolerance:
    rounding of sums over the levels."""
    t = times(OPEN, ENDS)
    pi = clock.pi(t)
    yield compare(pi.sum(-1), 1.0, {"t": t})
    yield compare(pi.clamp(max=0.0), 0.0, {"t": t})


@law("clock: ends as declared", tolerance=1e-9)
def clock_ends(clock: LevelClock) -> Iterator[Gap]:
    """closes_at_clean: level 0 has all mass at t = 0; closes_at_prior: the root has all mass at
    t = 1. Tolerance: rounding."""
    start, stop = clock.pi(times(ENDS))
    if clock.closes_at_clean:
        yield compare(start[0], 1.0, {"level 0 at t": 0})
    if clock.closes_at_prior:
        yield compare(stop[-1], 1.0, {"the root at t": 1})
        # a numerical transition must arrive as well, not only the occupation
        to_root = clock.transition(times((0.3,)), times((1.0,)))[0, :, -1]
        yield compare(to_root, 1.0, {"the root from 0.3 to t": 1})


@law("clock: inflow = derivative of the fraction that has entered", tolerance=1e-9)
def inflow_is_growth(clock: LevelClock) -> Iterator[Gap]:
    """inflow_l is the derivative of F_l(t), the probability of having entered level l by t.

    F_l(t) - F_l(t/1000) is compared with the integral of inflow_l, relative to itself for t >=
    1e-6, so that no digits are lost while a level is rare. Tolerance: quadrature and rounding have
    an error of 1e-11.
    """
    level = torch.arange(1, clock.num_levels + 1)
    for t in OPEN:
        # three decades of growth, so that the law also tests small t
        start = t / 1000.0
        grown = (clock.cdf(times((t,))) - clock.cdf(times((start,))))[0]
        flow = integral(clock.inflow, start, t)
        yield compare(
            grown,
            flow,
            {"level": level, "t": t},
            relative_to=flow.abs(),
        )


@law("clock: hazard = inflow / occupation", tolerance=1e-9)
def hazard_is_relative_inflow(clock: LevelClock) -> Iterator[Gap]:
    """The rate lambda_l of leaving level l satisfies lambda_l pi_l = dF_{l+1}/dt. Tolerance:
    relative, two roundings."""
    t = times(OPEN)
    inflow = clock.inflow(t)
    yield compare(
        clock.hazard(t) * clock.pi(t)[:, :-1],
        inflow,
        {"t": t},
        relative_to=inflow.abs(),
    )


@law("clock: transition = time-ordered integral of the hazards", tolerance=1e-8)
def clock_transition_is_oracle(clock: LevelClock) -> Iterator[Gap]:
    """The transition of the levels solves the chain of the hazards; its rows sum to 1.

    Tolerance: the integrator has an error of 1e-9 with 600 Magnus steps.
    """
    s, t = times(*PAIRS).reshape(-1, 2).T
    got = clock.transition(s, t)
    oracle = propagate(
        clock.generator,
        s,
        t,
        clock.num_levels + 1,
        steps=600,
    )
    yield compare(got, oracle, {"s": s, "t": t})
    yield compare(
        got.sum(-1),
        1.0,
        {"sum from s": s, "t": t},
    )


@law("clock: Chapman-Kolmogorov", tolerance=1e-6)
def clock_chapman_kolmogorov(clock: LevelClock) -> Iterator[Gap]:
    """K(s,u) K(u,t) = K(s,t) for the transition K of the levels.

    Tried also from the clean end to the prior. Tolerance: a numerical product over all of [0,1] has
    an error of 1e-7.
    """
    s, u, t = times(*TRIPLES).reshape(-1, 3).T
    composed = clock.transition(s, u) @ clock.transition(u, t)
    yield compare(
        composed,
        clock.transition(s, t),
        {"s": s, "u": u, "t": t},
    )


@law("clock: occupation follows the transitions", tolerance=1e-6)
def occupation_follows_transitions(clock: LevelClock) -> Iterator[Gap]:
    """pi(t) = pi(s) K(s,t), also from s = 0. Tolerance: a numerical product over all of [0,1] has
    an error of 1e-7."""
    s, t = times(*PAIRS_FROM_CLEAN).reshape(-1, 2).T
    moved = (clock.pi(s).unsqueeze(1) @ clock.transition(s, t)).squeeze(1)
    yield compare(moved, clock.pi(t), {"s": s, "t": t})


@law("clock: entry_time inverts its distribution", tolerance=1e-7)
def entry_time_inverts(clock: LevelClock) -> Iterator[Gap]:
    """entry_time(l, t, u) is the u-quantile of the time at which level l was entered.

    At s = entry_time(l, t, u), the probability that level l was entered before s, given level l at
    t, is pi_l(s) K_ll(s,t) / pi_l(t) = u. Tolerance: the bisection ends at the rounding of s, and
    numerical transitions have an error of 1e-9.
    """
    levels = torch.arange(1, clock.num_levels + 1)
    level, t, u = product(
        levels,
        times((0.3, 0.97)),
        times((0.1, 0.7)),
    )
    s = clock.entry_time(level, t, u)
    row = torch.arange(len(s))
    stay = clock.transition(s, t)[row, level, level]
    entered_before = clock.pi(s)[row, level] * stay / clock.pi(t)[row, level]
    yield compare(
        entered_before,
        u,
        {"level": level, "t": t, "u": u},
    )


CLOCK_LAWS: tuple[Law, ...] = (
    occupation_is_a_distribution,
    clock_ends,
    inflow_is_growth,
    hazard_is_relative_inflow,
    clock_transition_is_oracle,
    clock_chapman_kolmogorov,
    occupation_follows_transitions,
    entry_time_inverts,
)


def check_clock(clock: LevelClock) -> list[LawReport]:
    """Apply every law of a level clock."""
    return evaluate_laws(clock, CLOCK_LAWS)
