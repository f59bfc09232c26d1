"""Total variation between two distributions of which only samples are known.

p^ and q^ are the relative frequencies of n and m independent samples from the distributions p and
q. The triangle inequality bounds the error of the estimate TV(p^, q^):

    |TV(p^, q^) - TV(p, q)| <= D = 1/2 sum_k |(p^_k - p_k) - (q^_k - q_k)|

The interval of `total_variation95` has the 95 % quantile of D as its half width. The quantile is
that of the bootstrap, which draws n and m samples from p^ and q^. The interval is valid also for
p = q, where D is the estimate itself. For equal distributions, it therefore begins at 0 in 95 % of
cases.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddiff.errors import ArgumentError

DRAWS = 4000  # of the bootstrap
SEED = 0


def count_values(first: ArrayLike, second: ArrayLike) -> tuple[NDArray[np.int64], ...]:
    """Count equal values in two samples of integers [n] and [m].

    Returns two arrays of counts, which have one entry for each value that occurs.
    """
    samples = [np.asarray(first, np.int64), np.asarray(second, np.int64)]
    values = np.unique(np.concatenate(samples))
    return tuple((sample[:, None] == values).sum(0) for sample in samples)


def total_variation(first: ArrayLike, second: ArrayLike) -> float:
    """Return 1/2 sum_k |p_k - q_k| of the relative frequencies of two arrays of counts [K].

    Raises ArgumentError if an array has no positive count.
    """
    return float(np.abs(_frequencies(first) - _frequencies(second)).sum()) / 2.0


def total_variation95(
    first: ArrayLike, second: ArrayLike, *, draws: int = DRAWS, seed: int = SEED
) -> tuple[float, float]:
    """Return the 95 % interval of the total variation, from two arrays of counts [K].

    The module docstring explains the interval. `draws` is the number of draws of the bootstrap.
    """
    p, q = _frequencies(first), _frequencies(second)
    rng = np.random.default_rng(seed)
    sizes = (int(np.sum(first)), int(np.sum(second)))
    errors = rng.multinomial(sizes[0], p, draws) / sizes[0] - p
    errors -= rng.multinomial(sizes[1], q, draws) / sizes[1] - q
    half = float(np.quantile(np.abs(errors).sum(1) / 2.0, 0.95, method="higher"))
    estimate = total_variation(first, second)
    return max(0.0, estimate - half), min(1.0, estimate + half)


def _frequencies(counts: ArrayLike) -> NDArray[np.float64]:
    found = np.asarray(counts, np.float64)
    if found.ndim != 1 or not found.sum() > 0.0:
        raise ArgumentError(
            "total_variation: each argument must be an array of counts with a positive sum; got "
            f"{counts!r}. Give at least one sample of each distribution."
        )
    return found / found.sum()
