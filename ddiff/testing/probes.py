"""What the laws are tried on: fixed laws, times, grids of uniforms and quadrature nodes. Nothing here is random twice."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ddiff.core.numerics import interior
from ddiff.core.prediction import CleanDistribution, DenseDistribution
from ddiff.core.process import ForwardProcess, RowFunction
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError

MAX_STATES = 64
INNER = (0.02, 0.31, 0.5, 0.77, 0.97)
NEAR_ENDS = (1e-6, 1.0 - 1e-6)
ENDS = (0.0, 1.0)
STEPS = ((0.31, 0.77), (0.02, 0.5), (0.5, 0.97), (0.1, 0.9))


def times(*groups: tuple[float, ...]) -> Tensor:
    return torch.tensor([t for group in groups for t in group], dtype=torch.float64)


def random_log_probs(num_tokens: int, count: int = 3, seed: int = 0) -> Tensor:
    """[count, V] log-laws from nearly even to peaked."""
    logits = torch.randn(
        count, num_tokens, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    sharpness = torch.linspace(0.5, 2.5, count, dtype=torch.float64)
    return (sharpness.unsqueeze(-1) * logits).log_softmax(-1)


def certain_log_probs(num_tokens: int) -> Tensor:
    """[V, V] the log-law that is sure of each word."""
    return torch.eye(num_tokens, dtype=torch.float64).log()


def product(*axes: Tensor) -> tuple[Tensor, ...]:
    """All combinations of the entries of 1-d tensors, one flat tensor each."""
    places = torch.meshgrid(*(torch.arange(len(axis)) for axis in axes), indexing="ij")
    return tuple(axis[place.reshape(-1)] for axis, place in zip(axes, places))


def grid_of_uniforms(count: int, dimensions: int) -> Tensor:
    """[count, dimensions] float64 Sobol points: an even covering of the unit cube, the same every time."""
    return torch.quasirandom.SobolEngine(dimensions).draw(count, dtype=torch.float64)


def logit_nodes(
    start: float, stop: float, panels: int, order: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """Nodes for integrals over t in [start, stop] that resolve both ends: v in [0,1], logit t, and the weights of dv.

    Gauss-Legendre on equal panels of logit t; v is logit t scaled to [0,1].
    """
    x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(order))
    left = torch.arange(panels, dtype=torch.float64).unsqueeze(-1)
    v = ((left + (x + 1.0) / 2.0) / panels).reshape(-1)
    first, last = torch.logit(interior(torch.tensor([start, stop], dtype=torch.float64)))
    return v, first + v * (last - first), (w / 2.0 / panels).repeat(panels)


def num_panels(start: float, stop: float, finer: int = 1) -> int:
    """One panel per 2.3 units of logit t (ten nodes each): most integrands here are analytic within pi of the real axis.

    Steeper ones (a schedule that is an exponential of an exponential) need panels `finer` times as many.
    """
    first, last = torch.logit(interior(torch.tensor([start, stop], dtype=torch.float64)))
    return finer * max(2, math.ceil(float(last - first) / 2.3))


def likelihoods(process: ForwardProcess, t: Tensor) -> Tensor:
    """[r, V, S] q_t(z|x), read from the marginal alone."""
    num_tokens = process.vocabulary.num_tokens
    rows = process.log_marginal(
        certain_log_probs(num_tokens).repeat(len(t), 1), t.repeat_interleave(num_tokens)
    )
    return rows.exp().reshape(len(t), num_tokens, -1)


class ReachableRows:
    """Every (law, clean token, state, time) in which the state can occur: what the bound may meet."""

    def __init__(self, process: ForwardProcess, t: Tensor, laws: Tensor | None = None) -> None:
        vocabulary = process.vocabulary
        self.dists = random_log_probs(vocabulary.num_tokens) if laws is None else laws
        x0, zt = torch.arange(vocabulary.num_tokens), torch.arange(vocabulary.num_states)
        law_index, time_index, x0, zt = product(
            torch.arange(len(self.dists)), torch.arange(len(t)), x0, zt
        )
        weight = likelihoods(process, t)[time_index, x0, zt]
        possible = weight > 0
        self.x0, self.zt, self.t = x0[possible], zt[possible], t[time_index[possible]]
        self.weight, self.log_p = weight[possible], self.dists[law_index[possible]]
        self.dist = DenseDistribution(self.log_p, vocabulary)

    def take(self, which: Tensor) -> ReachableRows:
        """The rows marked by a bool [r]."""
        some = copy.copy(self)
        some.x0, some.zt, some.t = self.x0[which], self.zt[which], self.t[which]
        some.weight, some.log_p = self.weight[which], self.log_p[which]
        some.dist = DenseDistribution(some.log_p, self.dist.vocabulary)
        return some

    @property
    def labels(self) -> dict[str, Tensor]:
        return {"x0": self.x0, "zt": self.zt, "t": self.t}


class TableQuery:
    """A visit over fixed laws log_p [n,V] that gives away no more than was asked: below `node`, nothing above it.

    `calls` counts visits, `asked` remembers the rows of the last one.
    """

    def __init__(self, log_p: Tensor, vocabulary: Vocabulary) -> None:
        self.log_p, self.vocabulary = log_p, vocabulary
        self.calls = 0
        self.asked = torch.empty(0, dtype=torch.long)

    def __call__(self, rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        self.calls += 1
        self.asked = rows
        parts = []
        for idx, dist in distributions_below(self.log_p[rows], node, self.vocabulary):
            parts.append((idx, fn(dist, *(value[idx] for value in per_row))))
        order = torch.cat([idx for idx, _ in parts])
        if isinstance(parts[0][1], tuple):
            return tuple(
                _in_order(order, column) for column in zip(*(result for _, result in parts))
            )
        return _in_order(order, [result for _, result in parts])


def distributions_below(
    log_p: Tensor, node: Tensor, vocabulary: Vocabulary
) -> Iterator[tuple[Tensor, CleanDistribution]]:
    """Rows grouped by the node that they ask below: (which rows, a law that knows nothing else)."""
    for top in node.unique().tolist():
        idx = (node == top).nonzero().squeeze(-1)
        if top == vocabulary.root:
            yield idx, DenseDistribution(log_p[idx], vocabulary)
            continue
        start, stop = vocabulary.node_range(torch.tensor(top), 0)
        words = vocabulary.order(0)[int(start) : int(stop)]
        yield idx, DenseDistribution(log_p[idx][:, words].log_softmax(-1), vocabulary, top)


def evaluate_below(
    formula: Callable[..., Tensor],
    log_p: Tensor,
    node: Tensor,
    vocabulary: Vocabulary,
    *arguments: Tensor,
) -> Tensor:
    """[r] formula(law, *arguments) where every row's law knows only what lies below its node."""
    rows = torch.arange(len(log_p))
    return TableQuery(log_p, vocabulary)(rows, node, formula, *arguments)


def _in_order(order: Tensor, pieces: Any) -> Tensor:
    gathered = torch.cat(list(pieces))
    return torch.empty_like(gathered).index_copy_(0, order, gathered)


def require_small(process: ForwardProcess) -> None:
    """The kit works by brute force over all states."""
    states = process.vocabulary.num_states
    if states > MAX_STATES:
        raise ArgumentError(
            f"check_process: process must be a small instance, at most {MAX_STATES} states, because the laws are proven by "
            f"brute force; got {states}. Build it on a toy vocabulary, as `examples()` does."
        )


def integral(rate: Callable[[Tensor], Tensor], start: float, stop: float, finer: int = 1) -> Tensor:
    """[k] the integral over t in [start, stop] of rate(t [n]) -> [n,k], by Gauss-Legendre in logit t."""
    _, y, width = logit_nodes(start, stop, num_panels(start, stop, finer))
    first, last = torch.logit(interior(times((start, stop))))
    t = torch.sigmoid(y)
    return (t * (1.0 - t) * (last - first) * width) @ rate(t)
