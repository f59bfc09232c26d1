"""Findings of judges: intervals, groups of draws, and checks of the drawn samples."""

from __future__ import annotations

import numpy as np
import pytest

from ddiff.errors import ArgumentError
from ddiff.evaluation.intervals import mean95, wilson95
from ddiff.evaluation.judges import (
    DrawnField,
    DrawnFields,
    group_means,
    mean_value,
    share_right,
)


@pytest.mark.parametrize(
    ("hits", "count", "interval"),
    [
        # Newcombe (1998), table I, method 3.
        (81, 263, (0.2553, 0.3662)),
        (15, 148, (0.0624, 0.1605)),
        (0, 20, (0.0, 0.1611)),
        (1, 29, (0.0061, 0.1718)),
    ],
)
def test_wilson_interval_matches_published_table(
    hits: int, count: int, interval: tuple[float, float]
) -> None:
    assert wilson95(hits, count) == pytest.approx(interval, abs=5e-5)  # four printed digits


def test_wilson_interval_of_all_hits_mirrors_the_interval_of_no_hit() -> None:
    low, high = wilson95(0, 7)
    assert wilson95(7, 7) == pytest.approx((1.0 - high, 1.0 - low), abs=1e-15)
    assert 0.0 < high < 1.0


def test_mean_of_one_number_has_no_interval() -> None:
    assert mean_value("x", [2.0]).interval is None


def test_share_right_counts_right_samples() -> None:
    finding = share_right("right", [True, False, True, True], chance=0.5)
    assert finding.value == 0.75
    assert finding.count == 4
    assert finding.interval == wilson95(3, 4)
    assert finding.chance == 0.5


def test_draws_of_one_sample_count_once_in_the_interval() -> None:
    """Repeating every number k times must not make the interval smaller."""
    values = np.array([1.0, 4.0, 2.0])
    repeated = mean_value("x", np.repeat(values, 5), np.repeat([7, 3, 5], 5))
    assert repeated.interval == pytest.approx(mean95(values))
    assert repeated.count == 3
    assert repeated.value == pytest.approx(values.mean())


@pytest.mark.parametrize("samples", [12, 50])
def test_share_of_several_draws_per_sample_has_an_interval_with_95_percent_coverage(
    samples: int,
) -> None:
    """2,000 trials with four draws per given sample, whose probability differs by sample.

    Four standard errors of the coverage are 0.0195. With few samples, the interval is a little
    too wide: measured are 0.973 and 0.958. With independent draws, the coverage would be 0.86.
    """
    numbers = np.tile(np.arange(samples), 4)
    covered = 0
    for trial in range(2000):
        rng = np.random.default_rng(trial)
        right = rng.random((4, samples)) < rng.beta(0.5, 0.5, samples)
        finding = share_right("right", right.reshape(-1), groups=numbers)
        assert finding.count == samples
        assert finding.interval is not None
        covered += finding.interval[0] <= 0.5 <= finding.interval[1]
    assert 0.9305 < covered / 2000 < 0.98


def test_share_of_equal_draws_counts_every_sample_once() -> None:
    numbers = np.tile(np.arange(10), 3)
    finding = share_right("right", np.ones(30, bool), groups=numbers)
    assert finding.interval == wilson95(10, 10)
    single = share_right("right", [True, False], groups=np.array([4, 2]))
    assert single == share_right("right", [True, False])


def test_group_means_are_ordered_by_group_number() -> None:
    values = np.array([[1.0, 0.0], [3.0, 2.0], [10.0, 10.0]])
    means = group_means(values, np.array([4, 4, 1]))
    assert np.array_equal(means, [[10.0, 10.0], [2.0, 1.0]])


def test_drawn_fields_refuse_missing_fields_and_different_counts() -> None:
    image = DrawnField(np.zeros((2, 4), np.int64))
    text = DrawnField(["a", "b", "c"])
    with pytest.raises(ArgumentError, match="missing are text"):
        DrawnFields("image | text", ["image"], ["text"], {"image": image})
    with pytest.raises(ArgumentError, match="same number of samples"):
        DrawnFields("joint", ["image", "text"], [], {"image": image, "text": text})
    with pytest.raises(ArgumentError, match="same number of samples"):
        DrawnFields("image", ["image"], [], {"image": image}, np.arange(3))
