"""Inputs of the conformance checks: distributions, noise times, Sobol points, quadrature nodes.

All inputs are the same at every call.
"""

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
PANEL = 2.3  # units of logit t that one panel of a quadrature covers


def times(*groups: tuple[float, ...]) -> Tensor:
    """Concatenate groups of noise times to one float64 tensor."""
    return torch.tensor(
        [t for group in groups for t in group],
        dtype=torch.float64,
    )


def random_log_probs(
    num_tokens: int,
    count: int = 3,
    seed: int = 0,
) -> Tensor:
    """Draw `count` random log-distributions over the tokens, as a tensor [count,V].

    They range from nearly uniform to peaked.
    """
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(
        count,
        num_tokens,
        generator=generator,
        dtype=torch.float64,
    )
    # a law should hold for flat and for peaked predictions
    sharpness = torch.linspace(0.5, 2.5, count, dtype=torch.float64)
    return (sharpness.unsqueeze(-1) * logits).log_softmax(-1)


def certain_log_probs(num_tokens: int) -> Tensor:
    """Return one-hot log-distributions [V,V]: row x puts probability 1 on token x."""
    return torch.eye(num_tokens, dtype=torch.float64).log()


def product(*axes: Tensor) -> tuple[Tensor, ...]:
    """Return all combinations of the entries of 1-d tensors, as one flat tensor per axis.

    For example, the axes [0, 1] and [5, 6, 7] give [0, 0, 0, 1, 1, 1] and [5, 6, 7, 5, 6, 7].
    """
    indices = [torch.arange(len(axis)) for axis in axes]
    # "ij": the last axis varies fastest, as in nested loops
    places = torch.meshgrid(*indices, indexing="ij")
    return tuple(axis[place.reshape(-1)] for axis, place in zip(axes, places))


def grid_of_uniforms(count: int, dimensions: int) -> Tensor:
    """Return Sobol points [count,dimensions] in float64, which cover the unit cube evenly."""
    return torch.quasirandom.SobolEngine(dimensions).draw(count, dtype=torch.float64)


# ------------------------------------------------------------------ quadrature


def logit_ends(
    start: float,
    stop: float,
) -> tuple[Tensor, Tensor]:
    """Return the logits of the times `start` and `stop`.

    The times 0 and 1 are first moved into the interval (0, 1).
    """
    first, last = torch.logit(interior(times((start, stop))))
    return first, last


def logit_nodes(
    start: float, stop: float, panels: int, order: int = 10
) -> tuple[Tensor, Tensor, Tensor]:
    """Return n Gauss-Legendre nodes on equal panels of logit t, between two times.

    Equal panels of logit t resolve integrands that are steep at t = 0 and t = 1.

    Args:
        start: first time.
        stop: last time.
        panels: number of panels.
        order: number of nodes per panel.

    Returns:
        - v [n] in [0,1], the nodes; v is linear in logit t,
        - logit t [n] at the nodes,
        - the weights [n] of the nodes in an integral over v.
    """
    # Scale the Gauss-Legendre nodes from [-1, 1] to the interval of each panel.
    x, w = (torch.from_numpy(values) for values in np.polynomial.legendre.leggauss(order))
    left = torch.arange(panels, dtype=torch.float64).unsqueeze(-1)
    v = ((left + (x + 1.0) / 2.0) / panels).reshape(-1)
    first, last = logit_ends(start, stop)
    weight = (w / 2.0 / panels).repeat(panels)
    return v, first + v * (last - first), weight


def num_panels(
    start: float,
    stop: float,
    finer: int = 1,
) -> int:
    """Return the number of quadrature panels for [start, stop]: one per 2.3 units of logit t.

    With ten nodes per panel, this number resolves an integrand that is an analytic function of
    logit t within a distance of pi from the real axis. A steeper integrand, such as that of a
    schedule that is an exponential of an exponential, needs `finer` times as many panels.
    """
    first, last = logit_ends(start, stop)
    return finer * max(2, math.ceil(float(last - first) / PANEL))


def integral(
    rate: Callable[[Tensor], Tensor],
    start: float,
    stop: float,
    finer: int = 1,
) -> Tensor:
    """Integrate a function over t in [start, stop] by Gauss-Legendre quadrature in logit t.

    `rate` maps times [n] to values [n,k]. `finer` is a factor on the number of nodes. Returns the
    integrals [k].
    """
    _, y, weight = logit_nodes(
        start,
        stop,
        num_panels(start, stop, finer),
    )
    first, last = logit_ends(start, stop)
    t = torch.sigmoid(y)
    # dt = t (1 - t) d(logit t)
    return (t * (1.0 - t) * (last - first) * weight) @ rate(t)


# ------------------------------------------------------------------ marginals


def likelihoods(process: ForwardProcess, t: Tensor) -> Tensor:
    """Return q_t(z|x) [r,V,S] for V tokens x and S states z at times t [r].

    The probabilities are computed from `log_marginal` of the process.
    """
    num_tokens = process.vocabulary.num_tokens
    log_p = certain_log_probs(num_tokens).repeat(len(t), 1)
    rows = process.log_marginal(log_p, t.repeat_interleave(num_tokens))
    return rows.exp().reshape(len(t), num_tokens, -1)


def likelihoods_by_row(process: ForwardProcess, t: Tensor) -> Tensor:
    """Return q_t(z|x) [r,V,S] for V tokens x and S states z at times t [r].

    Unlike `likelihoods`, this function evaluates each distinct time only once.
    """
    distinct, place = t.unique(return_inverse=True)
    return likelihoods(process, distinct)[place]


def token_likelihoods(
    process: ForwardProcess,
    zt: Tensor,
    t: Tensor,
) -> Tensor:
    """Return q_t(z|x) [r,V] for every token x, at states zt [r] and times t [r]."""
    distinct, place = t.unique(return_inverse=True)
    return likelihoods(process, distinct)[place, :, zt]


class ReachableRows:
    """Every combination of prediction, clean token, state and noise time that can occur.

    A combination can occur if q_t(z_t|x0) > 0. Each combination is one of r rows.

    Args:
        process: forward process.
        t: noise times.
        log_probs: log-distributions that are the predictions; three random ones by default.

    Attributes:
        x0: [r] clean tokens.
        zt: [r] states.
        t: [r] noise times.
        weight: [r] probabilities q_t(z_t|x0).
        log_p: [r,V] predicted log-distributions.
        dist: `log_p` as a `DenseDistribution`.
    """

    def __init__(
        self,
        process: ForwardProcess,
        t: Tensor,
        log_probs: Tensor | None = None,
    ) -> None:
        vocabulary = process.vocabulary
        if log_probs is None:
            log_probs = random_log_probs(vocabulary.num_tokens)
        index, time, x0, zt = product(
            torch.arange(len(log_probs)),
            torch.arange(len(t)),
            torch.arange(vocabulary.num_tokens),
            torch.arange(vocabulary.num_states),
        )
        # states that cannot occur have no defined density
        weight = likelihoods(process, t)[time, x0, zt]
        possible = weight > 0
        self.x0 = x0[possible]
        self.zt = zt[possible]
        self.t = t[time[possible]]
        self.weight = weight[possible]
        self.log_p = log_probs[index[possible]]
        self.dist = DenseDistribution(self.log_p, vocabulary)

    def select(self, chosen: Tensor) -> ReachableRows:
        """Return the rows that are marked by a bool mask [r]."""
        rows = copy.copy(self)
        rows.x0 = self.x0[chosen]
        rows.zt = self.zt[chosen]
        rows.t = self.t[chosen]
        rows.weight = self.weight[chosen]
        rows.log_p = self.log_p[chosen]
        rows.dist = DenseDistribution(rows.log_p, self.dist.vocabulary)
        return rows

    @property
    def args(self) -> tuple[Tensor, Tensor, Tensor]:
        """Return (x0, zt, t), the arguments of formulas such as `density` after the prediction."""
        return self.x0, self.zt, self.t

    @property
    def labels(self) -> dict[str, Tensor]:
        return {"x0": self.x0, "zt": self.zt, "t": self.t}


# ------------------------------------------------------------------ queries with fixed predictions


class TableQuery:
    """Query that returns predictions from fixed log-distributions log_p [n,V] instead of a network.

    Each row is queried below one `node` of the vocabulary's tree. Its prediction covers only the
    tokens below this node, so that a formula that needs other tokens fails.

    Attributes:
        calls: number of calls.
        queried: row numbers of the latest call.
    """

    def __init__(
        self,
        log_p: Tensor,
        vocabulary: Vocabulary,
    ) -> None:
        self.log_p = log_p
        self.vocabulary = vocabulary
        self.calls = 0
        self.queried = torch.empty(0, dtype=torch.long)

    def __call__(self, rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        self.calls += 1
        # keep only the rows of the latest call, because laws test single calls
        self.queried = rows
        indices = []
        results = []
        for idx, dist in distributions_below(self.log_p[rows], node, self.vocabulary):
            indices.append(idx)
            results.append(fn(dist, *(value[idx] for value in per_row)))
        # results are grouped by node and must be restored to the order of `rows`
        order = torch.cat(indices)
        if isinstance(results[0], tuple):
            return tuple(_restore_order(order, column) for column in zip(*results))
        return _restore_order(order, results)


def distributions_below(
    log_p: Tensor, node: Tensor, vocabulary: Vocabulary
) -> Iterator[tuple[Tensor, CleanDistribution]]:
    """Group rows by their node, and yield the row indices and the prediction for each node.

    The prediction is the distribution log_p [r,V], restricted to the tokens below the node. `node`
    [r] contains the node of each row.
    """
    for top in node.unique().tolist():
        idx = (node == top).nonzero().squeeze(-1)
        if top == vocabulary.root:
            yield idx, DenseDistribution(log_p[idx], vocabulary)
            continue
        start, stop = vocabulary.node_range(torch.tensor(top), 0)
        tokens = vocabulary.order(0)[int(start) : int(stop)]
        # condition on the node, so that a formula cannot use the node's probability
        conditional = log_p[idx][:, tokens].log_softmax(-1)
        yield idx, DenseDistribution(conditional, vocabulary, top)


def evaluate_below(
    formula: Callable[..., Tensor],
    log_p: Tensor,
    node: Tensor,
    vocabulary: Vocabulary,
    *arguments: Tensor,
) -> Tensor:
    """Evaluate formula(prediction, *arguments) with predictions restricted to tokens below `node`.

    `log_p` [r,V] contains the predictions before the restriction, and `node` [r] one node per row.
    Returns a tensor [r] with one value per row.
    """
    rows = torch.arange(len(log_p))
    return TableQuery(log_p, vocabulary)(rows, node, formula, *arguments)


def _restore_order(order: Tensor, pieces: Any) -> Tensor:
    gathered = torch.cat(list(pieces))
    return torch.empty_like(gathered).index_copy_(0, order, gathered)


def require_small(process: ForwardProcess) -> None:
    """Raise ArgumentError if the process has too many states to enumerate."""
    states = process.vocabulary.num_states
    if states > MAX_STATES:
        raise ArgumentError(
            f"check_process: process must be a small instance, at most {MAX_STATES} states, "
            f"because the laws are checked by enumeration; got {states}. Build it on a toy "
            "vocabulary, as `examples()` does."
        )
