"""MAUVE of two sets of feature vectors (arXiv 2102.01454).

The vectors of both sets are clustered together. p and q are the shares of the clusters in the two
sets. With r = w p + (1 - w) q, the divergence curve has the points

    (exp(-c KL(q | r)), exp(-c KL(p | r))),    0 < w < 1,    c = 5,

and MAUVE is the area under the curve: 1 for equal shares, near 0 for sets without a common cluster.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ddiff.errors import ArgumentError

SCALE = 5.0  # c, as published
WEIGHTS = 25  # number of mixture weights w, as published
EXPLAINED = 0.9  # share of the variance that the principal components keep, as published
FEWEST = 20  # vectors of a set: one cluster per 10 vectors, and at least two clusters
_ITERATIONS = 500
_REPEATS = 5  # runs of k-means, of which the best is kept
SEEDS = 5  # of k-means, over which `measure_mauve` averages
Floats = NDArray[np.float64]


def mauve(
    features: NDArray[np.floating],
    reference: NDArray[np.floating],
    *,
    clusters: int | None = None,
    seed: int = 0,
) -> float:
    """Return MAUVE of two sets of vectors, in (0, 1].

    The vectors are scaled to length 1, projected on the principal components that explain 90 % of
    the variance, and clustered by k-means.

    Args:
        features: vectors [n,d] of the samples.
        reference: vectors [m,d] of real texts.
        clusters: number of clusters; by default min(n, m) / 10. MAUVE depends on it and on n and m,
            so only values with equal numbers can be compared.
        seed: seed of k-means.

    Raises ArgumentError for fewer than 20 vectors, for other shapes, and for NaN or infinity.
    """
    points = _prepare(features, reference)
    size = _choose_size(features, reference, clusters)
    return _compare_shares(points, len(features), size, seed)


@dataclass(frozen=True)
class MauveEstimate:
    """MAUVE over several seeds of k-means.

    Attributes:
        value: mean over the seeds.
        lowest, highest: smallest and largest value. Their distance is the error of the clustering;
            it does not contain the error of drawing other samples.
        seeds: number of seeds.
    """

    value: float
    lowest: float
    highest: float
    seeds: int


def measure_mauve(
    features: NDArray[np.floating], reference: NDArray[np.floating], *, seed: int = 0
) -> MauveEstimate:
    """Return the mean of MAUVE over the seeds `seed`, `seed` + 1, ... of k-means, and its range.

    Arguments and errors are those of `mauve`.
    """
    points = _prepare(features, reference)
    size = _choose_size(features, reference, None)
    values = []
    for number in range(SEEDS):
        # faiss has seeds of 31 bits
        values.append(_compare_shares(points, len(features), size, (seed + number) % 2**31))
    return MauveEstimate(float(np.mean(values)), min(values), max(values), SEEDS)


def _choose_size(
    features: NDArray[np.floating], reference: NDArray[np.floating], clusters: int | None
) -> int:
    """Return the number of clusters. Raises ArgumentError if it is out of range."""
    count = min(len(features), len(reference))
    size = clusters if clusters is not None else max(2, round(count / 10))
    if not 2 <= size <= count:
        raise ArgumentError(
            f"mauve: clusters must be from 2 to {count}, the smaller number of vectors; got {size}."
        )
    return size


def _prepare(features: NDArray[np.floating], reference: NDArray[np.floating]) -> Floats:
    """Return the coordinates of all vectors that are clustered, first those of the samples."""
    _check(features, reference)
    vectors = np.concatenate([features, reference]).astype(np.float64)
    norms = np.linalg.norm(vectors, axis=1, keepdims=True)
    # a vector of zeros has no direction, and stays
    return _project(vectors / np.where(norms == 0.0, 1.0, norms))


def _compare_shares(points: Floats, count: int, size: int, seed: int) -> float:
    """Return MAUVE of the first `count` points and the others, with `size` clusters."""
    labels = _cluster(points, size, seed)
    p = np.bincount(labels[:count], minlength=size) / count
    q = np.bincount(labels[count:], minlength=size) / (len(points) - count)
    return divergence_area(p, q)


def divergence_area(p: Floats, q: Floats) -> float:
    """Return the area under the divergence curve of two distributions [k].

    The curve ends at (0, 1) and (1, 0). The trapezoidal rule joins its points.
    """
    weights = np.linspace(1e-6, 1.0 - 1e-6, WEIGHTS)[:, None]
    mixed = weights * p + (1.0 - weights) * q
    x = np.concatenate([[0.0], np.exp(-SCALE * _divergence(q, mixed)), [1.0]])
    y = np.concatenate([[1.0], np.exp(-SCALE * _divergence(p, mixed)), [0.0]])
    # x falls or rises with w; the order of equal x is that of falling y
    order = np.lexsort((-y, x))
    return float(np.trapezoid(y[order], x[order]))


def _divergence(p: Floats, mixed: Floats) -> Floats:
    """Return KL(p | r) for each row r of `mixed` [m,k]. Every r is positive where p is."""
    support = p > 0.0
    kept = p[support]
    return (kept * np.log(kept / mixed[:, support])).sum(-1)


def _project(vectors: Floats) -> Floats:
    """Return the coordinates of centred vectors on the first principal components."""
    centred = vectors - vectors.mean(0)
    _, scales, directions = np.linalg.svd(centred, full_matrices=False)
    variance = scales**2
    if variance.sum() == 0.0:
        return centred[:, :1]
    explained = variance.cumsum() / variance.sum()
    kept = int(np.searchsorted(explained, EXPLAINED)) + 1
    return centred @ directions[:kept].T


def _cluster(points: Floats, size: int, seed: int) -> NDArray[np.int64]:
    """Return the cluster of each point, from 0 to size - 1."""
    import faiss  # slow to import, and only MAUVE needs it here

    data = np.ascontiguousarray(points, np.float32)
    kmeans = faiss.Kmeans(
        data.shape[1],
        size,
        niter=_ITERATIONS,
        nredo=_REPEATS,
        seed=seed,
        # without these limits, faiss would warn of small clusters or draw a sample of the points
        min_points_per_centroid=1,
        max_points_per_centroid=len(data),
    )
    kmeans.train(data)
    _, labels = kmeans.index.search(data, 1)
    return np.asarray(labels, np.int64).reshape(-1)


def _check(features: NDArray[np.floating], reference: NDArray[np.floating]) -> None:
    for name, found in (("features", features), ("reference", reference)):
        if found.ndim != 2 or found.shape[1] != features.shape[-1] or len(found) < FEWEST:
            raise ArgumentError(
                f"mauve: features and reference must be vectors of one width, at least {FEWEST} "
                f"each; got the shapes {features.shape} and {reference.shape}. Draw more samples."
            )
        if not np.isfinite(found).all():
            raise ArgumentError(f"mauve: {name} must be finite numbers; got NaN or infinity.")
