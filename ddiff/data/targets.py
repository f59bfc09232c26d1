"""Target vectors of edits: class centroid, shifted vector, nearest real vector, points of a path.

A vector is an embedding [d] of a text, and n vectors are an array [n,d]. All results are float64.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddiff.errors import ArgumentError

Vectors = NDArray[np.float64]

# Angle in radians below which two directions count as equal, or as opposite near pi. The formula of
# `interpolate` divides by the sine of the angle.
SMALLEST_ANGLE = 1e-7


def compute_centroid(vectors: ArrayLike, labels: Sequence[Any], label: Any) -> Vectors:
    """Return the mean [d] of the vectors [n,d] of one class.

    `labels` are the classes of the n vectors. Raises ArgumentError if no vector has the class
    `label`.
    """
    rows = _as_rows("compute_centroid", vectors)
    if len(labels) != len(rows):
        raise ArgumentError(
            "compute_centroid: labels must have one entry per vector; got "
            f"{len(labels)} labels and {len(rows)} vectors."
        )
    chosen = [place for place, other in enumerate(labels) if other == label]
    if not chosen:
        raise ArgumentError(f"compute_centroid: no vector has the class {label!r}.")
    return rows[chosen].mean(0)


def shift_vector(
    vector: ArrayLike, source_mean: ArrayLike, target_mean: ArrayLike, strength: float = 1.0
) -> Vectors:
    """Return z + a (mu_target - mu_source) for vectors z [d] or [n,d].

    `source_mean` mu_source and `target_mean` mu_target are the centroids [d] of two classes, and
    `strength` is a. With a = 0 the vectors do not change, and with a = 1 the source centroid moves
    to the target centroid.
    """
    difference = np.asarray(target_mean, np.float64) - np.asarray(source_mean, np.float64)
    return np.asarray(vector, np.float64) + strength * difference


def find_nearest(targets: ArrayLike, vectors: ArrayLike) -> NDArray[np.int64]:
    """Return the index [m] of the vector with the largest cosine similarity to each target [m,d].

    `vectors` [n,d] are embeddings of real texts. The first of several nearest vectors is returned.
    """
    wanted = _directions("find_nearest", targets)
    known = _directions("find_nearest", vectors)
    return (wanted @ known.T).argmax(-1)


def interpolate(first: ArrayLike, last: ArrayLike, shares: ArrayLike) -> Vectors:
    """Return the points [k,d] of a path between two vectors [d], at shares [k] in [0,1].

    The direction moves on the great circle between the two directions at constant angular speed
    (slerp), and the norm changes linearly:

        direction(a) = (sin((1 - a) w) u_0 + sin(a w) u_1) / sin(w),

    where u_0 and u_1 are the directions and w is their angle. Shares 0 and 1 return the vectors
    themselves. Raises ArgumentError for a vector of norm 0 and for opposite directions, between
    which the great circle is not unique.
    """
    ends = np.stack([np.asarray(first, np.float64), np.asarray(last, np.float64)])
    directions = _directions("interpolate", ends)
    norms = np.linalg.norm(ends, axis=-1)
    a = np.asarray(shares, np.float64).reshape(-1, 1)
    angle = _angle(directions[0], directions[1])
    if angle > np.pi - SMALLEST_ANGLE:
        raise ArgumentError(
            "interpolate: the two vectors have opposite directions, between which no shortest path "
            "is unique. Interpolate through a third vector."
        )
    if angle < SMALLEST_ANGLE:
        between = (1.0 - a) * directions[0] + a * directions[1]
    else:
        parts = np.sin((1.0 - a) * angle) * directions[0] + np.sin(a * angle) * directions[1]
        between = parts / np.sin(angle)
    points = ((1.0 - a) * norms[0] + a * norms[1]) * between
    # The ends are exact: the formula returns them only up to rounding.
    return np.where(a == 0.0, ends[0], np.where(a == 1.0, ends[1], points))


def _angle(first: Vectors, last: Vectors) -> float:
    """Return the angle of two unit vectors, accurate also for small and nearly flat angles."""
    return float(2.0 * np.arctan2(np.linalg.norm(first - last), np.linalg.norm(first + last)))


def _directions(name: str, vectors: ArrayLike) -> Vectors:
    """Return vectors [n,d] divided by their norms. Raises ArgumentError for a norm of 0."""
    rows = _as_rows(name, vectors)
    norms = np.linalg.norm(rows, axis=-1, keepdims=True)
    if not (norms > 0.0).all():
        raise ArgumentError(f"{name}: every vector must have a direction; got a vector of norm 0.")
    return rows / norms


def _as_rows(name: str, vectors: ArrayLike) -> Vectors:
    rows = np.asarray(vectors, np.float64)
    if rows.ndim != 2 or not np.isfinite(rows).all():
        raise ArgumentError(
            f"{name}: vectors must be an array [n,d] of finite numbers; got shape {rows.shape}."
        )
    return rows
