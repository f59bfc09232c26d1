"""Mean nats per token over documents, with its standard error and the Monte-Carlo part of it."""

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
    """A standard error and the degrees of freedom of its estimate."""

    standard: float
    freedom: float

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % interval."""
        return student95(self.freedom) * self.standard


@dataclass(frozen=True)
class RatioEstimate:
    """Nats per token of documents that were each scored in several draws.

    `total` is the error of the mean over documents like these, None for one document.
    `monte_carlo` is the error of the mean of these very documents, from the random times and noise
    of each draw, None for one draw. `total` contains `monte_carlo`.
    """

    mean: float
    total: Error | None
    monte_carlo: Error | None

    @classmethod
    def of(cls, nats: Floats, tokens: Floats) -> Self:
        """Estimate from `nats` [D,K], D documents in K independent draws, and `tokens` [D].

        Documents without tokens are left out.
        """
        nats = nats[tokens > 0]
        tokens = tokens[tokens > 0]
        mean_nats = nats.mean(-1)
        mean = float(mean_nats.sum() / tokens.sum())
        residual = mean_nats - mean * tokens
        return cls(mean, _error_over_documents(residual, tokens), _error_over_draws(nats, tokens))

    @property
    def documents(self) -> float | None:
        """Standard error from the differences between documents only; None if it is not known."""
        if self.total is None or self.monte_carlo is None:
            return None
        variance = self.total.standard**2 - self.monte_carlo.standard**2
        return math.sqrt(max(0.0, variance))  # both are estimates: the difference may be negative


def _error_over_documents(residual: Floats, tokens: Floats) -> Error | None:
    """Error of the mean from residual_d = nats_d - mean * tokens_d of each document d.

    Let h_d = tokens_d / sum of tokens. If Var(nats_d) is proportional to tokens_d, residual_d^2 is
    too small by the factor 1 - h_d; divided by it, the variance is unbiased even for documents of
    different lengths. The degrees of freedom are Satterthwaite's under the same assumption: D - 1
    for documents of equal length, fewer otherwise.
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
    """Error of the mean from the differences between the draws of each document."""
    draws = nats.shape[1]
    if draws < 2:
        return None
    # documents are independent of each other, so the variances of their sums add up
    variance = float(nats.var(-1, ddof=1).sum()) / draws
    share = tokens / tokens.sum()
    standard = math.sqrt(variance) / float(tokens.sum())
    return Error(standard, freedom=(draws - 1) / float((share**2).sum()))
