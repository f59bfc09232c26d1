"""Network that predicts the exact conditional distributions of a Markov source."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from ddiff import DenseDistribution, ForwardProcess, MarkovSource, Noisy, Score
from ddiff.core.elbo import Network, RowFunction
from ddiff.core.process import Query


def exact_network(
    process: ForwardProcess, source: MarkovSource, predicts: str = "distribution"
) -> Network:
    """Return a network that predicts the exact distribution of each symbol of a Markov source.

    The distribution of x_i is conditioned on all states that position i attends to, except its own.
    With predicts = "score", the network predicts the score that belongs to this distribution.
    """

    def network(noisy: Noisy) -> Query:
        log_p = _log_rest_distribution(process, source, noisy).flatten(0, 1)
        zt, t = noisy.zt.reshape(-1), noisy.t.reshape(-1)

        def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            if predicts == "distribution":
                return fn(DenseDistribution(log_p[rows], process.vocabulary), *per_row)
            log_q = process.log_marginal(log_p[rows], t[rows])
            return fn(Score(log_q - log_q.gather(-1, zt[rows].unsqueeze(-1))), *per_row)

        return query

    return network


def row_nats(source: MarkovSource, x0: Tensor) -> Tensor:
    """Return -ln P(x) [B] of rows x0 [B,L] of the source, in nats."""
    move, start = (
        torch.from_numpy(source.transition).log(),
        torch.from_numpy(source.stationary).log(),
    )
    return -(start[x0[:, 0]] + move[x0[:, :-1], x0[:, 1:]].sum(-1))


def ids_of(source: MarkovSource, count: int, length: int) -> Tensor:
    """Return the ids [count, length] of `count` rows of the source."""
    return torch.tensor(
        [[source.symbols.index(symbol) for symbol in row] for row in source.rows(count, length)]
    )


def _log_rest_distribution(process: ForwardProcess, source: MarkovSource, noisy: Noisy) -> Tensor:
    """Return the log-distribution [B,L,V] of each symbol given the states at other positions.

    States at the prior (t = 1) are ignored. With blocks, a position is conditioned on states of its
    block and on clean symbols of earlier blocks.
    """
    seen = (
        process.log_likelihood(noisy.zt.reshape(-1), noisy.t.reshape(-1))
        .softmax(-1)
        .reshape(*noisy.zt.shape, -1)
    )
    seen = torch.where((noisy.t < 1.0).unsqueeze(-1), seen, torch.ones_like(seen))
    if noisy.block is None:
        return _forward_backward(seen, source).log()
    assert noisy.memory is not None
    block = noisy.block.expand_as(noisy.zt).unsqueeze(-1)
    clean = torch.nn.functional.one_hot(noisy.memory, seen.shape[-1]).double()
    dist = torch.zeros_like(seen)
    for current in range(int(block.max()) + 1):
        evidence = torch.where(block < current, clean, torch.where(block == current, seen, 1.0))
        dist = torch.where(block == current, _forward_backward(evidence, source), dist)
    return dist.log()


def _forward_backward(evidence: Tensor, source: MarkovSource) -> Tensor:
    """Return the distribution [B,L,V] of each symbol given the evidence at other positions.

    `evidence` [B,L,V] is the likelihood of the observation at each position, for each symbol.
    """
    move, start = torch.from_numpy(source.transition), torch.from_numpy(source.stationary)
    before, after = (
        [start.expand(len(evidence), -1)],
        [torch.ones(len(evidence), len(start), dtype=torch.float64)],
    )
    for i in range(evidence.shape[1] - 1):
        before.append(_normalize((before[-1] * evidence[:, i]) @ move))
        after.append(_normalize((after[-1] * evidence[:, -1 - i]) @ move.T))
    return _normalize(torch.stack(before, 1) * torch.stack(after[::-1], 1))


def _normalize(weights: Tensor) -> Tensor:
    return weights / weights.sum(-1, keepdim=True)
