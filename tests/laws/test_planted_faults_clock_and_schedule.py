"""Faults planted in clocks and schedules; each must be detected by one conformance check."""

from __future__ import annotations

import pytest
import torch
from faults import CLOCK2, CLOCK3, FalselyClosing, Fault, OneLevelAtATime, assert_detected
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.schedule import CosineSchedule, LinearSchedule, PowerSchedule, Schedule
from ddiff.testing import clock, schedule


class InflowWithoutFactor(LogTimeClock):
    """Fault: the derivative of the mask probability lacks the factor 1/(gamma - 1).

    The formula in arXiv 2510.08632 has this error; it is correct only for gamma = 2.
    """

    def inflow(self, t: Tensor) -> Tensor:
        return super().inflow(t) * torch.tensor([1.0, self.rates[0] - 1.0], dtype=torch.float64)


class ByPartialFractions(LogTimeClock):
    """Fault: level probabilities by partial fractions, which fail if two rates are nearly equal."""

    def pi(self, t: Tensor) -> Tensor:
        left, levels = (1.0 - t).log(), []
        for level in range(self.num_levels):
            rates, total = self.rates[: level + 1], torch.zeros_like(t)
            for i, rate in enumerate(rates):
                others = [other - rate for j, other in enumerate(rates) if j != i]
                total = (
                    total + (rate * left).exp() / torch.tensor(others, dtype=torch.float64).prod()
                )
            levels.append(total * torch.tensor(rates[:-1], dtype=torch.float64).prod())
        pi = torch.stack(levels, -1)
        return torch.cat([pi, 1.0 - pi.sum(-1, keepdim=True)], -1)


class ReversedEntryTime(LogTimeClock):
    """Fault: `entry_time` uses 1 - u in place of u."""

    def entry_time(self, level: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().entry_time(level, t, 1.0 - u)


class ExcessMass(LogTimeClock):
    """Fault: the level probabilities sum to more than 1."""

    def pi(self, t: Tensor) -> Tensor:
        return super().pi(t) * (1.0 + 1e-6 * t.unsqueeze(-1))


class EarlierMasses(LogTimeClock):
    """Fault: the level probabilities at time t are those at time 0.999 t."""

    def pi(self, t: Tensor) -> Tensor:
        return super().pi(0.999 * t)


class ScaledCosine(CosineSchedule):
    """Correct cosine schedule: alpha and its derivative are both scaled by 1 - eps."""

    eps = 1e-3

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return (1.0 - self.eps) * super().one_minus_alpha(t)

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - self.one_minus_alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return (1.0 - self.eps) * super().d_alpha(t)

    closes_at_prior = False


class ScaledFunctionOnly(ScaledCosine):
    """Fault: alpha is scaled by 1 - eps, but its derivative is not, as in a published schedule.

    Every bound is then 0.1 % too high.
    """

    def d_alpha(self, t: Tensor) -> Tensor:
        return CosineSchedule.d_alpha(self, t)


class IncreasingAlpha(PowerSchedule):
    """Fault: alpha increases with t over a part of [0, 1]."""

    def alpha(self, t: Tensor) -> Tensor:
        return super().alpha(t) + 0.2 * (6.2831853 * 2.0 * t).sin() * t


class SubtractedAlpha(PowerSchedule):
    """Fault: 1 - alpha is computed by subtraction, which loses all digits of t^3 at t = 1e-6."""

    one_minus_alpha = Schedule.one_minus_alpha


FAULTS = [
    Fault(
        "the inflow lacks 1/(gamma - 1)",
        clock.inflow_is_growth,
        lambda: CLOCK2,
        lambda: InflowWithoutFactor((0.5, 1.0)),
    ),
    Fault(
        "the derivative lacks the factor 1 - eps",
        schedule.derivative_is_autograd,
        ScaledCosine,
        ScaledFunctionOnly,
    ),
    Fault(
        "partial fractions lose digits for nearly equal rates",
        clock.inflow_is_growth,
        lambda: LogTimeClock((1.0, 1.0001, 0.7)),
        lambda: ByPartialFractions((1.0, 1.0001, 0.7)),
    ),
    Fault(
        "the schedule does not reach 0 as declared",
        schedule.schedule_ends,
        LinearSchedule,
        lambda: FalselyClosing(0.01),
    ),
    Fault("alpha increases", schedule.alpha_decreases, PowerSchedule, IncreasingAlpha),
    Fault(
        "1 - alpha loses its digits near t = 0",
        schedule.one_minus_alpha_is_accurate,
        lambda: PowerSchedule(3.0),
        lambda: SubtractedAlpha(3.0),
    ),
    Fault(
        "hazard and inflow disagree",
        clock.hazard_is_relative_inflow,
        lambda: CLOCK2,
        lambda: InflowWithoutFactor((0.5, 1.0)),
    ),
    Fault(
        "the transition has no two-level jumps",
        clock.clock_transition_is_oracle,
        lambda: CLOCK3,
        lambda: OneLevelAtATime((1.0, 2.0, 1.0)),
    ),
    Fault(
        "entry_time uses 1 - u",
        clock.entry_time_inverts,
        lambda: CLOCK2,
        lambda: ReversedEntryTime((0.5, 1.0)),
    ),
    Fault(
        "level probabilities sum to more than 1",
        clock.occupation_is_a_distribution,
        lambda: CLOCK2,
        lambda: ExcessMass((0.5, 1.0)),
    ),
    Fault(
        "the clock does not end at the root as declared",
        clock.clock_ends,
        lambda: CLOCK2,
        lambda: EarlierMasses((0.5, 1.0)),
    ),
    Fault(
        "transitions rise by at most one level",
        clock.clock_chapman_kolmogorov,
        lambda: CLOCK3,
        lambda: OneLevelAtATime((1.0, 2.0, 1.0)),
    ),
    Fault(
        "level probabilities are those of an earlier time",
        clock.occupation_follows_transitions,
        lambda: CLOCK2,
        lambda: EarlierMasses((0.5, 1.0)),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
