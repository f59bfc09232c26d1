"""The mean nats per token over documents, its standard error, and the Monte-Carlo part of that error."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ddiff.evaluation.intervals import student95


@dataclass(frozen=True)
class Error:
    """A standard error and the degrees of freedom of its estimate."""

    standard: float
    freedom: float

    @property
    def half_width(self) -> float:
        """Of the 95 % interval."""
        return student95(self.freedom) * self.standard


@dataclass(frozen=True)
class RatioEstimate:
    """Nats per token of documents that were each read several times.

    `total` is the error of the mean over documents like these, `monte_carlo` that of its estimate for these very
    documents, from the random times and noise of each reading. `total` contains `monte_carlo`. `total` is None for one
    document, `monte_carlo` for one reading.
    """

    mean: float
    total: Error | None
    monte_carlo: Error | None

    @classmethod
    def of(cls, nats: NDArray[np.float64], tokens: NDArray[np.float64]) -> Self:
        """`nats` [D,K] of D documents in K independent readings, `tokens` [D] of each.

        Documents without tokens are left out.
        """
        nats = nats[tokens > 0]
        tokens = tokens[tokens > 0]
        read = nats.mean(-1)
        mean = float(read.sum() / tokens.sum())
        return cls(
            mean, _over_documents(read - mean * tokens, tokens), _over_readings(nats, tokens)
        )

    @property
    def documents(self) -> float | None:
        """The standard error that the differences between documents alone would leave; None where it is not known."""
        if self.total is None or self.monte_carlo is None:
            return None
        return math.sqrt(max(0.0, self.total.standard**2 - self.monte_carlo.standard**2))


def _over_documents(residual: NDArray[np.float64], tokens: NDArray[np.float64]) -> Error | None:
    """From the residuals nats - mean * tokens of each document.

    With Var(nats_d) proportional to tokens_d, residual_d^2 is too small by the factor 1 - h_d, h_d being the document's
    share of the tokens; divided by it, the variance is unbiased, also where documents are unequal. Satterthwaite's degrees
    of freedom under the same assumption are D - 1 for equal documents and fewer otherwise.
    """
    if len(tokens) < 2:
        return None
    share = tokens / tokens.sum()
    variance = float((residual**2 / (1.0 - share)).sum())
    mixed = share**2 / (1.0 - share)
    freedom = 1.0 / float((share**2).sum() + mixed.sum() ** 2 - (mixed**2).sum())
    return Error(math.sqrt(variance) / float(tokens.sum()), freedom)


def _over_readings(nats: NDArray[np.float64], tokens: NDArray[np.float64]) -> Error | None:
    """From the differences between the readings of each document."""
    readings = nats.shape[1]
    if readings < 2:
        return None
    variance = float(nats.var(-1, ddof=1).sum()) / readings
    share = tokens / tokens.sum()
    freedom = (readings - 1) / float((share**2).sum())
    return Error(math.sqrt(variance) / float(tokens.sum()), freedom)
