"""Learning-rate schedules."""

from __future__ import annotations

import pytest

from ddiff.errors import ArgumentError
from ddiff.training.learning_rate import WarmupConstant, WarmupCosine


def test_warmup_constant_rises_linearly_to_1_and_stays_constant() -> None:
    rate = WarmupConstant(4)
    assert [rate(step) for step in range(6)] == [0.25, 0.5, 0.75, 1.0, 1.0, 1.0]
    assert WarmupConstant()(0) == 1.0


def test_warmup_cosine_reaches_its_floor_at_the_last_step() -> None:
    rate = WarmupCosine(steps=12, warmup=4, floor=0.1)
    assert [rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert rate(7) == pytest.approx(
        0.55
    )  # halfway through the 8 decay steps the factor is the mean of 1 and the floor
    assert rate(11) == pytest.approx(0.1)
    assert all(rate(step) > rate(step + 1) for step in range(3, 11))


def test_warmup_cosine_depends_only_on_step_and_total_steps() -> None:
    assert WarmupCosine(20)(9) == pytest.approx(0.55)
    assert WarmupCosine(10)(9) == pytest.approx(0.1)


def test_warmup_cosine_has_no_decay_if_steps_do_not_exceed_warmup() -> None:
    assert [WarmupCosine(steps=2, warmup=4)(step) for step in range(2)] == [0.25, 0.5]
    assert [WarmupCosine(steps=4, warmup=4)(step) for step in (3, 4, 9)] == [1.0, 1.0, 1.0]
    assert [WarmupCosine(steps=2, warmup=4)(step) for step in (3, 4, 9)] == [1.0, 1.0, 1.0]


def test_learning_rate_schedules_refuse_settings_out_of_range() -> None:
    with pytest.raises(ArgumentError, match="warmup must be a number of steps, at least 0; got -1"):
        WarmupCosine(steps=10, warmup=-1)
    with pytest.raises(ArgumentError, match="floor must be a fraction"):
        WarmupCosine(steps=10, floor=1.5)
    with pytest.raises(ArgumentError, match="warmup must be a number of steps"):
        WarmupConstant(-1)
