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


def wilson95(hits: int, count: int) -> tuple[float, float]:
    """Return the 95 % interval of Wilson (1927) for a probability, from `hits` of `count` trials.

    It lies in [0,1] and has a positive width also for 0 or `count` hits. count >= 1.
    """
    share = hits / count
    squared = NORMAL95**2
    scale = 1.0 + squared / count
    centre = (share + squared / (2.0 * count)) / scale
    variance = share * (1.0 - share) / count + squared / (4.0 * count**2)
    half = NORMAL95 * math.sqrt(variance) / scale
    # Rounding may leave [0,1] by one unit in the last place.
    return max(0.0, centre - half), min(1.0, centre + half)


def mean95(values: NDArray[np.float64]) -> tuple[float, float] | None:
    """Return the 95 % interval of the mean of independent numbers [n]; None for one number."""
    if len(values) < 2:
        return None
    standard = float(values.std(ddof=1)) / math.sqrt(len(values))
    half = student95(len(values) - 1) * standard
    mean = float(values.mean())
    return mean - half, mean + half
