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


@final
class EvaluationCount:
    """Number of evaluations of a network, in total and of each sequence of the batch.

    Args:
        batch: number of sequences in the batch, if it is known before the first evaluation.

    Attributes:
        calls: number of evaluations so far (NFE). One evaluation may include several sequences.
        runs: [B], number of evaluations that included each sequence of the batch; None while the
            batch is unknown.
    """

    def __init__(self, batch: int | None = None) -> None:
        self.calls = 0
        self.runs: Tensor | None = None
        if batch is not None:
            self.runs = torch.zeros(batch, dtype=torch.long)

    def add(self, batch: int, sequences: Tensor, new_call: bool = True) -> None:
        """Count one evaluation of some sequences of a batch.

        Args:
            batch: number of sequences in the batch.
            sequences: the evaluated sequences, as indices or as a bool mask, on the CPU.
            new_call: if False, the sequences are added to the latest evaluation.
        """
        self.calls += int(new_call)
        if self.runs is None or len(self.runs) != batch:
            self.runs = torch.zeros(batch, dtype=torch.long)
        self.runs[sequences] += 1

    def wrap_query(self, query: Query, positions: int, evaluated: Tensor) -> Query:
        """Return a query that is counted.

        Args:
            query: query of one noisy state, with `positions` positions per sequence.
            positions: number of positions.
            evaluated: [B] bool, sequences for which the state was evaluated. All queries of a state
                share this tensor, so that only the first of them counts.
        """

        def counted(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            queried = torch.zeros_like(evaluated).index_fill(0, (rows // positions).cpu(), True)
            is_new = not bool(evaluated.any())
            self.add(len(evaluated), queried & ~evaluated, new_call=is_new)
            evaluated.logical_or_(queried)
            return query(rows, node, fn, *per_row)

        return counted


class CountingNetwork(ABC):
    """Network that counts its evaluations; base class of the networks that samplers receive.

    Args:
        count: count that the network shares with others; None: a new count.
    """

    predicts: Predicts = "distribution"

    def __init__(self, count: EvaluationCount | None = None) -> None:
        self.count = count or EvaluationCount()

    @abstractmethod
    def __call__(self, noisy: Noisy) -> Query:
        """Return a query, a function that evaluates the network on the batch `noisy`.

        The network runs only when the query is called.
        """

    @property
    def calls(self) -> int:
        """Number of evaluations so far (NFE). One evaluation may include several sequences."""
        return self.count.calls

    @property
    def runs(self) -> Tensor | None:
        """Number of evaluations that included each sequence of the batch [B].

        None before the first evaluation.
        """
        return self.count.runs

    def runs_of_batch(self, batch: int) -> Tensor:
        """Return the number of evaluations of each sequence, a copy of `runs` [B], B = `batch`.

        All entries are 0 if no batch was evaluated yet, or if the latest batch had another size.
        """
        runs = self.runs
        if runs is None or len(runs) != batch:
            return torch.zeros(batch, dtype=torch.long)
        return runs.clone()


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
        return self.count.wrap_query(query, length, evaluated)


def count_evaluations(network: Network, predicts: Predicts = "distribution") -> CountingNetwork:
    """Return the network itself if it counts its evaluations, else wrap the network.

    `predicts` states whether a network that is wrapped predicts a distribution or a score.
    """
    if isinstance(network, CountingNetwork):
        return network
    return EvaluationCounter(network, predicts)
