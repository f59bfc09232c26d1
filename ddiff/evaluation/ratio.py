"""Mean nats per token over documents, with total and Monte-Carlo standard errors."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ddiff.evaluation.intervals import student95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Error:
    """Standard error, with the degrees of freedom of its estimate."""

    standard: float
    freedom: float

    @property
    def half_width(self) -> float:
        """Return half the width of the 95 % interval."""
        return student95(self.freedom) * self.standard


@dataclass(frozen=True)
class RatioEstimate:
    """Estimate of the nats per token of a text from several draws of times and noise.

    `total`: standard error of the estimate for all documents of the same source; None for one
    document. `monte_carlo`: standard error of the estimate for exactly these documents, which comes
    from the random diffusion times and noise; None for one draw. `total` includes `monte_carlo`.
    """

    mean: float
    total: Error | None
    monte_carlo: Error | None

    @classmethod
    def of(cls, nats: Floats, tokens: Floats) -> Self:
        """Estimate the nats per token from the nats and numbers of tokens of D documents.

        `nats`: an array [D,K] with one column for each of K independent draws. `tokens`: an array
        [D]. Documents without tokens are ignored.
        """
        nats = nats[tokens > 0]
        tokens = tokens[tokens > 0]
        mean_nats = nats.mean(-1)
        mean = float(mean_nats.sum() / tokens.sum())
        residual = mean_nats - mean * tokens
        return cls(mean, _error_over_documents(residual, tokens), _error_over_draws(nats, tokens))

    @property
    def documents(self) -> float | None:
        """Standard error from the differences between documents, without the Monte-Carlo error.

        None for one document or one draw.
        """
        if self.total is None or self.monte_carlo is None:
            return None
        variance = self.total.standard**2 - self.monte_carlo.standard**2
        return math.sqrt(max(0.0, variance))  # both are estimates: the difference may be negative


def _error_over_documents(residual: Floats, tokens: Floats) -> Error | None:
    """Estimate the standard error of the mean nats per token from differences between documents.

    `residual` contains residual_d = nats_d - mean * tokens_d of each document d. Let h_d = tokens_d
    / (sum of all tokens). If Var(nats_d) is proportional to tokens_d, the expectation of
    residual_d^2 is smaller than Var(nats_d) by the factor 1 - h_d. Division by 1 - h_d makes the
    variance unbiased for documents of any lengths. Satterthwaite's formula under the same
    assumption gives the degrees of freedom: D - 1 for D documents of equal length, and fewer for
    unequal lengths. Returns None for fewer than two documents.
    """
    if len(tokens) < 2:
        return None
    share = tokens / tokens.sum()
    variance = float((residual**2 / (1.0 - share)).sum())
    mixed = share**2 / (1.0 - share)
    squared = (share**2).sum() + mixed.sum() ** 2 - (mixed**2).sum()
    standard = math.sqrt(variance) / float(tokens.sum())
    return Error(standard, freedom=1.0 / float(squared))


def _error_over_draws(nats: Floats, tokens: Floats) -> Error | None:
    """Estimate the standard error of the mean from the variance between draws of each document.

    Returns None for fewer than two draws.
    """
    draws = nats.shape[1]
    if draws < 2:
        return None
    # documents are independent of each other, so the variances of their sums add up
    variance = float(nats.var(-1, ddof=1).sum()) / draws
    share = tokens / tokens.sum()
    standard = math.sqrt(variance) / float(tokens.sum())
    return Error(standard, freedom=(draws - 1) / float((share**2).sum()))
