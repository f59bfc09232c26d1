"""Conformance checks of a level clock, the Markov chain of a token's level in the tree.

A token starts at level 0 and moves up to the root. pi_l(t) is the probability of level l at time t,
and F_l(t) the probability of having reached level l by time t.
"""

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
    """Check that the level probabilities pi_l(t) are not negative and sum to 1.

    pi_l(t) is the probability that a token is at level l of the tree at time t. The tested times
    include 0 and 1. Tolerance 1e-12: float64 rounding of sums over the levels.
    """
    t = times(OPEN, ENDS)
    pi = clock.pi(t)
    yield compare(pi.sum(-1), 1.0, {"t": t})
    yield compare(pi.clamp(max=0.0), 0.0, {"t": t})


@law("clock: ends as declared", tolerance=1e-9)
def clock_ends(clock: LevelClock) -> Iterator[Gap]:
    """Check the level probabilities at t = 0 and t = 1 against the flags of the clock.

    If `closes_at_clean` is set, level 0 must have probability 1 at t = 0. If `closes_at_prior` is
    set, the root must have probability 1 at t = 1, and the transition from time 0.3 to time 1 must
    lead from every level to the root. Tolerance 1e-9: float64 rounding, and the error of numerical
    transitions.
    """
    start, stop = clock.pi(times(ENDS))
    if clock.closes_at_clean:
        yield compare(start[0], 1.0, {"level 0 at t": 0})
    if clock.closes_at_prior:
        yield compare(stop[-1], 1.0, {"the root at t": 1})
        # the numerical transition must reach the root too
        to_root = clock.transition(times((0.3,)), times((1.0,)))[0, :, -1]
        yield compare(to_root, 1.0, {"the root from 0.3 to t": 1})


@law("clock: inflow = derivative of the fraction that has entered", tolerance=1e-9)
def inflow_is_growth(clock: LevelClock) -> Iterator[Gap]:
    """Check that `inflow` is the time derivative of the probability of having reached a level.

    Let F_l(t) be the probability that a token has reached level l by time t. The difference F_l(t)
    - F_l(t/1000) is compared with the integral of the inflow into level l from t/1000 to t. The
    error is relative to the integral, so that the check also detects small errors at t = 1e-6,
    where F_l is small. Tolerance 1e-9: quadrature and rounding have an error of 1e-11.
    """
    level = torch.arange(1, clock.num_levels + 1)
    for t in OPEN:
        # t/1000 to t, so that the check also tests small t
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
    """Check that hazard times probability of level l is the inflow into level l + 1.

    The hazard of a level is the rate at which tokens leave the level. The error is relative to the
    inflow. Tolerance 1e-9: float64 rounding of two operations, with a margin.
    """
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
    """Check that the transition matrix of the levels is the integral of the hazards.

    The hazard of a level is the rate at which positions leave it. `transition(s, t)` is compared
    with a numerical solution of the Kolmogorov equation from s to t, and each of its rows must sum
    to 1. Tolerance 1e-8: the integrator has an error of 1e-9 with 600 Magnus steps.
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
    """Check that the transition matrix K of the levels satisfies K(s,u) K(u,t) = K(s,t).

    The triples s < u < t include one with s = 0 and t = 1. Tolerance 1e-6: a transition that is
    computed numerically over all of [0,1] has an error of 1e-7.
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
    """Check that the level probabilities satisfy pi(t) = pi(s) K(s,t).

    pi(t) is the row vector of level probabilities, and K(s,t) is the transition matrix of the
    levels. The pairs (s, t) include s = 0. Tolerance 1e-6: a transition that is computed
    numerically over all of [0,1] has an error of 1e-7.
    """
    s, t = times(*PAIRS_FROM_CLEAN).reshape(-1, 2).T
    moved = (clock.pi(s).unsqueeze(1) @ clock.transition(s, t)).squeeze(1)
    yield compare(moved, clock.pi(t), {"s": s, "t": t})


@law("clock: entry_time inverts its distribution", tolerance=1e-7)
def entry_time_inverts(clock: LevelClock) -> Iterator[Gap]:
    """Check that entry_time(l, t, u) is the u-quantile of the time at which level l was entered.

    The token is at level l at time t. The probability that it entered level l before time s is
    pi_l(s) K_ll(s,t) / pi_l(t), where pi_l is the probability of level l, and K_ll(s,t) is the
    probability of staying at level l from s to t. At s = entry_time(l, t, u), this probability must
    be u. Tolerance 1e-7: bisection finds s up to rounding, and numerical transitions have an error
    of 1e-9.
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
    """Apply every conformance check of level clocks to a clock."""
    return evaluate_laws(clock, CLOCK_LAWS)
