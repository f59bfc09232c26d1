"""Network that always predicts the same distribution, as a reference for drawn estimates.

The expected bound of a fixed prediction p is -ln p(x) for every process, clock and time window. A
drawn estimate of this bound has nearly the same noise as that of a trained network with the same
random numbers, so that the noise of the difference is smaller.
"""

from __future__ import annotations

from typing import Any, final

from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.prediction import DenseDistribution, SubtreeDistribution
from ddiff.core.process import Query, RowFunction
from ddiff.core.times import Noisy
from ddiff.core.vocabulary import Vocabulary


@final
class FixedDistribution(SubtreeDistribution):
    """The same distribution in every row, without a copy for each row.

    Args:
        vocabulary: tree of the tokens.
        log_masses: for each level, log-probabilities [w] of its nodes in tree order.
        num_rows: number of rows.
    """

    def __init__(self, vocabulary: Vocabulary, log_masses: list[Tensor], num_rows: int) -> None:
        super().__init__(vocabulary, vocabulary.root)
        self._log_masses = log_masses
        self._num_rows = num_rows

    def log_below(self, level: int) -> Tensor:
        return self._log_masses[level].expand(self._num_rows, -1)


def make_fixed_network(log_p: Tensor, vocabulary: Vocabulary) -> Network:
    """Make a network that predicts the log-probabilities log_p [V] at every position."""
    one_row = DenseDistribution(log_p.unsqueeze(0), vocabulary)
    levels = range(max(vocabulary.num_levels, 1))
    log_masses = [one_row.log_below(level)[0] for level in levels]

    def network(noisy: Noisy) -> Query:
        def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            return fn(FixedDistribution(vocabulary, log_masses, len(rows)), *per_row)

        return query

    return network


def smooth_counts(counts: Tensor) -> Tensor:
    """Return log-probabilities [V] from token counts [V], with half a count added to each."""
    smoothed = counts.double() + 0.5
    return (smoothed / smoothed.sum()).log()
