"""Networks that count how often they are evaluated."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, Literal, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.process import Query, RowFunction
from ddiff.core.times import Noisy

Predicts = Literal["distribution", "score", "mean"]
"""Kind of prediction.

"distribution": the distribution of the clean token. "score": ratios of marginals. "mean": the mean
of the clean vector.
"""


class CountingNetwork(ABC):
    """Network that counts its evaluations; base class of the networks that samplers receive."""

    predicts: Predicts = "distribution"

    def __init__(self) -> None:
        self._calls = 0
        self._runs: Tensor | None = None

    @abstractmethod
    def __call__(self, noisy: Noisy) -> Query:
        """Return a query, a function that evaluates the network on the batch `noisy`.

        The network runs only when the query is called.
        """

    @property
    def calls(self) -> int:
        """Number of evaluations so far (NFE). One evaluation may include several sequences."""
        return self._calls

    @property
    def runs(self) -> Tensor | None:
        """Number of evaluations that included each sequence of the batch [B].

        None before the first evaluation.
        """
        return self._runs

    def runs_of_batch(self, batch: int) -> Tensor:
        """Return the number of evaluations of each sequence, a copy of `runs` [B], B = `batch`.

        All entries are 0 if no batch was evaluated yet, or if the latest batch had another size.
        """
        runs = self.runs
        if runs is None or len(runs) != batch:
            return torch.zeros(batch, dtype=torch.long)
        return runs.clone()

    def _count(self, batch: int, sequences: Tensor, new_call: bool = True) -> None:
        """Count one evaluation of some sequences of a batch.

        Args:
            batch: number of sequences in the batch.
            sequences: the evaluated sequences, as indices or as a bool mask, on the CPU.
            new_call: if False, the sequences are added to the latest evaluation.
        """
        self._calls += int(new_call)
        if self._runs is None or len(self._runs) != batch:
            self._runs = torch.zeros(batch, dtype=torch.long)
        self._runs[sequences] += 1


@final
class EvaluationCounter(CountingNetwork):
    """Wrapper that counts the evaluations of a network.

    All queries of one noisy state count as one evaluation.
    """

    def __init__(self, network: Network, predicts: Predicts) -> None:
        super().__init__()
        self.network = network
        self.predicts = predicts

    def __call__(self, noisy: Noisy) -> Query:
        query = self.network(noisy)
        batch, length = noisy.zt.shape[:2]
        evaluated = torch.zeros(batch, dtype=torch.bool)

        def counted(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            queried = torch.zeros_like(evaluated).index_fill(0, (rows // length).cpu(), True)
            # Several queries of one noisy state use one evaluation: only the first counts.
            self._count(batch, queried & ~evaluated, new_call=not bool(evaluated.any()))
            evaluated.logical_or_(queried)
            return query(rows, node, fn, *per_row)

        return counted


def count_evaluations(network: Network, predicts: Predicts = "distribution") -> CountingNetwork:
    """Return the network itself if it counts its evaluations, else wrap the network.

    `predicts` states whether a network that is wrapped predicts a distribution or a score.
    """
    if isinstance(network, CountingNetwork):
        return network
    return EvaluationCounter(network, predicts)
