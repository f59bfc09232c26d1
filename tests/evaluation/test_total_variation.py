"""Total variation of samples: brute force, exact quantiles of its error, and coverage."""

from __future__ import annotations

from itertools import product
from math import factorial, prod

import numpy as np
import pytest
from numpy.typing import NDArray

from ddiff.errors import ArgumentError
from ddiff.evaluation.judges import variation_of_values
from ddiff.evaluation.total_variation import count_values, total_variation, total_variation95

Floats = NDArray[np.float64]


def test_total_variation_is_the_largest_difference_of_the_probability_of_a_set() -> None:
    rng = np.random.default_rng(0)
    for _ in range(20):
        first, second = rng.integers(1, 9, (2, 5))
        p, q = first / first.sum(), second / second.sum()
        chosen = [np.array(marks, bool) for marks in product([0, 1], repeat=5)]
        largest = max(p[marks].sum() - q[marks].sum() for marks in chosen)
        assert total_variation(first, second) == pytest.approx(largest, abs=1e-15)


def test_total_variation_of_values_is_0_for_equal_and_1_for_disjoint_samples() -> None:
    assert variation_of_values("x", [3, 5, 5], [5, 3, 5, 5, 3, 5]).value == 0.0
    disjoint = variation_of_values("x", [3, 4], [5, 6, 7])
    assert disjoint.value == pytest.approx(1.0, abs=1e-15)
    assert disjoint.count == 2
    assert disjoint.interval is not None
    assert disjoint.interval[1] == 1.0


def test_count_values_counts_both_samples_over_all_values() -> None:
    first, second = count_values([2, 7, 2], [5, 7])
    assert (first.tolist(), second.tolist()) == ([2, 0, 1], [0, 1, 1])


@pytest.mark.parametrize("counts", [[], [0, 0]])
def test_total_variation_refuses_counts_without_samples(counts: list[int]) -> None:
    with pytest.raises(ArgumentError, match="positive sum"):
        total_variation(counts, counts)


def enumerate_counts(size: int, p: Floats) -> list[tuple[Floats, float]]:
    """Return all counts of `size` samples from p, with their multinomial probabilities."""
    outcomes = []
    for counts in product(range(size + 1), repeat=len(p)):
        if sum(counts) == size:
            orders = factorial(size) / prod(map(factorial, counts))
            weight = orders * float(np.prod(p ** np.array(counts)))
            outcomes.append((np.array(counts, np.float64), weight))
    return outcomes


def test_total_variation_interval_has_the_exact_quantile_of_the_error() -> None:
    """The quantile of the bootstrap equals that of all outcomes, which are few."""
    first, second = np.array([4, 1, 2]), np.array([2, 3, 0])
    p, q = first / first.sum(), second / second.sum()
    errors = []
    weights = []
    for (one, weight), (two, other) in product(enumerate_counts(7, p), enumerate_counts(5, q)):
        errors.append(np.abs((one / 7 - p) - (two / 5 - q)).sum() / 2.0)
        weights.append(weight * other)
    order = np.argsort(errors)
    total = np.cumsum(np.array(weights)[order])
    assert total[-1] == pytest.approx(1.0, abs=1e-12)
    exact = np.array(errors)[order][np.searchsorted(total, [0.94, 0.96])]
    estimate = total_variation(first, second)
    low, high = total_variation95(first, second, draws=20_000)
    # The share of 20,000 draws has a standard error of 0.0015, so 0.94 and 0.96 are 6 errors away.
    # The other end of the interval is cut at 0 or 1.
    half = max(estimate - low, high - estimate)
    assert exact[0] - 1e-12 <= half <= exact[1] + 1e-12


@pytest.mark.parametrize("shift", [0.0, 0.04, 0.3])
def test_total_variation_interval_contains_the_truth_in_95_percent_of_trials(shift: float) -> None:
    """400 trials with 200 and 1,000 samples of 8 values.

    The interval is conservative for different distributions. For equal ones, the coverage is that
    of the quantile: three standard errors of 400 trials are 0.033.
    """
    rng = np.random.default_rng(7)
    p = np.array([0.02, 0.08, 0.2, 0.25, 0.2, 0.13, 0.08, 0.04])
    q = p.copy()
    q[3] -= shift / 2
    q[4] -= shift / 2
    q[0] += shift
    hits = 0
    for trial in range(400):
        first, second = rng.multinomial(200, p), rng.multinomial(1000, q)
        low, high = total_variation95(first, second, draws=400, seed=trial)
        hits += low <= shift <= high
    assert hits / 400 >= 0.95 - 0.033
    if shift == 0.0:
        assert hits / 400 <= 0.95 + 0.033
