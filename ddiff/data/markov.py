"""Markov source of symbols with known entropy, a lower limit for every valid bound."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ddiff.data.documents import Documents, documents_from_texts
from ddiff.errors import ArgumentError

SYMBOLS = "abcdefghijklmnop"


class MarkovSource:
    """Stationary first-order Markov chain over 4 to 16 symbols, drawn from a seed.

    The alphabet has k symbols. The transition matrix P [k,k] is `self.transition`. Row y of P is
    softmax(peakedness * g_y), where g_y is a vector of k standard normal numbers. A peakedness of 0
    gives uniform rows, and larger values give more predictable rows. `self.stationary` [k] is the
    invariant distribution pi of P. The first symbol of every row is drawn from pi.
    """

    def __init__(self, alphabet: int = 8, *, peakedness: float = 2.0, seed: int = 0) -> None:
        if not 4 <= alphabet <= len(SYMBOLS):
            raise ArgumentError(
                f"MarkovSource: alphabet must lie in 4..{len(SYMBOLS)}; got {alphabet}."
            )
        if not 0 <= peakedness < np.inf:
            raise ArgumentError(
                f"MarkovSource: peakedness must be a finite number >= 0; got {peakedness}."
            )
        self.symbols = SYMBOLS[:alphabet]
        self._seed = seed
        rng = np.random.default_rng([seed, 0])
        logits = peakedness * rng.standard_normal((alphabet, alphabet))
        weights = np.exp(logits - logits.max(1, keepdims=True))
        self.transition: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
        self.stationary: NDArray[np.float64] = _invariant_distribution(self.transition)

    @property
    def entropy_rate(self) -> float:
        """Entropy rate of the chain in nats per symbol, -sum_y pi_y sum_z P_yz ln P_yz.

        P is the transition matrix and pi its invariant distribution.
        """
        return float(self.stationary @ _entropy(self.transition))

    def row_entropy(self, length: int) -> float:
        """Return the entropy of a row of `length` symbols, in nats per symbol.

        The entropy is (H(pi) + (length - 1) * entropy_rate) / length, where H(pi) is the entropy of
        the stationary distribution. The entropy is never below the entropy rate.
        """
        entropy = _entropy(self.stationary) + (length - 1) * self.entropy_rate
        return float(entropy / length)

    def rows(self, count: int, length: int, *, stream: int = 0) -> list[str]:
        """Draw `count` independent rows of `length` symbols.

        Two calls with different values of `stream` give independent rows.
        """
        rng = np.random.default_rng([self._seed, 1, stream])
        uniforms = rng.random((length, count))
        letters = np.array(list(self.symbols))
        steps = list(self._walk(uniforms))
        states = np.stack(steps, axis=1)
        return ["".join(letters[row]) for row in states]

    def documents(self, *, rows: int, validation: int, length: int) -> Documents:
        """Draw a corpus of `rows` training rows and `validation` validation rows.

        The attribute `entropy_rate` of the result is the entropy of a row in nats per symbol.
        """
        train = self.rows(rows, length)
        held_out = self.rows(validation, length, stream=1)
        return Documents(
            documents_from_texts(train),
            documents_from_texts(held_out),
            entropy_rate=self.row_entropy(length),
        )

    def _walk(self, uniforms: NDArray[np.float64]) -> Iterator[NDArray[np.int64]]:
        """Yield the symbols of all rows at one position after the other.

        `uniforms` [length, rows] are the uniform random numbers from which the symbols are sampled
        by inversion of the CDF.
        """
        state = _sample_by_inversion(np.cumsum(self.stationary)[None], uniforms[0])
        cumulative = np.cumsum(self.transition, axis=1)
        yield state
        for u in uniforms[1:]:
            state = _sample_by_inversion(cumulative[state], u)
            yield state


def _entropy(distribution: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return the entropy of distributions along the last axis, in nats."""
    # A probability may underflow to 0, and 0 * ln(0) would be NaN.
    log = np.log(np.maximum(distribution, np.finfo(float).tiny))
    return -(distribution * log).sum(-1)


def _invariant_distribution(transition: NDArray[np.float64]) -> NDArray[np.float64]:
    """Solve pi P = pi with sum(pi) = 1 by least squares, where P is the transition matrix."""
    size = len(transition)
    invariance = transition.T - np.eye(size)
    conditions = np.vstack([invariance, np.ones(size)])
    values = np.append(np.zeros(size), 1.0)
    # Least squares, because the invariance conditions without the sum are singular.
    solution, *_ = np.linalg.lstsq(conditions, values, rcond=None)
    return solution / solution.sum()


def _sample_by_inversion(
    cumulative: NDArray[np.float64], uniforms: NDArray[np.float64]
) -> NDArray[np.int64]:
    # The last column is left out, because rounding may make it slightly smaller than 1.
    return (uniforms[:, None] >= cumulative[:, :-1]).sum(1)
