"""MAUVE: values for equal, disjoint and hand-made sets."""

from __future__ import annotations

import numpy as np
import pytest

from ddiff.errors import ArgumentError
from ddiff.evaluation.mauve import divergence_area, mauve


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
