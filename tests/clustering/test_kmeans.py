"""Nested k-means finds planted clusters, keeps size limits and separates special tokens."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from ddiff.clustering.kmeans import _balance, nested_kmeans
from ddiff.errors import ArgumentError, DataError


def planted(
    groups: int, members: int, width: int = 16, noise: float = 0.1
) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """Return points around orthogonal directions, and the group number of each point.

    `members` is the number of points of a group, and `noise` their standard deviation.
    """
    rng = np.random.default_rng(0)
    group = np.arange(groups * members) % groups
    points = 3 * np.eye(width)[group] + noise * rng.standard_normal((groups * members, width))
    return points.astype(np.float32), group


def sizes_of(parents: Sequence[NDArray[np.int64]]) -> list[NDArray[np.int64]]:
    return [np.bincount(level) for level in parents]


def nodes_of_tokens(parents: Sequence[NDArray[np.int64]], level: int) -> NDArray[np.int64]:
    """Return the node of each token at a level, by following `parents` up from the tokens."""
    node = parents[0]
    for above in parents[1:level]:
        node = above[node]
    return node


def test_nested_kmeans_finds_planted_clusters() -> None:
    points, group = planted(8, 20)
    parents, _ = nested_kmeans(points, [8])
    assert len({(a, b) for a, b in zip(parents[0].tolist(), group.tolist())}) == 8


def test_nested_kmeans_ignores_a_common_offset_of_embeddings() -> None:
    """Embeddings of language models share a large mean, so that all have similar directions."""
    points, group = planted(8, 20)
    plain, _ = nested_kmeans(points, [8])
    offset = np.full(points.shape[1], 1000.0 * np.abs(points).max(), dtype=np.float32)
    moved, centroids = nested_kmeans((points + offset).astype(np.float32), [8])
    assert len({(a, b) for a, b in zip(moved[0].tolist(), group.tolist())}) == 8
    assert len({(a, b) for a, b in zip(moved[0].tolist(), plain[0].tolist())}) == 8
    assert float(np.abs(centroids[0] - offset).max()) < 2 * np.abs(points).max(), (
        "centroids are not centered"
    )


def test_nested_kmeans_finds_two_planted_levels() -> None:
    rng = np.random.default_rng(1)
    coarse = np.repeat(np.arange(4), 4)
    directions = 3 * np.eye(24)[coarse] + 1.5 * np.eye(24)[8 + np.arange(16)]
    fine = np.arange(320) % 16
    points = (directions[fine] + 0.02 * rng.standard_normal((320, 24))).astype(np.float32)
    parents, _ = nested_kmeans(points, [16, 4])
    assert len(set(zip(nodes_of_tokens(parents, 1).tolist(), fine.tolist()))) == 16
    assert len(set(zip(nodes_of_tokens(parents, 2).tolist(), coarse[fine].tolist()))) == 4


@pytest.mark.parametrize("sizes", [[1], [2], [50], [199], [60, 12], [60, 12, 3], [60, 1]])
@pytest.mark.parametrize("special", [(), (0, 7)])
def test_nested_kmeans_levels_have_the_given_sizes_and_no_empty_node(
    sizes: list[int], special: tuple[int, ...]
) -> None:
    points = np.random.default_rng(2).standard_normal((200, 8)).astype(np.float32)
    parents, centroids = nested_kmeans(points, sizes, special_ids=special)
    assert [len(level) for level in parents] == [200, *sizes[:-1]]
    assert [len(counts) for counts in sizes_of(parents)] == sizes
    assert all((counts > 0).all() for counts in sizes_of(parents))
    assert [c.shape for c in centroids] == [(size, 8) for size in sizes]


def test_nested_kmeans_with_one_cluster_per_token_separates_all_tokens() -> None:
    points = np.random.default_rng(2).standard_normal((200, 8)).astype(np.float32)
    assert sorted(nested_kmeans(points, [200])[0][0]) == list(range(200))


def test_nested_kmeans_separates_special_tokens_at_every_level() -> None:
    points = np.random.default_rng(3).standard_normal((100, 8)).astype(np.float32)
    parents, _ = nested_kmeans(points, [20, 5], special_ids=[3, 4, 50])
    for level, size in ((1, 20), (2, 5)):
        below = nodes_of_tokens(parents, level)
        assert np.flatnonzero(below == size - 1).tolist() == [3, 4, 50]


def test_nested_kmeans_ignores_the_embeddings_of_special_tokens() -> None:
    points = np.random.default_rng(4).standard_normal((100, 8)).astype(np.float32)
    moved = points.copy()
    moved[5] *= 1000
    trees = [nested_kmeans(given, [10], special_ids=[5])[0][0] for given in (points, moved)]
    assert np.array_equal(*trees)


def test_nested_kmeans_centroids_are_the_means_of_their_tokens() -> None:
    points = np.random.default_rng(5).standard_normal((90, 6)).astype(np.float32)
    parents, centroids = nested_kmeans(points, [12, 3])
    for level, means in enumerate(centroids, start=1):
        below = nodes_of_tokens(parents, level)
        for node, mean in enumerate(means):
            assert mean == pytest.approx(points[below == node].mean(0), abs=1e-6)  # float32


@pytest.mark.parametrize(
    ("min_share", "max_share"), [(0.1, 5.0), (0.5, 1.5), (1.0, 1.0), (0.0, 1.2)]
)
def test_nested_kmeans_keeps_cluster_sizes_within_limits(
    min_share: float, max_share: float
) -> None:
    # 150 close points, which plain k-means puts into one cluster, and 50 scattered ones.
    rng = np.random.default_rng(6)
    crowd = np.eye(12)[:1] * 5 + 0.01 * rng.standard_normal((150, 12))
    points = np.concatenate([crowd, rng.standard_normal((50, 12))]).astype(np.float32)
    parents, _ = nested_kmeans(points, [10], min_share=min_share, max_share=max_share)
    counts = np.bincount(parents[0], minlength=10)
    assert counts.min() >= max(1, np.floor(min_share * 20))
    assert counts.max() <= np.ceil(max_share * 20)


def test_balance_moves_the_point_with_the_least_cost_out_of_a_large_cluster() -> None:
    affinity = np.array([[0.9, 0.1], [0.9, 0.8], [0.9, 0.3], [0.0, 1.0]], dtype=np.float32)
    moved = _balance(affinity, np.array([0, 0, 0, 1]), lower=1, upper=2)
    assert moved.tolist() == [0, 1, 0, 1]


def test_balance_fills_an_empty_cluster_with_the_point_of_least_cost() -> None:
    affinity = np.array([[0.9, 0.1, 0.2], [0.9, 0.1, 0.85], [0.1, 0.9, 0.88]], dtype=np.float32)
    # Point 2 has the least loss, but is the only point of its cluster.
    assert _balance(affinity, np.array([0, 0, 1]), lower=1, upper=3).tolist() == [0, 2, 1]


def test_nested_kmeans_is_reproducible_by_seed() -> None:
    points = np.random.default_rng(7).standard_normal((300, 10)).astype(np.float32)
    trees = [nested_kmeans(points, [30, 6], seed=seed)[0] for seed in (0, 0, 1)]
    assert all(np.array_equal(a, b) for a, b in zip(trees[0], trees[1]))
    assert not np.array_equal(trees[0][0], trees[2][0])


def test_nested_kmeans_assigns_zero_embeddings_to_a_cluster() -> None:
    parents, _ = nested_kmeans(np.zeros((20, 4), dtype=np.float32), [4])
    assert len(np.unique(parents[0])) == 4


def test_nested_kmeans_does_not_modify_its_input() -> None:
    points = np.random.default_rng(8).standard_normal((50, 4)).astype(np.float32)
    before = points.copy()
    nested_kmeans(points, [5])
    assert np.array_equal(points, before)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"sizes": []}, "at least one cluster"),
        ({"sizes": [0]}, "at least one cluster"),
        ({"sizes": [51]}, "51 clusters on the finest level, but there are only 50 tokens"),
        (
            {"sizes": [50], "special_ids": [1, 2]},
            "only 48 tokens.*one branch of 2 special.*at most 49",
        ),
        ({"sizes": [8, 8]}, "decrease strictly"),
        ({"sizes": [4, 8]}, "decrease strictly"),
        ({"sizes": [4], "min_share": 1.5}, "min_share"),
        ({"sizes": [4], "max_share": 0.5}, "max_share"),
    ],
)
def test_nested_kmeans_refuses_impossible_arguments(
    arguments: dict[str, Any], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        nested_kmeans(np.ones((50, 4), dtype=np.float32), **arguments)


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_nested_kmeans_raises_an_error_that_names_the_row_of_a_non_finite_embedding(
    bad: float,
) -> None:
    points = np.ones((50, 4), dtype=np.float32)
    points[17, 2] = bad
    with pytest.raises(DataError, match="row 17"):
        nested_kmeans(points, [4])
