"""`FlatTimes`: one noise time for all positions of a sample, stratified over the global batch.

The times do not depend on how the batch is split over ranks.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ddiff.core.information import IdentityTime
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, van_der_corput_order
from ddiff.errors import ArgumentError


def drawn(
    slots: int, rule: FlatTimes | None = None, step: int = 0, length: int = 1
) -> torch.Tensor:
    """Return the noise times [slots, length] of a global batch of `slots` samples."""
    slot = torch.arange(slots)
    return (
        (rule or FlatTimes())
        .draw(IdentityTime(), CounterRng(0, step, slot, length), slot, slots, length)
        .t
    )


@given(st.integers(1, 300))
@settings(deadline=None)
def test_van_der_corput_order_is_a_permutation(count: int) -> None:
    assert van_der_corput_order(count).sort().values.tolist() == list(range(count))


def test_van_der_corput_order_of_power_of_two_reverses_bits() -> None:
    assert van_der_corput_order(8).tolist() == [0, 4, 2, 6, 1, 5, 3, 7]


@given(st.integers(1, 130), st.integers(0, 10**6))
@settings(deadline=None, max_examples=50)
def test_flat_times_draw_one_time_in_every_stratum_of_the_batch(slots: int, step: int) -> None:
    assert (drawn(slots, step=step)[:, 0] * slots).floor().long().sort().values.tolist() == list(
        range(slots)
    )


@pytest.mark.parametrize("slots", [4, 16, 64, 512])
def test_flat_times_of_each_of_four_ranks_are_stratified(slots: int) -> None:
    for step in range(5):
        for quarter in drawn(slots, step=step)[:, 0].reshape(4, -1):
            share = len(quarter)
            assert (quarter * share).floor().long().sort().values.tolist() == list(range(share))


@pytest.mark.parametrize("slots", [20, 48, 96, 100, 300, 500])
def test_flat_times_of_each_of_four_ranks_have_mean_near_one_half(slots: int) -> None:
    """The mean time of a rank is near 1/2, for any number of samples.

    A rank has m consecutive samples. The mean of the midpoints of their strata is within 1.2/m of
    1/2 (measured up to m = 500). The draws within the strata change the mean by at most half a
    stratum, 0.5/slots.
    """
    share = slots // 4
    for step in range(5):
        means = drawn(slots, step=step)[:, 0].reshape(4, share).mean(-1)
        assert float((means - 0.5).abs().max()) < 1.2 / share + 0.5 / slots


def test_contiguous_strata_would_give_the_first_of_four_ranks_a_mean_of_1_8() -> None:
    """If sample i had stratum i, the times of the first of four ranks would have a mean of 1/8."""
    assert float(torch.arange(64).double().add(0.5).div(64).reshape(4, -1).mean(-1)[0]) == 0.125


def test_flat_time_rule_gives_each_rank_a_slice_of_the_global_times() -> None:
    whole = drawn(24)
    for ranks in (1, 2, 3, 8):
        parts = [
            FlatTimes().draw(IdentityTime(), CounterRng(0, 0, part, 1), part, 24, 1).t
            for part in torch.arange(24).chunk(ranks)
        ]
        assert torch.equal(torch.cat(parts), whole)


@pytest.mark.parametrize(("start", "stop"), [(0.0, 1.0), (0.001, 0.999), (0.2, 0.3)])
def test_flat_times_stay_in_the_window_and_their_speed_is_the_window_width(
    start: float, stop: float
) -> None:
    slot = torch.arange(64)
    rule, rng = FlatTimes(start, stop), CounterRng(0, 0, slot, 3)
    times = rule.draw(IdentityTime(), rng, slot, 64, 3)
    assert start <= float(times.t.min()) <= start + (stop - start) / 64
    assert stop - (stop - start) / 64 <= float(times.t.max()) <= stop
    assert torch.equal(times.t, times.t[:, :1].expand(-1, 3))  # one time per sequence
    assert times.speed.unique().tolist() == [stop - start]
    assert not times.clean.any()
    first, last = rule.ends(IdentityTime(), rng, slot, 64, 3)
    assert first.t.unique().tolist() == [start]
    assert last.t.unique().tolist() == [stop]
    assert first.speed.unique().tolist() == last.speed.unique().tolist() == [1.0]


def test_mean_of_speed_times_f_at_flat_times_estimates_the_integral_of_f() -> None:
    """E[speed f(t)] is the integral of f over the time window [a,b]; here f(t) = 1/t.

    A single draw has the variance (1/a - 1/b)(b - a) - ln^2(b/a). The mean over the samples of a
    batch has at most this variance divided by the number of samples. The tolerance is 5.3 standard
    errors of 600 steps; any of the five cases fails by chance with probability below 1e-6.
    """
    start, stop, steps = 0.05, 0.9, 600
    expected, width = math.log(stop / start), stop - start
    variance = width * (1 / start - 1 / stop) - expected**2
    for slots in (1, 2, 3, 7, 8):
        slot, total = torch.arange(slots), 0.0
        for step in range(steps):
            times = FlatTimes(start, stop).draw(
                IdentityTime(), CounterRng(1, step, slot, 1), slot, slots, 1
            )
            total += float((times.speed / times.t).mean()) / steps
        assert abs(total - expected) < 5.3 * math.sqrt(variance / (steps * slots))


@pytest.mark.parametrize(
    ("start", "stop"), [(0.5, 0.5), (0.9, 0.1), (-0.1, 1.0), (0.0, 1.1), (math.nan, 1.0)]
)
def test_flat_time_rule_rejects_a_window_outside_the_unit_interval(
    start: float, stop: float
) -> None:
    with pytest.raises(ArgumentError, match=r"need 0 <= start < stop <= 1; got start ="):
        FlatTimes(start, stop)
