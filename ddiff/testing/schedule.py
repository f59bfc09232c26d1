"""Conformance checks of a noise schedule alpha(t), the probability that a token is clean."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from ddiff.core.schedule import Schedule
from ddiff.testing.probes import ENDS, INNER, integral, times
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

OPEN = (*INNER, 1e-6, 1e-3, 1.0 - 1e-3, 1.0 - 1e-6)  # times inside (0, 1)


@law("schedule: derivative = autograd", tolerance=1e-9)
def derivative_is_autograd(schedule: Schedule) -> Iterator[Gap]:
    """Check that d_alpha(t) equals the derivative of alpha(t) that autograd computes.

    The error is relative to 1 + |d_alpha|. Tolerance 1e-9: float64 rounding of both derivatives.
    """
    t = times(OPEN)
    # the base class differentiates alpha by autograd
    expected = Schedule.d_alpha(schedule, t)
    yield compare(
        schedule.d_alpha(t),
        expected,
        {"t": t},
        relative_to=1.0 + expected.abs(),
    )


@law("schedule: alpha decreases within [0, 1]", tolerance=1e-12)
def alpha_decreases(schedule: Schedule) -> Iterator[Gap]:
    """Check that alpha(t) lies in [0, 1] and never increases with t.

    alpha is compared at 1001 times. Its derivative d_alpha must not be positive at times in (0, 1).
    Tolerance 1e-12: float64 rounding of alpha.
    """
    t = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
    alpha = schedule.alpha(t)
    yield compare(alpha.clamp(0.0, 1.0), alpha, {"t": t})
    yield compare(
        alpha.diff().clamp(min=0.0),
        0.0,
        {"t": t},
    )
    t = times(OPEN)
    yield compare(
        schedule.d_alpha(t).clamp(min=0.0),
        0.0,
        {"t": t},
    )


@law("schedule: ends as declared", tolerance=1e-12)
def schedule_ends(schedule: Schedule) -> Iterator[Gap]:
    """Check alpha(0) and alpha(1) against the flags of the schedule.

    If `closes_at_clean` is set, alpha(0) must be 1. If `closes_at_prior` is set, alpha(1) must be
    0. Both values must be finite. Tolerance 1e-12: float64 rounding.
    """
    ends = times(ENDS)
    alpha = schedule.alpha(ends)
    if schedule.closes_at_clean:
        yield compare(alpha[0], 1.0, {"t": 0})
    if schedule.closes_at_prior:
        yield compare(alpha[1], 0.0, {"t": 1})
    yield compare(
        alpha.isfinite().double(),
        1.0,
        {"finite alpha at t": ends},
    )


@law("schedule: one_minus_alpha is accurate near t = 0", tolerance=1e-9)
def one_minus_alpha_is_accurate(
    schedule: Schedule,
    finer: int = 1,
) -> Iterator[Gap]:
    """Check that one_minus_alpha(t) is 1 - alpha(t), with full relative accuracy near t = 0.

    The sum of one_minus_alpha and alpha must be 1, but the sum does not show relative errors of a
    small one_minus_alpha. The growth of one_minus_alpha from t/1000 to t is therefore also compared
    with the integral of -d_alpha, relative to one_minus_alpha(t). `finer` is a factor on the number
    of quadrature nodes. Tolerance 1e-9: the quadrature has an error of 1e-11.
    """

    def growth(t: Tensor) -> Tensor:
        return -schedule.d_alpha(t).unsqueeze(-1)

    t = times(OPEN, ENDS)
    yield compare(
        schedule.one_minus_alpha(t) + schedule.alpha(t),
        1.0,
        {"t": t},
    )
    for end in OPEN:
        start = end / 1000.0
        rest = schedule.one_minus_alpha(times((end,)))
        grown = rest - schedule.one_minus_alpha(times((start,)))
        expected = integral(growth, start, end, finer)
        # a constant schedule has 1 - alpha = 0 everywhere
        scale = rest.abs().clamp(min=1e-300)
        yield compare(grown, expected, {"t": end}, relative_to=scale)


SCHEDULE_LAWS: tuple[Law, ...] = (
    derivative_is_autograd,
    alpha_decreases,
    schedule_ends,
    one_minus_alpha_is_accurate,
)


def check_schedule(schedule: Schedule) -> list[LawReport]:
    """Apply every conformance check of noise schedules to a schedule."""
    return evaluate_laws(schedule, SCHEDULE_LAWS)
