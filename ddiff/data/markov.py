"""A source of symbols whose entropy is known exactly: what no honest bound can be below."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from ddiff.data.documents import Documents, documents_from_texts
from ddiff.errors import ArgumentError

SYMBOLS = "abcdefghijklmnop"


class MarkovSource:
    """A stationary first-order Markov chain over 4 to 16 symbols, drawn from a seed.

    Row y of `transition` [k,k] is softmax(peakedness * g_y) with standard normal g: 0 is uniform, larger is more
    predictable. `stationary` [k] is its invariant law, with which every row of symbols starts.
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
        logits = peakedness * np.random.default_rng([seed, 0]).standard_normal((alphabet, alphabet))
        weights = np.exp(logits - logits.max(1, keepdims=True))
        self.transition: NDArray[np.float64] = weights / weights.sum(1, keepdims=True)
        self.stationary: NDArray[np.float64] = _invariant_law(self.transition)

    @property
    def entropy_rate(self) -> float:
        """-sum_y pi_y sum_z P_yz ln P_yz, nats per symbol."""
        return float(self.stationary @ _entropy(self.transition))

    def row_entropy(self, length: int) -> float:
        """Entropy of a row per symbol, (H(pi) + (length - 1) * rate) / length, in nats; never under the rate."""
        return float((_entropy(self.stationary) + (length - 1) * self.entropy_rate) / length)

    def rows(self, count: int, length: int, *, stream: int = 0) -> list[str]:
        """`count` independent rows of `length` symbols; another `stream` gives other rows."""
        uniforms = np.random.default_rng([self._seed, 1, stream]).random((length, count))
        letters = np.array(list(self.symbols))
        states = np.stack(list(self._walk(uniforms)), axis=1)
        return ["".join(letters[row]) for row in states]

    def documents(self, *, rows: int, validation: int, length: int) -> Documents:
        """A corpus of rows with its `entropy_rate` set to the entropy of a row per symbol."""
        train, held_out = self.rows(rows, length), self.rows(validation, length, stream=1)
        return Documents(
            documents_from_texts(train),
            documents_from_texts(held_out),
            entropy_rate=self.row_entropy(length),
        )

    def _walk(self, uniforms: NDArray[np.float64]) -> Iterator[NDArray[np.int64]]:
        """The state of all rows at each position, by inversion of the laws' cumulative sums."""
        state = _inverted(np.cumsum(self.stationary)[None], uniforms[0])
        cumulative = np.cumsum(self.transition, axis=1)
        yield state
        for u in uniforms[1:]:
            state = _inverted(cumulative[state], u)
            yield state


def _entropy(law: NDArray[np.float64]) -> NDArray[np.float64]:
    """Entropy of the last axis; weights that have underflowed to 0 count nothing."""
    return -(law * np.log(np.maximum(law, np.finfo(float).tiny))).sum(-1)


def _invariant_law(transition: NDArray[np.float64]) -> NDArray[np.float64]:
    """The solution of pi P = pi with sum 1, by least squares over both conditions."""
    size = len(transition)
    conditions = np.vstack([transition.T - np.eye(size), np.ones(size)])
    law = np.linalg.lstsq(conditions, np.append(np.zeros(size), 1.0), rcond=None)[0]
    return law / law.sum()


def _inverted(cumulative: NDArray[np.float64], uniforms: NDArray[np.float64]) -> NDArray[np.int64]:
    return (uniforms[:, None] >= cumulative[:, :-1]).sum(1)
