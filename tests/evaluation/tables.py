"""Fixed predictions that replace a trained network, and small processes for evaluation tests."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.dense import DenseProcess
from ddiff.core.elbo import Likelihood, nelbo, network_from_table
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import TimeRule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.data.batch import Batch
from ddiff.data.markov import MarkovSource
from ddiff.evaluation.likelihood import Scored

Table = Callable[[Tensor, Tensor], Tensor]


def processes() -> dict[str, ForwardProcess]:
    """Return three processes on four tokens, by name.

    The tree process moves tokens to a wrong cluster with probability 0.1.
    """
    rates = torch.rand(4, 4, generator=torch.Generator().manual_seed(3)).double() + 0.2
    return {
        "masked": TreeProcess(FlatVocabulary(4), CdfClock([LinearSchedule()])),
        "tree": TreeProcess(
            HierarchicalVocabulary([[0, 1, 1, 0]]), LogTimeClock((1.0, 1.0)), xi=0.9
        ),
        "dense": DenseProcess(FlatVocabulary(4, mask=False), rates - rates.sum(1).diag()),
    }


class Known(Scored):
    """Objective whose network is a table of predictions; records the evaluated rows and strata."""

    def __init__(self, process: ForwardProcess, table: Table) -> None:
        self.process, self.network = process, network_from_table(table, process.vocabulary)
        self.asked: list[tuple[int, int, int]] = []  # row, slot, slots

    def nll(
        self, batch: Batch, rng: CounterRng, slot: Tensor, slots: Tensor, times: TimeRule
    ) -> Likelihood:
        self.asked += zip(batch.index.tolist(), slot.tolist(), slots.tolist())
        terms = nelbo(self.process, self.network, batch.ids, batch.scored, times, rng, slot, slots)
        named = {"closing": terms.closing, "diffusion": terms.diffusion, "decoding": terms.decoding}
        return Likelihood(named, {"everything": terms.diffusion})


def constant(dist: Tensor) -> Table:
    """Return a table that predicts the distribution `dist` [V] at every position."""
    return lambda zt, t: dist.log().expand(*zt.shape, -1)


def exact_conditionals(process: ForwardProcess, source: MarkovSource) -> Table:
    """Return a table of the exact distribution of each symbol given the states of the others.

    The symbols are rows of the Markov source.
    """
    move, start = torch.from_numpy(source.transition), torch.from_numpy(source.stationary)

    def table(zt: Tensor, t: Tensor) -> Tensor:
        evidence = (
            process.log_likelihood(zt.reshape(-1), t.reshape(-1)).softmax(-1).reshape(*zt.shape, -1)
        )
        before, after = [start.expand(len(zt), -1)], [torch.ones(len(zt), len(start)).double()]
        for i in range(zt.shape[1] - 1):
            before.append(_normalize((before[-1] * evidence[:, i]) @ move))
            after.append(_normalize((after[-1] * evidence[:, -1 - i]) @ move.T))
        return _normalize(torch.stack(before, 1) * torch.stack(after[::-1], 1)).log()

    return table


def _normalize(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)


def full_rows(ids: Tensor) -> Callable[[NDArray[np.int64]], Batch]:
    """Return a function that makes batches of the rows `ids` [R,L], with all positions scored."""
    return scored_rows(ids, torch.full((len(ids),), ids.shape[1]))


def scored_rows(ids: Tensor, num_valid: Tensor) -> Callable[[NDArray[np.int64]], Batch]:
    """Return a function that makes batches of the rows `ids` [R,L] from row numbers.

    The first `num_valid` [R] positions of a row are scored, and the others are padding.
    """
    valid = torch.arange(ids.shape[1]) < num_valid[:, None]

    def batch_of(numbers: NDArray[np.int64]) -> Batch:
        rows = torch.from_numpy(numbers)
        document = rows[:, None].expand(-1, ids.shape[1])
        return Batch(ids[rows], valid[rows], valid[rows], document, rows)

    return batch_of


def symbols(source: MarkovSource, count: int, length: int) -> Tensor:
    """Return the ids [count, length] of `count` rows of the source."""
    return torch.tensor(
        [[source.symbols.index(symbol) for symbol in row] for row in source.rows(count, length)]
    )
