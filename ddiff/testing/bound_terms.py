"""Law of the bound with its own random draws, against an enumeration that shares no code with it.

`bound.exact_nelbo` replaces the draws of the bound and multiplies their probabilities in, so it
cannot detect that a term draws from a wrong distribution. Here the process draws its own states,
from uniforms that cover the unit cube evenly.
"""

from __future__ import annotations

import copy
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
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
from ddiff.testing.probes import likelihoods, likelihoods_by_row, product, times
from ddiff.testing.report import Gap, compare, law

INNER_SHARES = (0.2, 0.6)  # shares of the information lost at the ends of the inner window
POINTS = 8192
DIMENSIONS = 64  # of the Sobol points; two positions with four uniforms use 2 + 3 * 8 + 2 * 2
CELLS = 128  # times of a window, each combined with POINTS / CELLS points
EXACT = 1e-9  # nats, tolerance for terms that are 0 or constant

Formula = Callable[[DenseDistribution, Tensor, Tensor, Tensor], Tensor]
"""(prediction, x0, zt, t) -> nats [r]."""


# ------------------------------------------------------------------ draws


class SobolRng(CounterRng):
    """Random generator that reads Sobol points: each channel uses dimensions of its own.

    A channel that is queried twice returns the same numbers twice, as in `CounterRng`; `queries`
    counts the queries. `point` [B] is the index below `points` of the point that a sequence reads.
    """

    def __init__(
        self,
        point: Tensor,
        points: int,
        length: int,
    ) -> None:
        super().__init__(0, 0, torch.arange(len(point)), length)
        sobol = torch.quasirandom.SobolEngine(DIMENSIONS).draw(points, dtype=torch.float64)
        # the first Sobol point is 0, the edge of every cell, so all are shifted by half a cell
        self.cube = (sobol + 0.5 / points)[point]
        self.first: dict[str, int] = {}
        self.used = 0
        self.queries: Counter[str] = Counter()

    def uniform(
        self,
        channel: str,
        count: int = 1,
    ) -> Tensor:
        self.queries[channel] += 1
        size = self.length * count
        if channel not in self.first:
            self.first[channel] = self.used
            self.used += size
        start = self.first[channel]
        # the same dimensions at every query of a channel
        drawn = self.cube[:, start : start + size].reshape(-1, self.length, count)
        return drawn.squeeze(-1) if count == 1 else drawn


class InformationPath:
    """Paths t_i(v) through the window along which the diffusion term varies little.

    With times even in t, or in logit t, the diffusion term of some processes is a rare and large
    number. With times at which the information I(X; Z_t) of a uniform X falls evenly, its mean
    hardly depends on the time. v covers that information from end to end, slowly at the ends, and
    `bent_path` makes the path of every position different.
    """

    def __init__(
        self,
        process: ForwardProcess,
        window: Window,
        nodes: int = 400,
    ) -> None:
        first, last = torch.logit(interior(times(window)))
        self.y = torch.linspace(
            float(first),
            float(last),
            nodes,
            dtype=torch.float64,
        )  # logit t
        q = likelihoods(process, torch.sigmoid(self.y)) / process.vocabulary.num_tokens
        # H(X | Z), which is the information up to its sign and a constant
        lost = torch.where(q > 0, q * (q.sum(1, keepdim=True) / q).log(), 0.0).sum((1, 2))
        # rounding near the ends must not reverse the path; a share of logit t keeps it increasing
        steps = lost.diff().clamp(min=0.0)
        steps = 0.98 * steps / steps.sum() + 0.02 / len(steps)
        self.tau = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])

    def __call__(
        self,
        v: Tensor,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        """Times [n,L] of every position when the window is at v [n] in [0,1], and dt_i/dv."""
        t = []
        speed = []
        for position in range(length):
            place, slope = bent_path(v, position)
            at_v, steepness = self._interpolate(place**2 * (3.0 - 2.0 * place) * self.tau[-1])
            t.append(at_v)
            # dt_i/dv, by the chain rule through logit t, tau and place
            dt_dtau = at_v * (1.0 - at_v) * steepness
            dt_dplace = dt_dtau * self.tau[-1] * 6.0 * place * (1.0 - place)
            speed.append(dt_dplace * slope)
        return torch.stack(t, -1), torch.stack(speed, -1)

    def _interpolate(
        self,
        tau: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """(t, d logit t / dtau) at tau [n], linear between the nodes."""
        cell = torch.searchsorted(self.tau, tau.contiguous(), right=True)
        right = cell.clamp(1, len(self.tau) - 1)
        left = right - 1
        steepness = (self.y[right] - self.y[left]) / (self.tau[right] - self.tau[left])
        t = torch.sigmoid(self.y[left] + (tau - self.tau[left]) * steepness)
        return t, steepness


def inner_information_window(process: ForwardProcess) -> Window:
    """Window over which 40 % of the information is lost, so that every term is large."""
    path = InformationPath(process, WHOLE)
    cell = torch.searchsorted(
        path.tau,
        times(INNER_SHARES) * path.tau[-1],
    )
    start, stop = torch.sigmoid(path.y[cell]).tolist()
    return start, stop


# ------------------------------------------------------------------ the case that is compared


def sensitive_table(process: ForwardProcess) -> Table:
    """Network for two positions whose predictions depend on state and time at every t <= 1.

    Up to a `latest` time it predicts the exact distribution of each token given the other
    position's state. An exact network ignores all states at t = 1 of a process that closes, and so
    would hide a wrong state there. Above `latest` this one reads states as of `latest` and predicts
    the flatter the later it is: a state that was drawn from x0 shows, and so does a wrong time.
    States that no token leads to count as no evidence.
    """
    latest = inner_information_window(process)[1]
    # the factor 0.5 keeps predictions far from certain, so that no term is tiny
    joint = (0.5 * random_joint(process.vocabulary.num_tokens)).exp()
    joint = joint / joint.sum()

    def table(zt: Tensor, t: Tensor) -> Tensor:
        distinct, place = t.clamp(max=latest).unique(return_inverse=True)
        evidence = likelihoods(process, distinct).transpose(1, 2)[place, zt]  # [B,2,V]
        evidence = torch.where(
            evidence.sum(-1, keepdim=True) > 0,
            evidence,
            1.0,
        )
        stacked = torch.stack(
            [evidence[:, 1] @ joint.T, evidence[:, 0] @ joint],
            1,
        )
        flatness = 1.0 - 0.5 * ((t - latest) / (1.0 - latest)).clamp(min=0.0)
        return (flatness.unsqueeze(-1) * stacked.log()).log_softmax(-1)

    return table


def replace_prior(process: ForwardProcess) -> ForwardProcess:
    """Copy a process with a prior that is not q_1: later states are likelier, all are possible.

    If the prior is q_1, a network that is given q_1(.|x0) in the closing term is right by accident.
    """
    twin = copy.copy(process)
    weights = torch.arange(1.0, process.vocabulary.num_states + 1.0).double()
    twin.prior = Prior(weights.log().log_softmax(-1))
    return twin


def draw_terms(
    process: ForwardProcess,
    table: Table,
    x0: Tensor,
    scored: Tensor,
    window: Window,
    points: int = POINTS,
) -> tuple[NelboTerms, SobolRng]:
    """Evaluate `nelbo` of x0 [n,L] at every Sobol point: terms [n,points,L], and the generator.

    Times lie on an `InformationPath`.
    """
    length = x0.shape[1]
    sequence, point = product(
        torch.arange(len(x0)),
        torch.arange(points),
    )
    # every sequence has points of its own, so that errors do not add up in their sum
    rng = SobolRng(
        sequence * points + point,
        len(x0) * points,
        length,
    )
    # the middle of one of CELLS cells, so that the enumeration can use the same times
    v = ((rng.uniform("time")[:, 0] * CELLS).floor() + 0.5) / CELLS
    t, speed = InformationPath(process, window)(v, length)
    terms = nelbo(
        process,
        network_from_table(table, process.vocabulary),
        x0[sequence],
        scored[sequence],
        NodeTimes(t, speed, window),
        rng,
        torch.arange(len(sequence)),
        len(sequence),
    )
    shape = (len(x0), points, length)
    closing = terms.closing.reshape(shape)
    diffusion = terms.diffusion.reshape(shape)
    decoding = terms.decoding.reshape(shape)
    return NelboTerms(closing, diffusion, decoding, terms.noisy), rng


# ------------------------------------------------------------------ enumeration


class Moments(NamedTuple):
    """Moments of a term in nats for n sequences.

    Its mean [n,L], the mean of its square [n,L], and the mean square of its sum over positions [n].
    """

    mean: Tensor
    square: Tensor
    square_of_sum: Tensor


class Enumeration:
    """Moments of the three terms for x0 [n,L], from the formulas of the process only.

    Each is the sum over all states of the scored positions of their probability times the term.
    Positions that are not scored keep their tokens at time 0.
    """

    def __init__(
        self, process: ForwardProcess, table: Table, x0: Tensor, scored: Tensor, window: Window
    ) -> None:
        self.process = process
        self.table = table
        self.x0 = x0
        self.scored = scored
        self.window = window

    def closing(self) -> Moments:
        """The network is queried at t = 1; the term is evaluated at the end of the window."""

        def formula(
            prediction: DenseDistribution,
            x: Tensor,
            z: Tensor,
            t: Tensor,
        ) -> Tensor:
            return self.process.closing_kl(
                prediction,
                x,
                torch.full_like(t, self.window[1]),
            )

        last = self._everywhere(self.window[1])
        one = torch.ones_like(last)
        prior = self.process.prior.log_prob.exp()
        probabilities = prior.expand(
            1,
            1,
            self.process.vocabulary.num_tokens,
            -1,
        )
        return self._moments(
            last,
            one,
            probabilities,
            formula,
            query_t=one,
        )

    def diffusion(self) -> Moments:
        v = (torch.arange(CELLS, dtype=torch.float64) + 0.5) / CELLS
        t, speed = InformationPath(self.process, self.window)(v, self.x0.shape[1])
        return self._moments(
            t,
            speed,
            self._marginals(t),
            self.process.density,
            query_t=t,
        )

    def decoding(self) -> Moments:
        first = self._everywhere(self.window[0])
        one = torch.ones_like(first)
        marginals = self._marginals(first)
        return self._moments(
            first,
            one,
            marginals,
            self.process.decode_nll,
            query_t=first,
        )

    def _everywhere(self, t: float) -> Tensor:
        """[1,L]"""
        return torch.full(
            (1, self.x0.shape[1]),
            t,
            dtype=torch.float64,
        )

    def _marginals(self, t: Tensor) -> Tensor:
        """q_t(z|x) [n,L,V,S] at t [n,L]."""
        q = likelihoods_by_row(self.process, t.reshape(-1))
        return q.reshape(*t.shape, *q.shape[1:])

    def _moments(
        self, t: Tensor, weight: Tensor, probabilities: Tensor, formula: Formula, query_t: Tensor
    ) -> Moments:
        """Moments of weight * formula at a node drawn evenly and states from `probabilities`.

        t, weight [nodes,L]; probabilities [nodes, 1 or L, V, S]; query_t [nodes,L], the times that
        the network is given.
        """
        vocabulary = self.process.vocabulary
        length = self.x0.shape[1]
        states = all_sequences(vocabulary.num_states, length)
        node, n, state = product(
            torch.arange(len(t)), torch.arange(len(self.x0)), torch.arange(len(states))
        )
        chance = self._chance(probabilities, node, n, states[state])
        possible = chance > 0
        node = node[possible]
        n = n[possible]
        chance = chance[possible]
        zt = states[state[possible]]
        x0 = self.x0[n]
        free = self.scored[n]
        log_p = self.table(
            zt,
            torch.where(free, query_t[node], 0.0),
        )
        mean = torch.zeros(self.x0.shape, dtype=torch.float64)
        square = torch.zeros_like(mean)
        total = torch.zeros_like(chance)
        for i in range(length):
            prediction = DenseDistribution(log_p[:, i], vocabulary)
            value = formula(
                prediction,
                x0[:, i],
                zt[:, i],
                t[node, i],
            )
            value = torch.where(
                free[:, i],
                weight[node, i] * value,
                0.0,
            )
            mean[:, i].index_add_(0, n, chance * value / len(t))
            square[:, i].index_add_(0, n, chance * value**2 / len(t))
            total += value
        square_of_sum = torch.zeros(len(self.x0), dtype=torch.float64)
        square_of_sum.index_add_(0, n, chance * total**2 / len(t))
        return Moments(mean, square, square_of_sum)

    def _chance(
        self,
        probabilities: Tensor,
        node: Tensor,
        n: Tensor,
        zt: Tensor,
    ) -> Tensor:
        """Probability [r] of the states zt [r,L] of sequence n [r] at a node [r]."""
        length = self.x0.shape[1]
        x0 = self.x0[n]
        position = torch.arange(length)
        by_position = probabilities.expand(-1, length, -1, -1)
        scored = by_position[node.unsqueeze(-1), position, x0, zt]
        # a position that is not scored holds its token with probability 1
        return torch.where(self.scored[n], scored, (zt == x0).double()).prod(-1)


# ------------------------------------------------------------------ the law


@law("nelbo: every drawn term has its exact expectation", tolerance=1.0)
def terms_have_their_expectations(
    process: ForwardProcess,
    points: int = POINTS,
) -> Iterator[Gap]:
    """Every term that `nelbo` draws has the expectation of an enumeration over all states.

    Closing, diffusion and decoding terms are compared one by one and position by position, on [0,
    1] and on a window within. Positions that are not scored keep their tokens and cost nothing. No
    channel of the random generator is used for two draws. The prediction depends on the other
    position. Tolerance: the unit of the error is 0.5 % plus two standard errors of as many random
    points; Sobol points use half of it.
    """
    table = sensitive_table(process)
    # first, middle and last token, at either position
    last = process.vocabulary.num_tokens - 1
    x0 = torch.tensor([[0, last], [last, last // 2], [last // 2, 0]])
    scored = torch.tensor([[True, True], [True, True], [True, False]])
    # a prior that is not q_1 exposes closing states that are drawn from q_1
    process = replace_prior(process)
    for window in (WHOLE, inner_information_window(process)):
        terms, rng = draw_terms(
            process,
            table,
            x0,
            scored,
            window,
            points,
        )
        exact = Enumeration(process, table, x0, scored, window)
        labels = {"window": window, "term": "closing"}
        yield from _moment_gaps(
            terms.closing,
            exact.closing(),
            x0,
            labels,
        )
        labels = {"window": window, "term": "diffusion"}
        yield from _moment_gaps(
            terms.diffusion,
            exact.diffusion(),
            x0,
            labels,
        )
        labels = {"window": window, "term": "decoding"}
        yield from _moment_gaps(
            terms.decoding,
            exact.decoding(),
            x0,
            labels,
        )
        for channel, count in rng.queries.items():
            label = {"times that a channel of the random generator is used": channel}
            yield compare(torch.tensor(count), 1.0, label)


def _moment_gaps(
    drawn: Tensor, exact: Moments, x0: Tensor, labels: Mapping[str, object]
) -> Iterator[Gap]:
    """Compare the mean of a drawn term [n,points,L] with its expectation, each and in sum."""
    points = drawn.shape[1]
    got = drawn.mean(1)
    position = torch.arange(x0.shape[1]).expand(x0.shape)
    allowed = _allowed(exact.mean, exact.square, points)
    yield compare(
        got,
        exact.mean,
        {**labels, "x0": x0, "position": position},
        relative_to=allowed,
    )
    total = exact.mean.sum()
    allowed = _allowed(
        total,
        exact.square_of_sum.sum(),
        points,
    )
    yield compare(
        got.sum(),
        total,
        {**labels, "summed over": "all sequences"},
        relative_to=allowed,
    )


def _allowed(
    mean: Tensor,
    square: Tensor,
    points: int,
) -> Tensor:
    """Largest accepted distance of a mean over `points` points from its expectation."""
    return 0.005 * mean + 2.0 * (square / points).sqrt() + EXACT
