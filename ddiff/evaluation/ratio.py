"""Mean nats per token over documents, with total and Monte-Carlo standard errors.

The mean is a ratio: the sum of nats over documents divided by the sum of tokens.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Self

import numpy as np
from numpy.typing import NDArray

from ddiff.evaluation.intervals import skewed95, skewness_of_sum, student95

Floats = NDArray[np.float64]


@dataclass(frozen=True)
class Error:
    """Standard error of a mean.

    Attributes:
        standard: the standard error.
        freedom: its degrees of freedom in Student's t distribution.
        skewness: skewness of the distribution of the mean.
    """

    standard: float
    freedom: float
    skewness: float = 0.0

    @property
    def half_width(self) -> float:
        """Half the width of the 95 % interval of Student, without the correction for skewness."""
        return student95(self.freedom) * self.standard

    def around(self, mean: float) -> tuple[float, float]:
        """Return the 95 % interval around `mean`, corrected for skewness."""
        return skewed95(mean, self.standard, self.freedom, self.skewness)


@dataclass(frozen=True)
class RatioEstimate:
    """Estimate of the nats per token of a text from several draws of times and noise.

    Attributes:
        mean: estimated nats per token.
        total: standard error of `mean` as an estimate for all documents of the same source. It
            includes `monte_carlo`. None for one document.
        monte_carlo: standard error of `mean` as an estimate for exactly these documents, due to the
            random diffusion times and noise. None for one draw.
    """

    mean: float
    total: Error | None
    monte_carlo: Error | None

    @classmethod
    def of(cls, nats: Floats, tokens: Floats) -> Self:
        """Estimate the nats per token of D documents from K independent draws.

        Documents without tokens are ignored.

        Args:
            nats: array [D,K] with the nats of each document in each draw.
            tokens: array [D] with the number of tokens of each document.
        """
        nats = nats[tokens > 0]
        tokens = tokens[tokens > 0]
        mean_nats = nats.mean(-1)
        mean = float(mean_nats.sum() / tokens.sum())
        residual = mean_nats - mean * tokens
        return cls(mean, _error_over_documents(residual, tokens), _error_over_draws(nats, tokens))

    @property
    def documents(self) -> float | None:
        """Part of the standard error `total` that is due to the differences between documents.

        The value is sqrt(total^2 - monte_carlo^2), or 0 if `total` is below `monte_carlo`, the
        standard error due to random times and noise. It is None for one document or one draw.
        """
        if self.total is None or self.monte_carlo is None:
            return None
        variance = self.total.standard**2 - self.monte_carlo.standard**2
        return math.sqrt(max(0.0, variance))  # both are estimates: the difference may be negative


def error_of_partners(differences: Floats, partners: NDArray[np.int64]) -> Error | None:
    """Estimate the standard error of a mean of differences in which every sample occurs twice.

    The difference i = 0..n-1 is computed from the samples i and `partners[i]`, as the nats of a
    sample with the given values of another sample minus the nats with its own. Then differences i
    and `partners[i]` share a sample, and the variance of the mean is estimated by

        sum_i e_i (e_i + 2 e_partners[i]) / (n (n - 3)),

    where e_i are the deviations from the mean. The estimate is unbiased if following the partners
    leads through all samples. It has a third of the degrees of freedom of the variance of
    independent differences, n - 1. If the latter variance is larger, it is used instead: a negative
    covariance is not relied on. The third cumulant of the mean, with e, e', e'' the deviations of
    samples that follow each other, is estimated by

        mean(e^3 + 3 e^2 e' + 3 e e'^2 + 6 e e' e'') / n^2.

    Returns None for fewer than two differences.

    Args:
        differences: differences [n], means over the draws.
        partners: number [n] of another sample for each sample, a permutation.
    """
    count = len(differences)
    if count < 2:
        return None
    rest = differences - differences.mean()
    independent = float((rest**2).sum()) / (count * (count - 1))
    paired = 0.0
    if count > 3:
        paired = float((rest * (rest + 2.0 * rest[partners])).sum()) / (count * (count - 3))
    after = rest[partners]
    second = after[partners]
    cumulant = float(
        (rest**3 + 3.0 * (rest**2 * after + rest * after**2) + 6.0 * rest * after * second).mean()
    )
    standard = math.sqrt(max(paired, independent))
    skewness = 0.0
    if count > 3 and standard > 0.0:  # three samples that follow each other must be different
        skewness = cumulant / count**2 / standard**3
    freedom = max(1.0, (count - 1) / 3.0) if paired > independent else count - 1.0
    return Error(standard, freedom, skewness)


def _error_over_documents(residual: Floats, tokens: Floats) -> Error | None:
    """Estimate the standard error of the mean nats per token from differences between documents.

    Let h_d = tokens_d / sum_d tokens_d be the fraction of tokens in document d. `residual` contains
    residual_d = nats_d - mean * tokens_d. The variance of the mean is estimated as

        sum_d residual_d^2 / (1 - h_d) / (sum_d tokens_d)^2.

    If Var(nats_d) is proportional to tokens_d, the expectation of residual_d^2 is (1 - h_d)
    Var(nats_d), so this estimate is unbiased. Under the same assumption, Satterthwaite's formula
    gives the degrees of freedom: D - 1 for D documents of equal length, and fewer for unequal
    lengths. The skewness is that of sum_d residual_d, or 0 for documents of unequal lengths: the
    longest documents would determine it, and its error would be larger than its benefit. Returns
    None for fewer than two documents.
    """
    if len(tokens) < 2:
        return None
    share = tokens / tokens.sum()
    variance = float((residual**2 / (1.0 - share)).sum())
    mixed = share**2 / (1.0 - share)
    squared = (share**2).sum() + mixed.sum() ** 2 - (mixed**2).sum()
    standard = math.sqrt(variance) / float(tokens.sum())
    skewness = 0.0
    if float(np.ptp(tokens)) == 0.0:
        skewness = skewness_of_sum(residual)
    return Error(standard, 1.0 / float(squared), skewness)


def _error_over_draws(nats: Floats, tokens: Floats) -> Error | None:
    """Estimate the Monte-Carlo standard error of the mean from the draws of each document.

    `nats` [D,K] contains K draws of D documents, and `tokens` [D] their numbers of tokens. Returns
    None for fewer than two draws.
    """
    draws = nats.shape[1]
    if draws < 2:
        return None
    # documents are independent of each other, so the variances of their sums add up
    variance = float(nats.var(-1, ddof=1).sum()) / draws
    share = tokens / tokens.sum()
    standard = math.sqrt(variance) / float(tokens.sum())
    return Error(standard, freedom=(draws - 1) / float((share**2).sum()))
