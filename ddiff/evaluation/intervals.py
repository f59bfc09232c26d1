"""Student's interval, for means of a few figures; imports nothing until a quantile is needed."""

from __future__ import annotations


def student95(freedom: float) -> float:
    """Two-sided 95 % quantile of Student's t with `freedom` > 0 degrees of freedom, which need not be whole."""
    from scipy.special import stdtrit  # half a second, and only intervals need it

    return float(stdtrit(freedom, 0.975))
