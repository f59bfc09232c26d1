"""MAUVE: values for equal, disjoint and hand-made sets."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest

from ddiff.errors import ArgumentError
from ddiff.evaluation.mauve import divergence_area, mauve, measure_mauve


def directions(count: int, groups: list[int], seed: int) -> np.ndarray:
    """Vectors [count,8] near the axes `groups`."""
    rng = np.random.default_rng(seed)
    axes = np.eye(8)[np.resize(groups, count)]
    return axes + 0.05 * rng.standard_normal((count, 8))


def test_mauve_of_a_set_with_itself_is_one() -> None:
    vectors = directions(60, [0, 1, 2, 3], seed=0)
    # p = q gives exactly the curve from (0, 1) over (1, 1) to (1, 0)
    assert mauve(vectors, vectors) == pytest.approx(1.0, abs=1e-9)


def test_mauve_of_two_draws_of_one_distribution_is_near_one() -> None:
    found = mauve(directions(400, [0, 1, 2, 3], 0), directions(400, [0, 1, 2, 3], 1), clusters=4)
    assert found > 0.95


def test_mauve_of_disjoint_sets_is_near_zero() -> None:
    # The curve of disjoint p and q is (1 - w)^5, w^5; its area is B(6, 5) 5 = 0.004, and the
    # trapezoidal rule with 25 points adds less than 0.002.
    found = mauve(directions(60, [0, 1], seed=0), directions(60, [4, 5], seed=1))
    assert found < 0.01


def test_mauve_falls_when_a_mode_is_missing() -> None:
    reference = directions(200, [0, 1, 2, 3], seed=0)
    complete = mauve(directions(200, [0, 1, 2, 3], seed=1), reference, clusters=4)
    missing = mauve(directions(200, [0, 1, 2], seed=1), reference, clusters=4)
    collapsed = mauve(directions(200, [0], seed=1), reference, clusters=4)
    assert complete > missing > collapsed


def test_divergence_area_is_symmetric_and_one_for_equal_distributions() -> None:
    p = np.array([0.5, 0.3, 0.2])
    q = np.array([0.1, 0.2, 0.7])
    assert divergence_area(p, p) == pytest.approx(1.0)
    assert divergence_area(p, q) == pytest.approx(divergence_area(q, p))
    assert 0.0 < divergence_area(p, q) < 1.0


def test_divergence_area_of_disjoint_distributions_equals_the_integral() -> None:
    found = divergence_area(np.array([1.0, 0.0]), np.array([0.0, 1.0]))
    # points (w^5, (1 - w)^5): the integral is 5 B(5, 6) = 5 4! 5! / 10! = 0.00397
    assert found == pytest.approx(0.00397, abs=0.002)


def test_mauve_of_two_clusters_equals_the_sum_by_hand() -> None:
    # 20 samples: 15 at the first point and 5 at the second; 20 rows: 5 and 15
    points = np.eye(2)
    samples = points[np.repeat([0, 1], [15, 5])]
    rows = points[np.repeat([0, 1], [5, 15])]
    curve = [(0.0, 1.0), (1.0, 0.0)]
    for number in range(25):
        w = 1e-6 + number * (1.0 - 2e-6) / 24
        r = [w * 0.75 + (1 - w) * 0.25, w * 0.25 + (1 - w) * 0.75]
        from_samples = 0.75 * math.log(0.75 / r[0]) + 0.25 * math.log(0.25 / r[1])
        from_rows = 0.25 * math.log(0.25 / r[0]) + 0.75 * math.log(0.75 / r[1])
        curve.append((math.exp(-5 * from_rows), math.exp(-5 * from_samples)))
    # with rising w, the divergence from the samples falls and that from the rows rises
    curve.sort(key=lambda point: (point[0], -point[1]))
    area = 0.0
    for (left, high), (right, low) in itertools.pairwise(curve):
        area += (right - left) * (high + low) / 2
    assert mauve(samples, rows, clusters=2) == pytest.approx(area, abs=1e-12)
    # the same two clusters are found with every seed
    found = measure_mauve(samples, rows)
    assert found.seeds == 5
    assert (found.lowest, found.value, found.highest) == pytest.approx((area, area, area))


def test_mauve_over_seeds_is_the_mean_of_single_seeds() -> None:
    rng = np.random.default_rng(0)
    samples = rng.standard_normal((60, 8))
    rows = rng.standard_normal((60, 8)) + 0.3
    single = [mauve(samples, rows, seed=seed) for seed in range(3, 8)]
    found = measure_mauve(samples, rows, seed=3)
    assert found.value == pytest.approx(np.mean(single), abs=1e-12)
    assert (found.lowest, found.highest) == (min(single), max(single))
    assert found.lowest < found.highest  # otherwise this test would not see the seeds
    assert measure_mauve(samples, rows, seed=2**64 - 1).seeds == 5  # seeds of a recipe


@pytest.mark.parametrize(
    ("features", "expected"),
    [
        (np.ones((5, 8)), "at least 20"),
        (np.ones((30, 7)), "one width"),
        (np.full((30, 8), np.nan), "finite"),
    ],
)
def test_mauve_refuses_too_few_vectors_other_widths_and_nan(
    features: np.ndarray, expected: str
) -> None:
    with pytest.raises(ArgumentError, match=expected):
        mauve(features, np.ones((30, 8)))
