"""Nested spherical k-means with balance limits: a tree over words, finest level first.

A level clusters the points of the level below (words, then nodes) by faiss's k-means on unit vectors, and then moves points
until every cluster holds between `min_share` and `max_share` times the mean number of points:

1. A cluster above the upper limit gives away the points that lose least similarity by going to the best cluster with room.
2. A cluster under the lower limit (at least one point) takes the outsiders that lose least, from clusters above theirs.

Both run in a fixed order, so the same input and seed give the same tree. The special words make one node of their own at
every level that has at least two: the last one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from ddiff.errors import ArgumentError, DataError

_ITERATIONS = 25
_Floats = NDArray[np.float32]
_Ints = NDArray[np.int64]


def nested_kmeans(
    embeddings: NDArray[np.floating],
    sizes: Sequence[int],
    *,
    seed: int = 0,
    min_share: float = 0.1,
    max_share: float = 5.0,
    special_ids: Sequence[int] = (),
) -> tuple[list[_Ints], list[_Floats]]:
    """Parents and centroids per level of a tree over the rows of `embeddings` [V, d], `sizes` strictly decreasing.

    `parents[l]` [sizes[l-1]] (V for l = 0) holds the index of each node's parent; `centroids[l]` [sizes[l], d] is the mean
    of the node's words as they were given. Raises ArgumentError for sizes or shares that cannot be, DataError for NaN.
    """
    vectors = np.ascontiguousarray(embeddings, dtype=np.float32)
    special = np.isin(np.arange(len(vectors)), np.asarray(special_ids, dtype=np.int64))
    _check(vectors, sizes, min_share, max_share, int((~special).sum()))
    parents, centroids = [], []
    points, apart = _unit(vectors - vectors[~special].mean(0)), special
    node_of_word: _Ints = np.arange(len(vectors))
    for size in sizes:
        branch = bool(apart.any()) and size > 1
        level = np.full(len(points), size - 1, dtype=np.int64)
        members = ~apart if branch else np.ones(len(points), dtype=bool)
        level[members] = _cluster(points[members], size - branch, seed, min_share, max_share)
        parents.append(level)
        node_of_word = level[node_of_word]
        centroids.append(_means(vectors, node_of_word, size))
        points = _unit(_means(points, level, size))
        apart = np.arange(size) == (size - 1 if branch else size)
    return parents, centroids


def _check(
    vectors: _Floats, sizes: Sequence[int], min_share: float, max_share: float, words: int
) -> None:
    if len(sizes) == 0 or min(sizes) < 1:
        raise ArgumentError(
            f"sizes must name at least one cluster on every level; got {list(sizes)}. Zero clusters hold no word: "
            'use a flat vocabulary (kind = "flat") for a model without clusters.'
        )
    if any(above >= below for below, above in pairwise(sizes)):
        raise ArgumentError(
            f"sizes must decrease strictly from the finest level to the coarsest; got {list(sizes)}."
        )
    most = words + (words < len(vectors) and sizes[0] > 1)
    if sizes[0] > most:
        raise ArgumentError(
            f"sizes asks for {sizes[0]} clusters, but there are only {words} words to cluster"
            f"{f' and one branch of {len(vectors) - words} special ones' if words < len(vectors) else ''}. "
            f"Every cluster needs a word: choose at most {most}."
        )
    if not 0 <= min_share <= 1 <= max_share:
        raise ArgumentError(
            f"min_share must lie in [0, 1] and max_share be at least 1 (in mean cluster sizes); "
            f"got {min_share} and {max_share}."
        )
    if not np.isfinite(vectors).all():
        row = int(np.argmin(np.isfinite(vectors).all(1)))
        raise DataError(
            f"The embeddings hold NaN or infinity, first in row {row}. Make or export them again."
        )


def _cluster(points: _Floats, size: int, seed: int, min_share: float, max_share: float) -> _Ints:
    """The cluster of each point: k-means from k-means++ starts, then balance."""
    import faiss  # only clustering needs it

    kmeans = faiss.Kmeans(
        points.shape[1],
        size,
        niter=_ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # every point is used, none drawn
    )
    kmeans.train(points, init_centroids=_starts(points, size, np.random.default_rng(seed)))
    centroids = np.asarray(kmeans.centroids, dtype=np.float32).reshape(size, -1)
    affinity = np.matmul(points, _unit(centroids).T)
    mean = len(points) / size
    lower = max(1, math.floor(min_share * mean))
    upper = max(math.ceil(max_share * mean), lower)
    return _balance(affinity, affinity.argmax(1), lower, upper)


def _starts(points: _Floats, size: int, draw: np.random.Generator) -> _Floats:
    """k-means++: each start is drawn in proportion to 1 - its cosine to the nearest start before (any, where all are 0)."""
    chosen = [int(draw.integers(len(points)))]
    distance = np.full(len(points), 2.0)
    for _ in range(size - 1):
        distance = np.minimum(distance, np.maximum(1.0 - points @ points[chosen[-1]], 0.0))
        distance[chosen[-1]] = 0.0
        total = np.cumsum(distance)
        place = np.searchsorted(total, draw.random() * total[-1], side="right")
        chosen.append(int(min(place, len(points) - 1)))
    return points[chosen]


def _balance(affinity: _Floats, assignment: _Ints, lower: int, upper: int) -> _Ints:
    """Move the points that lose least until each cluster (column of `affinity` [n,k]) holds lower..upper of them."""
    assignment = assignment.copy()
    counts = np.bincount(assignment, minlength=affinity.shape[1])
    for cluster in np.flatnonzero(counts > upper).tolist():
        while counts[cluster] > upper:
            _give_away(affinity, assignment, counts, cluster, upper)
    for cluster in np.flatnonzero(counts < lower).tolist():
        _take_in(affinity, assignment, counts, cluster, lower)
    return assignment


def _give_away(
    affinity: _Floats, assignment: _Ints, counts: _Ints, cluster: int, upper: int
) -> None:
    """Move points of `cluster` to their best clusters with room until it fits or one of those is full."""
    members = np.flatnonzero(assignment == cluster)
    open_clusters = np.flatnonzero(counts < upper)
    choices = affinity[np.ix_(members, open_clusters)]
    target = open_clusters[choices.argmax(1)]
    loss = affinity[members, cluster] - choices.max(1)
    for place in np.argsort(loss, kind="stable")[: counts[cluster] - upper]:
        if counts[target[place]] == upper:
            return
        assignment[members[place]] = target[place]
        counts[target[place]] += 1
        counts[cluster] -= 1


def _take_in(affinity: _Floats, assignment: _Ints, counts: _Ints, cluster: int, lower: int) -> None:
    """Move outsiders to `cluster` until it has `lower` points, from clusters that can spare one."""
    loss = affinity[np.arange(len(assignment)), assignment] - affinity[:, cluster]
    for point in np.argsort(loss, kind="stable"):
        if counts[cluster] >= lower:
            return
        donor = assignment[point]
        if donor != cluster and counts[donor] > lower:
            assignment[point] = cluster
            counts[cluster] += 1
            counts[donor] -= 1


def _unit(vectors: _Floats) -> _Floats:
    """Rows of length one; zero rows stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.ascontiguousarray(
        vectors / np.maximum(lengths, np.finfo(np.float32).tiny), dtype=np.float32
    )


def _means(vectors: _Floats, node: _Ints, size: int) -> _Floats:
    sums = np.zeros((size, vectors.shape[1]))
    np.add.at(sums, node, vectors)
    return (sums / np.bincount(node, minlength=size)[:, None]).astype(np.float32)
