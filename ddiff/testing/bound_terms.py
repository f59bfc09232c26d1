"""Law of the bound with its own draws: each term of `core.elbo.nelbo` against an enumeration that shares no code with it.

`bound.exact_nelbo` replaces the draws of the bound and multiplies their probabilities in, so it cannot see which
distribution a term draws from. Here the process draws for itself, from uniforms that cover the unit cube evenly.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from ddiff.core.elbo import NelboTerms, nelbo, network_from_table
from ddiff.core.numerics import interior
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess, Prior
from ddiff.core.rng import CounterRng
from ddiff.testing.bound import (
    WHOLE,
    NodeTimes,
    Table,
    Window,
    all_sequences,
    bent_path,
    random_joint,
)
from ddiff.testing.probes import likelihoods, product, times
from ddiff.testing.report import Gap, compare, law

INNER_SHARES = (0.2, 0.6)  # of the information, lost before and within the inner window
POINTS = 8192
DIMENSIONS = 64  # of the Sobol sequence; two positions of a process with four uniforms use 2 + 3 * 8 + 2 * 2 of them
CELLS = 128  # times of a window, each read at POINTS / CELLS points
EXACT = 1e-9  # nats, for terms that are 0 or do not vary
Formula = Callable[[DenseDistribution, Tensor, Tensor, Tensor], Tensor]


class SobolRng(CounterRng):
    """Sobol points in place of random numbers: each new (channel, position, count) reads dimensions of its own.

    A channel that is queried twice gives the same numbers twice, as `Noise` does; `queries` counts them. `point` [B] says
    which of the `points` each sequence reads.
    """

    def __init__(self, point: Tensor, points: int, length: int) -> None:
        super().__init__(0, 0, torch.arange(len(point)), length)
        # the first point of the sequence is 0, an edge of every piece: the cube is shifted by half a cell
        cube = (
            torch.quasirandom.SobolEngine(DIMENSIONS).draw(points, dtype=torch.float64)
            + 0.5 / points
        )
        self.cube = cube[point]
        self.first: dict[str, int] = {}
        self.used = 0
        self.queries: Counter[str] = Counter()

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        self.queries[channel] += 1
        size = self.length * count
        if channel not in self.first:
            self.first[channel] = self.used
            self.used += size
        start = self.first[channel]
        drawn = self.cube[:, start : start + size].reshape(-1, self.length, count)
        return drawn.squeeze(-1) if count == 1 else drawn


class Moments(NamedTuple):
    """Of a term in nats, for n sequences: its mean [n,L], the mean of its square [n,L], and that of its sum's [n]."""

    mean: Tensor
    square: Tensor
    square_of_sum: Tensor


def sensitive_table(process: ForwardProcess) -> Table:
    """The exact distribution of each of two tokens given the other position's state, up to a `latest` time.

    An exact network ignores all states at t = 1 of a process that closes, and so whatever is shown there. Told a later
    time than `latest`, this one goes on to read states as of `latest`, and predicts the flatter the later it is: a state
    that was drawn from x0 shows, and so does the time that is told. States that no token leads to say nothing.
    """
    latest = half_information_window(process)[1]
    joint = (
        0.5 * random_joint(process.vocabulary.num_tokens)
    ).exp()  # far from certain, so that no term is tiny
    joint = joint / joint.sum()

    def table(zt: Tensor, t: Tensor) -> Tensor:
        distinct, place = t.clamp(max=latest).unique(return_inverse=True)
        evidence = likelihoods(process, distinct).transpose(1, 2)[place, zt]  # [B,2,V]
        evidence = torch.where(evidence.sum(-1, keepdim=True) > 0, evidence, 1.0)
        stacked = torch.stack([evidence[:, 1] @ joint.T, evidence[:, 0] @ joint], 1)
        flatter = 1.0 - 0.5 * ((t - latest) / (1.0 - latest)).clamp(min=0.0)
        return (flatter.unsqueeze(-1) * stacked.log()).log_softmax(-1)

    return table


class InformationPath:
    """Paths t_i(v) of the positions from one end of the window to the other, along which the terms vary little.

    Evenly in t, or in logit t, the diffusion term of some processes is a rare and large number. Where the information
    I(X; Z_t) of a uniform X falls evenly, its mean hardly depends on the time; v goes through that from end to end, slowly
    at the ends, and each position bends it in its own way.
    """

    def __init__(self, process: ForwardProcess, window: Window, nodes: int = 400) -> None:
        first, last = torch.logit(interior(times(window)))
        self.y = torch.linspace(float(first), float(last), nodes, dtype=torch.float64)
        q = likelihoods(process, torch.sigmoid(self.y)) / process.vocabulary.num_tokens
        lost = torch.where(q > 0, q * (q.sum(1, keepdim=True) / q).log(), 0.0).sum((1, 2))
        # rounding near the ends must not turn the path round; a share of logit t keeps it moving everywhere
        steps = lost.diff().clamp(min=0.0)
        steps = 0.98 * steps / steps.sum() + 0.02 / len(steps)
        self.tau = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])

    def __call__(self, v: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """[n,L] times of every position where the window is at v [n] in [0,1], and dt_i/dv."""
        t = []
        speed = []
        for position in range(length):
            place, slope = bent_path(v, position)
            tau = place**2 * (3.0 - 2.0 * place) * self.tau[-1]
            cell = torch.searchsorted(self.tau, tau.contiguous(), right=True).clamp(
                1, len(self.tau) - 1
            )
            steep = (self.y[cell] - self.y[cell - 1]) / (self.tau[cell] - self.tau[cell - 1])
            here = torch.sigmoid(self.y[cell - 1] + (tau - self.tau[cell - 1]) * steep)
            t.append(here)
            speed.append(
                here * (1.0 - here) * steep * self.tau[-1] * 6.0 * place * (1.0 - place) * slope
            )
        return torch.stack(t, -1), torch.stack(speed, -1)


def half_information_window(process: ForwardProcess) -> Window:
    """Times within [0, 1] between which half of the information is lost, so that every term is large."""
    path = InformationPath(process, WHOLE)
    cell = torch.searchsorted(path.tau, times(INNER_SHARES) * path.tau[-1])
    start, stop = torch.sigmoid(path.y[cell]).tolist()
    return start, stop


def replace_prior(process: ForwardProcess) -> ForwardProcess:
    """The same process, except that its prior is not q_1: later states are likelier, all are possible.

    Where the prior is q_1, a network that is shown q_1(.|x0) in the closing term is right by accident.
    """
    twin = copy.copy(process)
    twin.prior = Prior(
        torch.arange(1.0, process.vocabulary.num_states + 1.0).double().log().log_softmax(-1)
    )
    return twin


def draw_terms(
    process: ForwardProcess,
    table: Table,
    x0: Tensor,
    scored: Tensor,
    window: Window,
    points: int = POINTS,
) -> tuple[NelboTerms, SobolRng]:
    """`nelbo` of x0 [n,L] at every point of the covering, its terms as [n,points,L], and the noise that it read.

    Times lie on an `InformationPath`.
    """
    sequence, point = product(torch.arange(len(x0)), torch.arange(points))
    # points of their own for each sequence, so that the errors of their sum are no multiples of one
    rng = SobolRng(sequence * points + point, len(x0) * points, x0.shape[1])
    # the middle of one of CELLS cells, as the enumeration has it: both are sums over the same times
    v = ((rng.uniform("time")[:, 0] * CELLS).floor() + 0.5) / CELLS
    t, speed = InformationPath(process, window)(v, x0.shape[1])
    terms = nelbo(
        process, network_from_table(table, process.vocabulary), x0[sequence], scored[sequence],
        NodeTimes(t, speed, window), rng, torch.arange(len(sequence)), len(sequence),
    )  # fmt: skip
    shape = (len(x0), points, x0.shape[1])
    apart = NelboTerms(
        terms.closing.reshape(shape),
        terms.diffusion.reshape(shape),
        terms.decoding.reshape(shape),
        terms.noisy,
    )
    return apart, rng


def enumerate_terms(
    process: ForwardProcess, table: Table, x0: Tensor, scored: Tensor, window: Window
) -> dict[str, Moments]:
    """The moments of the three terms for x0 [n,L], from the formulas of the process alone.

    Each is the sum over all states of the scored positions of their probability times the term; the others hold their
    tokens at time 0. The closing term is queried at t = 1 and read at the end of the window.
    """
    length = x0.shape[1]
    v = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
    t, speed = InformationPath(process, window)(v, length)
    first = torch.full((1, length), window[0], dtype=torch.float64)
    last = torch.full((1, length), window[1], dtype=torch.float64)
    one = torch.ones_like(last)

    def closing(prediction: DenseDistribution, x: Tensor, z: Tensor, at: Tensor) -> Tensor:
        return process.closing_kl(prediction, x, torch.full_like(at, window[1]))

    prior = process.prior.log_prob.exp().expand(1, process.vocabulary.num_tokens, -1)
    return {
        "closing": _summed(
            process, table, x0, scored, last, one, prior.unsqueeze(1), closing, shown=one
        ),
        "diffusion": _summed(
            process, table, x0, scored, t, speed, _marginals(process, t), process.density
        ),
        "decoding": _summed(
            process, table, x0, scored, first, one, _marginals(process, first), process.decode_nll
        ),
    }


def _marginals(process: ForwardProcess, t: Tensor) -> Tensor:
    """[n,L,V,S] q_t(z|x) at t [n,L]."""
    found = likelihoods(process, t.reshape(-1))
    return found.reshape(*t.shape, *found.shape[1:])


def _summed(
    process: ForwardProcess,
    table: Table,
    x0: Tensor,
    scored: Tensor,
    t: Tensor,
    weight: Tensor,
    chances: Tensor,
    formula: Formula,
    shown: Tensor | None = None,
) -> Moments:
    """Moments of weight * formula at a node drawn evenly and states drawn from `chances`.

    t, weight [nodes,L], chances [nodes,1 or L,V,S]; `shown` [nodes,L] are the times that the network is told, t if None.
    """
    vocabulary, length = process.vocabulary, x0.shape[1]
    states = all_sequences(vocabulary.num_states, length)
    node, n, z = product(torch.arange(len(t)), torch.arange(len(x0)), torch.arange(len(states)))
    x, free, zt = x0[n], scored[n], states[z]
    position = torch.arange(length)
    own = chances.expand(-1, length, -1, -1)[node.unsqueeze(-1), position, x, zt]
    # a position that is not scored is in one state for sure: its token
    chance = torch.where(free, own, (zt == x).double()).prod(-1)
    kept = chance > 0
    node, n, x, free, zt, chance = (part[kept] for part in (node, n, x, free, zt, chance))
    told = torch.where(free, (t if shown is None else shown)[node], 0.0)
    log_p = table(zt, told)
    mean, square = torch.zeros(2, *x0.shape, dtype=torch.float64)
    total = torch.zeros_like(chance)
    for i in range(length):
        value = formula(DenseDistribution(log_p[:, i], vocabulary), x[:, i], zt[:, i], t[node, i])
        value = torch.where(free[:, i], weight[node, i] * value, 0.0)
        mean[:, i].index_add_(0, n, chance * value / len(t))
        square[:, i].index_add_(0, n, chance * value**2 / len(t))
        total += value
    return Moments(
        mean, square, torch.zeros(len(x0)).double().index_add_(0, n, chance * total**2 / len(t))
    )


@law("nelbo: every term has its expectation, with its own draws", tolerance=1.0)
def draws_of_the_bound(process: ForwardProcess, points: int = POINTS) -> Iterator[Gap]:
    """The closing, diffusion and decoding terms that `nelbo` draws have, one by one and position by position, the
    expectations of an enumeration over all states, on [0, 1] and on a window within; positions that are not scored keep
    their tokens and cost nothing; no channel of the noise serves two draws.

    The prediction depends on the other position. The error is in units of 0.5 % and two standard errors of as many random
    points, of which even points leave a half.
    """
    table = sensitive_table(process)
    last = process.vocabulary.num_tokens - 1
    x0 = torch.tensor([[0, last], [last, last // 2], [last // 2, 0]])
    scored = torch.tensor([[True, True], [True, True], [True, False]])
    position = torch.arange(x0.shape[1]).expand(x0.shape)
    process = replace_prior(process)
    for window in (WHOLE, half_information_window(process)):
        terms, rng = draw_terms(process, table, x0, scored, window, points)
        for name, (mean, square, square_of_sum) in enumerate_terms(
            process, table, x0, scored, window
        ).items():
            drawn = getattr(terms, name).mean(1)
            labels = {"term": name, "window": window}
            allowed = _allowed(mean, square, points)
            yield compare(drawn, mean, {**labels, "x0": x0, "position": position}, allowed)
            allowed = _allowed(mean.sum(), square_of_sum.sum(), points)
            yield compare(
                drawn.sum(), mean.sum(), {**labels, "summed over": "all sequences"}, allowed
            )
        for channel, count in rng.queries.items():
            yield compare(
                torch.tensor(count), 1.0, {"times that a channel of the noise is used": channel}
            )


def _allowed(mean: Tensor, square: Tensor, points: int) -> Tensor:
    """How far a mean of so many points may be from `mean`."""
    return 0.005 * mean + 2.0 * (square / points).sqrt() + EXACT
