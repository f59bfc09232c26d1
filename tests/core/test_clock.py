"""Level clocks: accuracy for small probabilities, conformance checks, and invalid schedules.

A level clock gives the probability that a token has reached each level of a tree by time t.
"""

from __future__ import annotations

from decimal import Decimal, localcontext

import pytest
import torch

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.schedule import (
    BernsteinSchedule,
    CosineSchedule,
    LinearSchedule,
    PowerSchedule,
    Schedule,
)
from ddiff.core.times import FlatTimes
from ddiff.errors import ArgumentError
from ddiff.testing import assert_laws, check_clock, check_schedule, check_time_rule

RATES = [
    (1.0, 2.0, 1.0),
    (1.0, 1.0001, 0.7),
    (1.0, 1.0, 1.0),
    (0.5, 1.0),
    (1.0,),
    (1.5, 1.0, 0.7, 1.0),
]
TIMES = (1e-6, 1e-4, 1e-3, 0.02, 0.5, 0.97, 1.0 - 1e-6)


def exact_masses(rates: tuple[float, ...], t: float) -> list[float]:
    """Return the probability of each level at time t for given rates of leaving the levels.

    The probabilities are the first row of exp(tau A), where tau = -ln(1 - t) and A is the
    generator. The power series is summed with 80 digits, because its terms grow to e^28.
    """
    with localcontext() as context:
        context.prec = 80
        tau = -(Decimal(1) - Decimal(t)).ln()
        hazards = [Decimal(rate) for rate in rates] + [Decimal(0)]
        term = [Decimal(1)] + [Decimal(0)] * len(rates)
        total = list(term)
        for k in range(1, 400):
            inflow = [Decimal(0)] + [hazards[i] * term[i] for i in range(len(rates))]
            term = [(inflow[i] - hazards[i] * term[i]) * tau / k for i in range(len(hazards))]
            total = [sum_ + new for sum_, new in zip(total, term)]
        return [float(mass) for mass in total]


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_log_time_clock_probabilities_have_relative_error_below_1e_10(
    rates: tuple[float, ...],
) -> None:
    t = torch.tensor(TIMES, dtype=torch.float64)
    expected = torch.tensor([exact_masses(rates, time) for time in TIMES], dtype=torch.float64)
    got = LogTimeClock(rates).pi(t)
    assert float(((got - expected).abs() / expected).max()) < 1e-10


@pytest.mark.parametrize("rates", RATES, ids=str)
def test_log_time_clock_passes_all_conformance_checks(rates: tuple[float, ...]) -> None:
    assert_laws(check_clock(LogTimeClock(rates)))


@pytest.mark.parametrize("powers", [(1.0,), (1.0, 2.0), (0.8, 1.5, 3.0)], ids=str)
def test_cdf_clock_passes_all_conformance_checks(powers: tuple[float, ...]) -> None:
    assert_laws(check_clock(CdfClock([PowerSchedule(power) for power in powers])))


@pytest.mark.parametrize(
    "schedule",
    [
        LinearSchedule(),
        LinearSchedule(0.01),
        CosineSchedule(),
        PowerSchedule(0.5),
        PowerSchedule(1.0),
        PowerSchedule(3.0),
    ],
    ids=lambda schedule: f"{type(schedule).__name__} {vars(schedule)}",
)
def test_schedules_pass_all_conformance_checks(schedule: Schedule) -> None:
    assert_laws(check_schedule(schedule))


@pytest.mark.parametrize("window", [(0.0, 1.0), (1e-3, 1.0 - 1e-3), (0.05, 0.9)], ids=str)
def test_time_rule_flat_times_passes_all_conformance_checks(window: tuple[float, float]) -> None:
    assert_laws(check_time_rule(FlatTimes(*window)))


@pytest.mark.parametrize(
    "schedules",
    [
        [LinearSchedule(0.005), PowerSchedule(3.0)],  # F_1(1) = 0.995 < F_2(1) = 1
        [PowerSchedule(0.01), CosineSchedule()],  # they cross at t = 0.992 and meet at 1
    ],
    ids=["at the end", "in the last hundredth"],
)
def test_cdf_clock_rejects_schedules_that_cross_near_time_0_or_1(schedules: list[Schedule]) -> None:
    with pytest.raises(ArgumentError, match="do not keep that order"):
        CdfClock(schedules)


def test_cdf_clock_accepts_schedules_that_are_equal_at_times_0_and_1() -> None:
    clock = CdfClock([CosineSchedule(), PowerSchedule(1.0), PowerSchedule(1.001)])
    assert float(clock.pi(torch.tensor([0.0, *TIMES, 1.0], dtype=torch.float64)).min()) >= 0.0


@pytest.mark.parametrize(
    ("lower", "higher"),
    [
        ([0.0, 0.9, 1.0, 1.0, 1.0, 1.0], [0.0, 0.1, 1.0, 1.0, 1.0, 1.0]),
        ([0.0, 0.5, 0.6, 0.9, 1.0, 1.0, 1.0], [0.0, 0.1, 0.2, 0.8, 1.0, 1.0, 1.0]),
    ],
)
def test_cdf_clock_accepts_ordered_tables_whose_occupancies_round_to_1(
    lower: list[float], higher: list[float]
) -> None:
    """Both occupancies round to 1 near t = 1, where the order is that of the alphas."""
    clock = CdfClock([BernsteinSchedule(lower), BernsteinSchedule(higher)])
    t = torch.tensor([1.0 - 1e-6], dtype=torch.float64)
    assert float(clock.cdf(t)[0, 0]) == float(clock.cdf(t)[0, 1]) == 1.0
    assert float(clock.pi(t)[0, 1]) > 0.0
    assert_laws(check_clock(clock))


@pytest.mark.parametrize("rate", [0.3, 0.5, 1.0])
def test_entry_time_is_accurate_at_times_within_1e_12_of_1(rate: float) -> None:
    """The entry time s of the root solves P(at the root at s) = 1 - (1 - s)^rate = u.

    At rate 0.3, a fraction 2.5e-4 of the tokens enters the root after 1 - 1e-12, the last time at
    which rates are evaluated. The tabulated entry times have an error of 1e-6 in ln(1 - s); the
    tolerance is 1e-5.
    """
    clock = LogTimeClock((rate,))
    u = torch.tensor([0.1, 0.5, 0.9, 0.99, 0.999], dtype=torch.float64)
    level, end = torch.ones(5, dtype=torch.long), torch.ones(5, dtype=torch.float64)
    expected = torch.log1p(-u) / rate
    found = torch.log1p(-clock.entry_time(level, end, u))
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=0.0)


def test_cdf_clock_rejects_two_tree_levels_reached_at_the_same_time() -> None:
    """If two levels are reached at the same time, the rates of the lower level would be 0/0."""
    with pytest.raises(ArgumentError, match=r"F_1\(t\) > F_2\(t\)"):
        CdfClock([PowerSchedule(1.5), PowerSchedule(1.5)])
