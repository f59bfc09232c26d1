"""Target vectors of edits: centroid, shifted vector, nearest vector, points of a path."""

from __future__ import annotations

import numpy as np
import pytest

from ddiff.data.targets import compute_centroid, find_nearest, interpolate, shift_vector
from ddiff.errors import ArgumentError

RANDOM = np.random.default_rng(0)
VECTORS = RANDOM.normal(size=(12, 5))
LABELS = ["a", "b", "c"] * 4


def angle(first: np.ndarray, second: np.ndarray) -> float:
    cosine = first @ second / np.linalg.norm(first) / np.linalg.norm(second)
    return float(np.arccos(np.clip(cosine, -1.0, 1.0)))


def test_centroid_is_the_mean_of_the_vectors_of_one_class() -> None:
    vectors = [[1.0, 0.0], [5.0, 5.0], [3.0, 2.0]]
    assert compute_centroid(vectors, [0, 1, 0], 0).tolist() == [2.0, 1.0]
    total = sum(compute_centroid(VECTORS, LABELS, label) for label in "abc")
    np.testing.assert_allclose(total / 3, VECTORS.mean(0), atol=1e-15)


def test_centroid_refuses_an_absent_class_and_missing_labels() -> None:
    with pytest.raises(ArgumentError, match="no vector has the class 'd'"):
        compute_centroid(VECTORS, LABELS, "d")
    with pytest.raises(ArgumentError, match="11 labels and 12 vectors"):
        compute_centroid(VECTORS, LABELS[1:], "a")


def test_shift_moves_the_source_centroid_to_the_target_centroid() -> None:
    source, target = (compute_centroid(VECTORS, LABELS, label) for label in "ab")
    np.testing.assert_allclose(shift_vector(source, source, target), target, atol=1e-15)
    np.testing.assert_array_equal(shift_vector(VECTORS, source, target, 0.0), VECTORS)
    there = shift_vector(VECTORS, source, target, 0.7)
    np.testing.assert_allclose(shift_vector(there, target, source, 0.7), VECTORS, atol=1e-14)


def test_nearest_vector_has_the_largest_cosine_for_any_norm() -> None:
    np.testing.assert_array_equal(find_nearest(3.0 * VECTORS, VECTORS), np.arange(12))
    assert find_nearest([[1.0, 0.1]], [[0.1, 0.0], [1.0, 1.0]]).tolist() == [0]
    with pytest.raises(ArgumentError, match="norm 0"):
        find_nearest([[0.0, 0.0]], [[1.0, 0.0]])


def test_path_starts_and_ends_exactly_at_the_given_vectors() -> None:
    points = interpolate(VECTORS[0], VECTORS[1], [0.0, 0.5, 1.0])
    np.testing.assert_array_equal(points[[0, 2]], VECTORS[:2])


def test_path_has_linear_norms_and_linear_angles() -> None:
    first, last = VECTORS[0], 4.0 * VECTORS[1]
    shares = np.linspace(0.0, 1.0, 11)
    points = interpolate(first, last, shares)
    norms = (1.0 - shares) * np.linalg.norm(first) + shares * np.linalg.norm(last)
    np.testing.assert_allclose(np.linalg.norm(points, axis=-1), norms, rtol=1e-13)
    angles = [angle(first, point) for point in points]
    np.testing.assert_allclose(angles, shares * angle(first, last), atol=2e-8)
    assert (np.diff(angles) > 0.0).all()


def test_path_between_equal_directions_is_a_straight_line() -> None:
    points = interpolate([1.0, 2.0], [3.0, 6.0], [0.25])
    np.testing.assert_allclose(points, [[1.5, 3.0]], rtol=1e-14)
    nearly = interpolate([1.0, 0.0], [1.0, 1e-6], [0.5])
    np.testing.assert_allclose(nearly, [[1.0, 5e-7]], rtol=1e-9)


def test_path_refuses_opposite_directions_and_vectors_of_norm_0() -> None:
    with pytest.raises(ArgumentError, match="opposite"):
        interpolate([1.0, 0.0], [-2.0, 0.0], [0.5])
    with pytest.raises(ArgumentError, match="norm 0"):
        interpolate([1.0, 0.0], [0.0, 0.0], [0.5])
    with pytest.raises(ArgumentError, match="finite"):
        interpolate([1.0, np.nan], [0.0, 1.0], [0.5])
