"""Nested spherical k-means, which builds a tree over tokens with limits on cluster sizes.

Each level clusters the points of the level below (tokens, then nodes) with the k-means of faiss on
unit vectors. Then points are moved until the number of points in every cluster is between
`min_share` and `max_share` times the mean number. The loss of a move is the cosine of the point
with the old centroid minus its cosine with the new centroid:

1. From a cluster above the upper limit, the points with the least loss move to the most similar
   cluster below the upper limit.
2. To a cluster below the lower limit (at least one point), the points with the least loss move from
   clusters above the lower limit.

Both steps run in a fixed order, so that the same input and seed give the same tree. The special
tokens form one separate node, the last node, at every level that has at least two nodes.

The start centroids are drawn in this module by k-means++. The two initializations of faiss (random
points and its own k-means++) give other clusters, and would change published results of
hierarchies.
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
    """Build a tree over the rows of `embeddings` [V, d] by k-means.

    V is the number of tokens and d the width of the embeddings. Level 0 is the level directly above
    the tokens. Raises ArgumentError for impossible sizes or limits, DataError for NaN or infinity.

    Args:
        sizes: number of nodes of each level, strictly decreasing.
        seed: seed of the start centroids and of k-means.
        min_share, max_share: limits on the number of points in a cluster, as fractions of the mean
            number.
        special_ids: tokens that form a separate node instead of being clustered.

    Returns two lists with one array per level. For level l, the first holds the parent in level l
    of each node of level l - 1 (of each token for l = 0). The second holds the centroids [sizes[l],
    d], the mean embeddings of the tokens below each node.
    """
    vectors = np.ascontiguousarray(embeddings, dtype=np.float32)
    token_ids = np.arange(len(vectors))
    is_special = np.isin(token_ids, np.asarray(special_ids, dtype=np.int64))
    num_regular = int((~is_special).sum())
    _check(vectors, sizes, min_share, max_share, num_regular)
    parents = []
    centroids = []
    # The mean is subtracted, because embeddings share a large common component.
    mean = vectors[~is_special].mean(0)
    points = _normalize(vectors - mean)
    node_of_token: _Ints = token_ids
    for size in sizes:
        # A level with one node cannot have a separate node for special tokens.
        has_special_node = bool(is_special.any()) and size > 1
        level = np.full(len(points), size - 1, dtype=np.int64)
        is_member = ~is_special if has_special_node else np.ones(len(points), dtype=bool)
        level[is_member] = _cluster(
            points[is_member], size - has_special_node, seed, min_share, max_share
        )
        parents.append(level)
        node_of_token = level[node_of_token]
        centroids.append(_means(vectors, node_of_token, size))
        points = _normalize(_means(points, level, size))
        is_special = np.arange(size) == (size - 1 if has_special_node else size)
    return parents, centroids


def _check(
    vectors: _Floats, sizes: Sequence[int], min_share: float, max_share: float, num_regular: int
) -> None:
    """Raise an error if the arguments of `nested_kmeans` are invalid.

    `num_regular` is the number of tokens that are not special.
    """
    if len(sizes) == 0 or min(sizes) < 1:
        raise ArgumentError(
            "sizes must have at least one level, and at least one cluster on every level; got "
            f'{list(sizes)}. For a model without clusters use a flat vocabulary (kind = "flat").'
        )
    if any(above >= below for below, above in pairwise(sizes)):
        raise ArgumentError(
            "sizes must decrease strictly from the finest level to the coarsest; got "
            f"{list(sizes)}."
        )
    num_special = len(vectors) - num_regular
    most = num_regular + (num_special > 0 and sizes[0] > 1)
    if sizes[0] > most:
        branch = f" and one branch of {num_special} special tokens" if num_special else ""
        raise ArgumentError(
            f"sizes has {sizes[0]} clusters on the finest level, but there are only {num_regular} "
            f"tokens to cluster{branch}. Every cluster needs a token: choose at most {most}."
        )
    if not 0 <= min_share <= 1 <= max_share:
        raise ArgumentError(
            "min_share must lie in [0, 1] and max_share must be at least 1 (in units of the mean "
            f"cluster size); got {min_share} and {max_share}."
        )
    if not np.isfinite(vectors).all():
        row = int(np.argmin(np.isfinite(vectors).all(1)))
        raise DataError(
            f"The embeddings hold NaN or infinity, first in row {row}. Compute or export the "
            "embeddings again."
        )


def _cluster(points: _Floats, size: int, seed: int, min_share: float, max_share: float) -> _Ints:
    """Return the cluster of each of the `points` [n,d], by k-means followed by balancing.

    The start centroids are drawn by k-means++. `size` is the number of clusters. `min_share` and
    `max_share` limit the number of points in a cluster, as fractions of the mean number.
    """
    import faiss  # slow to import, and only clustering needs it

    # Without minimum, faiss would warn of every small cluster.
    kmeans = faiss.Kmeans(
        points.shape[1],
        size,
        niter=_ITERATIONS,
        seed=seed,
        spherical=True,
        min_points_per_centroid=1,
        max_points_per_centroid=len(points),  # faiss would otherwise draw a sample of the points
    )
    starts = _draw_starts(points, size, np.random.default_rng(seed))
    kmeans.train(points, init_centroids=starts)
    centroids = np.asarray(kmeans.centroids, dtype=np.float32).reshape(size, -1)
    affinity = np.matmul(points, _normalize(centroids).T)
    mean = len(points) / size
    lower = max(1, math.floor(min_share * mean))
    upper = max(math.ceil(max_share * mean), lower)
    return _balance(affinity, affinity.argmax(1), lower, upper)


def _draw_starts(points: _Floats, size: int, rng: np.random.Generator) -> _Floats:
    """Draw `size` start centroids from the unit vectors `points` by k-means++.

    The first start is a uniformly drawn point. Each further start is a point, drawn with
    probability proportional to the distance 1 - cos to its nearest earlier start. If all distances
    are 0 (fewer different points than starts), the last point is chosen.
    """
    chosen = [int(rng.integers(len(points)))]
    distance = np.full(len(points), 2.0)
    for _ in range(size - 1):
        to_last = np.maximum(1.0 - points @ points[chosen[-1]], 0.0)
        distance = np.minimum(distance, to_last)
        distance[chosen[-1]] = 0.0  # rounding may give the point a distance above 0 to itself
        total = np.cumsum(distance)
        threshold = rng.random() * total[-1]
        place = np.searchsorted(total, threshold, side="right")
        last = len(points) - 1
        chosen.append(int(min(place, last)))
    return points[chosen]


def _balance(affinity: _Floats, assignment: _Ints, lower: int, upper: int) -> _Ints:
    """Move points between clusters until each cluster has `lower` to `upper` points.

    `affinity` [n,k] contains the cosines of n points with k centroids. `assignment` [n] is the
    cluster of each point. The points with the smallest loss of cosine are moved. Returns the new
    assignment.
    """
    assignment = assignment.copy()
    counts = np.bincount(assignment, minlength=affinity.shape[1])
    too_large = np.flatnonzero(counts > upper)
    for cluster in too_large.tolist():
        while counts[cluster] > upper:
            _give_away(affinity, assignment, counts, cluster, upper)
    # Small clusters are filled second, because they may have received points of large clusters.
    too_small = np.flatnonzero(counts < lower)
    for cluster in too_small.tolist():
        _take_in(affinity, assignment, counts, cluster, lower)
    return assignment


def _give_away(
    affinity: _Floats, assignment: _Ints, counts: _Ints, cluster: int, upper: int
) -> None:
    """Move the excess points of `cluster` to the most similar clusters below the limit `upper`.

    `affinity` [points, clusters] is the similarity of each point to each cluster.
    Changes `assignment` (the cluster of each point) and `counts` (the size of each cluster) in
    place. Returns early if a target cluster becomes full. The caller then calls the function again,
    which no longer uses the full cluster as a target.
    """
    members = np.flatnonzero(assignment == cluster)
    open_clusters = np.flatnonzero(counts < upper)
    choices = affinity[np.ix_(members, open_clusters)]
    target = open_clusters[choices.argmax(1)]
    loss = affinity[members, cluster] - choices.max(1)
    # All sorts are stable, so that points with equal losses are always moved in the same order.
    order = np.argsort(loss, kind="stable")
    excess = counts[cluster] - upper
    for place in order[:excess]:
        if counts[target[place]] == upper:
            return
        assignment[members[place]] = target[place]
        counts[target[place]] += 1
        counts[cluster] -= 1


def _take_in(affinity: _Floats, assignment: _Ints, counts: _Ints, cluster: int, lower: int) -> None:
    """Move points from clusters above the limit `lower` until `cluster` has `lower` points.

    `affinity` [points, clusters] is the similarity of each point to each cluster.
    Changes `assignment` (the cluster of each point) and `counts` (the size of each cluster) in
    place.
    """
    points = np.arange(len(assignment))
    to_own_cluster = affinity[points, assignment]
    loss = to_own_cluster - affinity[:, cluster]
    order = np.argsort(loss, kind="stable")
    for point in order:
        if counts[cluster] >= lower:
            return
        donor = assignment[point]
        if donor != cluster and counts[donor] > lower:
            assignment[point] = cluster
            counts[cluster] += 1
            counts[donor] -= 1


def _normalize(vectors: _Floats) -> _Floats:
    """Scale each row of `vectors` to unit length. Zero rows stay zero."""
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    lengths = np.maximum(lengths, np.finfo(np.float32).tiny)
    return np.ascontiguousarray(vectors / lengths, dtype=np.float32)


def _means(vectors: _Floats, node: _Ints, size: int) -> _Floats:
    """Return the mean [size, d] of the `vectors` [n, d] of each node, computed in float64.

    `node` [n] is the node of each vector, and `size` the number of nodes.
    """
    sums = np.zeros((size, vectors.shape[1]))
    np.add.at(sums, node, vectors)
    counts = np.bincount(node, minlength=size)
    means = sums / counts[:, None]
    return means.astype(np.float32)
