"""Faults planted in clocks and schedules, each found by the law meant for it."""

from __future__ import annotations

import pytest
import torch
from faults import CLOCK2, CLOCK3, FalselyClosing, Fault, OneLevelAtATime, assert_detected
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.schedule import CosineSchedule, LinearSchedule, PowerSchedule, Schedule
from ddiff.testing import clock, schedule


class InflowWithoutFactor(LogTimeClock):
    """beta_m' without 1/(gamma - 1), as published: right for gamma = 2 only."""

    def inflow(self, t: Tensor) -> Tensor:
        return super().inflow(t) * torch.tensor([1.0, self.rates[0] - 1.0], dtype=torch.float64)


class ByPartialFractions(LogTimeClock):
    """Partial fractions for distinct rates, with the remaining mass at the root."""

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
    def entry_time(self, level: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().entry_time(level, t, 1.0 - u)


class ExcessMass(LogTimeClock):
    def pi(self, t: Tensor) -> Tensor:
        return super().pi(t) * (1.0 + 1e-6 * t.unsqueeze(-1))


class EarlierMasses(LogTimeClock):
    """Masses of an earlier time: at t = 1 some are not at the root."""

    def pi(self, t: Tensor) -> Tensor:
        return super().pi(0.999 * t)


class ScaledCosine(CosineSchedule):
    """Cosine scaled by 1 - eps, both the function and its derivative."""

    eps = 1e-3

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return (1.0 - self.eps) * super().one_minus_alpha(t)

    def alpha(self, t: Tensor) -> Tensor:
        return 1.0 - self.one_minus_alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return (1.0 - self.eps) * super().d_alpha(t)

    closes_at_prior = False


class ScaledFunctionOnly(ScaledCosine):
    """As in a published cosine schedule; every bound is 0.1 % too high."""

    def d_alpha(self, t: Tensor) -> Tensor:
        return CosineSchedule.d_alpha(self, t)


class IncreasingAlpha(PowerSchedule):
    def alpha(self, t: Tensor) -> Tensor:
        return super().alpha(t) + 0.2 * (6.2831853 * 2.0 * t).sin() * t


class SubtractedAlpha(PowerSchedule):
    """1 - alpha by subtraction: at t = 1e-6 no digit of t^3 is left."""

    one_minus_alpha = Schedule.one_minus_alpha


FAULTS = [
    Fault(
        "missing 1/(gamma-1)",
        clock.inflow_is_growth,
        lambda: CLOCK2,
        lambda: InflowWithoutFactor((0.5, 1.0)),
    ),
    Fault(
        "derivative without its 1-eps",
        schedule.derivative_is_autograd,
        ScaledCosine,
        ScaledFunctionOnly,
    ),
    Fault(
        "nearly equal rates by partial fractions",
        clock.inflow_is_growth,
        lambda: LogTimeClock((1.0, 1.0001, 0.7)),
        lambda: ByPartialFractions((1.0, 1.0001, 0.7)),
    ),
    Fault(
        "a schedule falsely declared to close",
        schedule.schedule_ends,
        LinearSchedule,
        lambda: FalselyClosing(0.01),
    ),
    Fault("alpha increases", schedule.alpha_decreases, PowerSchedule, IncreasingAlpha),
    Fault(
        "digits lost near t = 0",
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
        "no two-level jumps in the transition",
        clock.clock_transition_is_oracle,
        lambda: CLOCK3,
        lambda: OneLevelAtATime((1.0, 2.0, 1.0)),
    ),
    Fault(
        "entry time of 1 - u",
        clock.entry_time_inverts,
        lambda: CLOCK2,
        lambda: ReversedEntryTime((0.5, 1.0)),
    ),
    Fault(
        "masses above one",
        clock.occupation_is_a_distribution,
        lambda: CLOCK2,
        lambda: ExcessMass((0.5, 1.0)),
    ),
    Fault(
        "a clock falsely declared to close",
        clock.clock_ends,
        lambda: CLOCK2,
        lambda: EarlierMasses((0.5, 1.0)),
    ),
    Fault(
        "one level per step",
        clock.clock_chapman_kolmogorov,
        lambda: CLOCK3,
        lambda: OneLevelAtATime((1.0, 2.0, 1.0)),
    ),
    Fault(
        "masses of an earlier time",
        clock.occupation_follows_transitions,
        lambda: CLOCK2,
        lambda: EarlierMasses((0.5, 1.0)),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
