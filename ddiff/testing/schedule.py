"""Laws of a schedule."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from ddiff.core.schedule import Schedule
from ddiff.testing.probes import ENDS, INNER, integral, times
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

OPEN = (*INNER, 1e-6, 1e-3, 1.0 - 1e-3, 1.0 - 1e-6)


@law("schedule: derivative = autograd", tolerance=1e-9)
def derivative_is_autograd(schedule: Schedule) -> Iterator[Gap]:
    """d_alpha is the derivative of alpha, as autograd has it. Relative: both are rounded once or twice."""
    t = times(OPEN)
    expected = Schedule.d_alpha(schedule, t)
    yield compare(schedule.d_alpha(t), expected, {"t": t}, 1.0 + expected.abs())


@law("schedule: alpha falls within [0, 1]", tolerance=1e-12)
def alpha_falls(schedule: Schedule) -> Iterator[Gap]:
    """alpha is a probability that never rises with t. Rounding of alpha."""
    t = torch.linspace(0.0, 1.0, 1001, dtype=torch.float64)
    alpha = schedule.alpha(t)
    yield compare(alpha.clamp(0.0, 1.0), alpha, {"t": t})
    yield compare(alpha.diff().clamp(min=0.0), 0.0, {"t": t})
    yield compare(schedule.d_alpha(times(OPEN)).clamp(min=0.0), 0.0, {"t": times(OPEN)})


@law("schedule: ends as declared", tolerance=1e-12)
def schedule_ends(schedule: Schedule) -> Iterator[Gap]:
    """closes_at_clean: alpha(0) = 1; closes_at_prior: alpha(1) = 0; both ends are finite. Rounding."""
    start, stop = schedule.alpha(times(ENDS))
    if schedule.closes_at_clean:
        yield compare(start, 1.0, {"t": 0})
    if schedule.closes_at_prior:
        yield compare(stop, 0.0, {"t": 1})
    yield compare(
        schedule.alpha(times(ENDS)).isfinite().double(), 1.0, {"finite alpha at t": times(ENDS)}
    )


@law("schedule: noised = 1 - alpha, accurate near t = 0", tolerance=1e-9)
def noised_is_the_rest(schedule: Schedule, finer: int = 1) -> Iterator[Gap]:
    """noised + alpha = 1; and from t/1000 to t noised grows by the integral of -d_alpha, relative to noised itself, so that
    no digits are lost where alpha is near 1. Quadrature leaves 1e-11."""
    t = times(OPEN, ENDS)
    yield compare(schedule.one_minus_alpha(t) + schedule.alpha(t), 1.0, {"t": t})
    for end in OPEN:
        noised = schedule.one_minus_alpha(times((end,)))
        grown = noised - schedule.one_minus_alpha(times((end / 1000.0,)))
        flow = integral(lambda t: -schedule.d_alpha(t).unsqueeze(-1), end / 1000.0, end, finer)
        yield compare(
            grown, flow, {"t": end}, noised.abs().clamp(min=1e-300)
        )  # a schedule may stand still


SCHEDULE_LAWS: tuple[Law, ...] = (
    derivative_is_autograd,
    alpha_falls,
    schedule_ends,
    noised_is_the_rest,
)


def check_schedule(schedule: Schedule) -> list[LawReport]:
    """Every law of a schedule."""
    return evaluate_laws(schedule, SCHEDULE_LAWS)
