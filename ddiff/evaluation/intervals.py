"""Confidence intervals of means and shares, and quantiles of Student's t distribution."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:  # `ddiff compare` does not import numpy
    import numpy as np
    from numpy.typing import NDArray

NORMAL95 = 1.959963984540054  # two-sided 95 % quantile of the standard normal distribution


def student95(freedom: float) -> float:
    """Return the two-sided 95 % quantile of Student's t with `freedom` > 0 degrees of freedom.

    The degrees of freedom need not be a whole number.
    """
    from scipy.special import stdtrit  # takes half a second, which only intervals should cost

    return float(stdtrit(freedom, 0.975))


def wilson95(hits: float, count: float) -> tuple[float, float]:
    """Return the 95 % interval of Wilson (1927) for a probability, from `hits` of `count` trials.

    It lies in [0,1] and has a positive width also for 0 or `count` hits. count >= 1. For trials
    that depend on each other, `count` is the effective number of trials, not a whole number.
    """
    share = hits / count
    squared = NORMAL95**2
    scale = 1.0 + squared / count
    centre = (share + squared / (2.0 * count)) / scale
    variance = share * (1.0 - share) / count + squared / (4.0 * count**2)
    half = NORMAL95 * math.sqrt(variance) / scale
    # Rounding may leave [0,1] by one unit in the last place.
    return max(0.0, centre - half), min(1.0, centre + half)


def grouped_share95(means: NDArray[np.float64], trials: int) -> tuple[float, float]:
    """Return the 95 % interval of a probability from the shares of G independent groups of trials.

    The interval is that of Wilson with the effective number of trials

        n = S (1 - S) / Var(S) * (z / t)^2

    of Korn and Graubard (1998). S is the mean of the shares and Var(S) the square of its standard
    error. z and t are the quantiles of the normal and of Student's t distribution with G - 1
    degrees of freedom.

    Args:
        means: share [G] of the hits of every group, G >= 1.
        trials: number of all trials, the largest effective number.
    """
    groups = len(means)
    share = float(means.mean())
    variance = float(means.var(ddof=1)) / groups if groups > 1 else 0.0
    if variance == 0.0:
        # Equal shares do not show how much the trials of a group depend on each other.
        return wilson95(share * groups, groups)
    count = share * (1.0 - share) / variance
    count *= (NORMAL95 / student95(groups - 1)) ** 2
    count = min(max(count, 1.0), trials)
    return wilson95(share * count, count)


def mean95(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of independent numbers [n]; None for one number."""
    if len(values) < 2:
        return None
    standard = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = student95(len(values) - 1) * standard
    mean = float(values.mean())
    return mean - half, mean + half
