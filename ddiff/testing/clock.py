"""Laws of a level clock."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ddiff.core.clock import LevelClock
from ddiff.core.oracle import propagate
from ddiff.testing.chain import PAIRS, TRIPLES
from ddiff.testing.probes import ENDS, INNER, NEAR_ENDS, integral, product, times
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

OPEN = (*INNER, *NEAR_ENDS, 1e-4, 1.0 - 1e-3)


@law("clock: occupation is a law", tolerance=1e-12)
def occupation_is_a_law(clock: LevelClock) -> Iterator[Gap]:
    """pi_l(t) >= 0 with sum 1, ends included. Rounding of L terms."""
    t = times(OPEN, ENDS)
    pi = clock.pi(t)
    yield compare(pi.sum(-1), 1.0, {"t": t})
    yield compare(pi.clamp(max=0.0), 0.0, {"t": t})


@law("clock: ends as declared", tolerance=1e-9)
def clock_ends(clock: LevelClock) -> Iterator[Gap]:
    """closes_at_clean: all at level 0 at t = 0; closes_at_prior: all at the root at t = 1. Rounding."""
    start, stop = clock.pi(times(ENDS))
    if clock.closes_at_clean:
        yield compare(start[0], 1.0, {"level 0 at t": 0})
    if clock.closes_at_prior:
        yield compare(stop[-1], 1.0, {"the root at t": 1})
        yield compare(
            clock.transition(times((0.3,)), times((1.0,)))[0, :, -1],
            1.0,
            {"the root from 0.3 to t": 1},
        )


@law("clock: inflow = growth of what has climbed", tolerance=1e-9)
def inflow_is_growth(clock: LevelClock) -> Iterator[Gap]:
    """F_l(t) - F_l(t/1000) is the integral of inflow_l, relative to itself for t >= 1e-6: the derivative is right and no
    digits are lost where a level is rare, whatever the rates. Quadrature and rounding leave 1e-11."""
    for t in OPEN:
        grown = (clock.cdf(times((t,))) - clock.cdf(times((t / 1000.0,))))[0]
        flow = integral(clock.inflow, t / 1000.0, t)
        yield compare(
            grown, flow, {"level": torch.arange(1, clock.num_levels + 1), "t": t}, flow.abs()
        )


@law("clock: hazard = inflow / occupation", tolerance=1e-9)
def hazard_is_inflow_per_head(clock: LevelClock) -> Iterator[Gap]:
    """lambda_l pi_l = F_{l+1}', relative: two roundings."""
    t = times(OPEN)
    inflow = clock.inflow(t)
    yield compare(clock.hazard(t) * clock.pi(t)[:, :-1], inflow, {"t": t}, inflow.abs())


@law("clock: transition = time-ordered integral of the hazards", tolerance=1e-8)
def clock_transition_is_oracle(clock: LevelClock) -> Iterator[Gap]:
    """P(level j at t | level i at s) solves the chain of the hazards; 600 Magnus steps hold 1e-9. Rows are laws."""
    s, t = times(*PAIRS).reshape(-1, 2).T
    got = clock.transition(s, t)
    yield compare(
        got, propagate(clock.generator, s, t, clock.num_levels + 1, steps=600), {"s": s, "t": t}
    )
    yield compare(got.sum(-1), 1.0, {"sum from s": s, "t": t})


@law("clock: Chapman-Kolmogorov", tolerance=1e-6)
def clock_chapman_kolmogorov(clock: LevelClock) -> Iterator[Gap]:
    """K(s,u) K(u,t) = K(s,t), from clean to prior as well. A numerical product over all of [0,1] leaves 1e-7."""
    s, u, t = times(*TRIPLES).reshape(-1, 3).T
    yield compare(
        clock.transition(s, u) @ clock.transition(u, t),
        clock.transition(s, t),
        {"s": s, "u": u, "t": t},
    )


@law("clock: occupation follows the transitions", tolerance=1e-6)
def occupation_follows_transitions(clock: LevelClock) -> Iterator[Gap]:
    """pi(t) = pi(s) K(s,t), also from s = 0. A numerical product over all of [0,1] leaves 1e-7."""
    s, t = (
        times((0.0, 1e-6), (0.0, 0.31), (0.0, 1.0), (0.02, 0.77), (0.5, 1.0 - 1e-6))
        .reshape(-1, 2)
        .T
    )
    moved = (clock.pi(s).unsqueeze(1) @ clock.transition(s, t)).squeeze(1)
    yield compare(moved, clock.pi(t), {"s": s, "t": t})


@law("clock: entry_time inverts its own law", tolerance=1e-7)
def leave_time_inverts(clock: LevelClock) -> Iterator[Gap]:
    """At s = entry_time(l, t, u) the chance of having entered l before s, pi_l(s) K_ll(s,t) / pi_l(t), is u. The
    bisection ends at the rounding of s, where numerical transitions hold 1e-9."""
    level, t, u = product(
        torch.arange(1, clock.num_levels + 1), times((0.3, 0.97)), times((0.1, 0.7))
    )
    s = clock.entry_time(level, t, u)
    rows = torch.arange(len(s))
    stay = clock.transition(s, t)[rows, level, level]
    yield compare(
        clock.pi(s)[rows, level] * stay / clock.pi(t)[rows, level],
        u,
        {"level": level, "t": t, "u": u},
    )


CLOCK_LAWS: tuple[Law, ...] = (
    occupation_is_a_law,
    clock_ends,
    inflow_is_growth,
    hazard_is_inflow_per_head,
    clock_transition_is_oracle,
    clock_chapman_kolmogorov,
    occupation_follows_transitions,
    leave_time_inverts,
)


def check_clock(clock: LevelClock) -> list[LawReport]:
    """Every law of a level clock."""
    return evaluate_laws(clock, CLOCK_LAWS)
