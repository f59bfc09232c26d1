"""Quantiles of Student's t distribution, for confidence intervals of a mean."""

from __future__ import annotations


def student95(freedom: float) -> float:
    """Return the two-sided 95 % quantile of Student's t with `freedom` > 0 degrees of freedom.

    The degrees of freedom need not be a whole number.
    """
    from scipy.special import stdtrit  # takes half a second, which only intervals should cost

    return float(stdtrit(freedom, 0.975))
