"""Sentences of `ddiff clock` on the choice of a clock."""

from __future__ import annotations

import pytest

from ddiff.run_dir.clock_record import ClockBound, ClockRecord
from ddiff.run_dir.command_record import Estimate
from ddiff.runs.clock_table import describe_choice


def make_record(compared: int, difference: Estimate) -> ClockRecord:
    """Return a record whose found clock is better than the recipe's by `difference`."""
    zero = Estimate(value=0.0)
    return ClockRecord(
        run="small",
        step=1,
        weights="ema",
        trained_near_path=True,
        protocol={"compared_documents": compared},
        field=[],
        gains={1: 0.1, 2: 0.2, 3: 0.15},
        fitted_gain=0.4,
        path=[[0.0, 0.0], [1.0, 1.0]],
        bounds=[
            ClockBound(
                name="recipe",
                bound=Estimate(value=2.0),
                minus_diagonal=zero,
                minus_recipe=zero,
            ),
            ClockBound(
                name="found",
                bound=Estimate(value=1.9),
                minus_diagonal=zero,
                minus_recipe=difference,
                occupancies=[[0.0, 1.0], [0.0, 1.0]],
            ),
        ],
        choice="found",
        fingerprints={},
    )


@pytest.mark.parametrize(("compared", "is_warned"), [(4, True), (15, True), (16, False)])
def test_choice_from_few_documents_warns_of_narrow_intervals(
    compared: int, is_warned: bool
) -> None:
    clear = Estimate(value=-0.1, interval=(-0.15, -0.05))
    text = " ".join(describe_choice(make_record(compared, clear)))
    assert ("may be too narrow" in text) == is_warned
    assert "not significant" not in text


def test_difference_whose_interval_contains_0_is_not_significant() -> None:
    unclear = Estimate(value=-0.1, interval=(-0.25, 0.05))
    text = " ".join(describe_choice(make_record(40, unclear)))
    assert "not significant" in text
    assert "0.2000 nats per token" in text
    assert "largest of 3 degrees" in text
