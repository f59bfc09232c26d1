"""Check the likelihood bound with random draws against an independent enumeration.

`bound.exact_nelbo` replaces the random draws of `nelbo` by enumerated states. It therefore cannot
detect a term that draws states from a wrong distribution. In this module, the process draws its
states from Sobol points, which are uniforms that cover the unit cube evenly. The expected values
are computed by enumeration, without `nelbo`.
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

INNER_SHARES = (0.2, 0.6)  # fractions of the information lost at the ends of the inner window
POINTS = 8192
DIMENSIONS = 64  # of the Sobol points; two positions with four uniforms use 2 + 3 * 8 + 2 * 2
CELLS = 128  # times of a window, each combined with POINTS / CELLS points
EXACT = 1e-9  # nats, tolerance for terms that are 0 or constant

Formula = Callable[[DenseDistribution, Tensor, Tensor, Tensor], Tensor]
"""Term of the bound, as a function (prediction, x0, zt, t) -> nats [r]."""


# ------------------------------------------------------------------ draws


class SobolRng(CounterRng):
    """Random generator that returns Sobol points, with separate dimensions for each channel.

    A channel is a named stream of uniforms. If a channel is queried twice, it returns the same
    numbers twice, as in `CounterRng`. `self.queries` counts the queries of each channel.

    Args:
        point: [B] index of the Sobol point of each sequence, below `points`.
        points: number of Sobol points.
        length: number of positions of a sequence.
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
        # every query of a channel uses the same dimensions
        drawn = self.cube[:, start : start + size].reshape(-1, self.length, count)
        return drawn.squeeze(-1) if count == 1 else drawn


class InformationPath:
    """Paths of noise times along which the diffusion term of the bound varies little.

    With times that are uniform in t or logit t, the diffusion term of some processes is large only
    for a small fraction of the times. The estimate of its mean is then inaccurate. The mean hardly
    depends on tau, the fraction of the information I(X; Z_t) that is lost at time t, where Z_t is
    the noisy state of a uniform token X. These paths therefore move evenly in tau, and more slowly
    near the ends of the window.

    The noise time of position i is t_i(v), where v runs from 0 to 1. Even and odd positions have
    different paths (see `bent_path`).

    Args:
        process: forward process.
        window: first and last noise time.
        nodes: number of noise times at which the information is computed.
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
        # this is H(X | Z), which is a constant minus the information
        lost = torch.where(q > 0, q * (q.sum(1, keepdim=True) / q).log(), 0.0).sum((1, 2))
        # a term in logit t keeps the path increasing in spite of rounding near the ends
        steps = lost.diff().clamp(min=0.0)
        steps = 0.98 * steps / steps.sum() + 0.02 / len(steps)
        self.tau = torch.cat([torch.zeros(1, dtype=torch.float64), steps.cumsum(0)])

    def __call__(
        self,
        v: Tensor,
        length: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the noise times t_i(v) and the derivatives dt_i/dv of all positions i, [n,L] each.

        `v` [n] are places on the path, from 0 (its start) to 1 (its end), and `length` is the
        number L of positions.
        """
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
        """Return t [n] and d logit t / dtau [n] at tau [n], by interpolation in a table.

        tau is the fraction of the information that is lost since the start of the window. logit t
        is linear in tau between two entries of the table.
        """
        cell = torch.searchsorted(self.tau, tau.contiguous(), right=True)
        right = cell.clamp(1, len(self.tau) - 1)
        left = right - 1
        steepness = (self.y[right] - self.y[left]) / (self.tau[right] - self.tau[left])
        t = torch.sigmoid(self.y[left] + (tau - self.tau[left]) * steepness)
        return t, steepness


def inner_information_window(process: ForwardProcess) -> Window:
    """Return a window of noise times over which 40 % of the information is lost.

    The information is the mutual information of a uniform token and its noisy state. On this
    window, all three terms of the bound are large.
    """
    path = InformationPath(process, WHOLE)
    cell = torch.searchsorted(
        path.tau,
        times(INNER_SHARES) * path.tau[-1],
    )
    start, stop = torch.sigmoid(path.y[cell]).tolist()
    return start, stop


# ------------------------------------------------------------------ network, prior and times


def sensitive_table(process: ForwardProcess) -> Table:
    """Make a network for two positions whose predictions depend on states and times at all t <= 1.

    Up to a time `latest` < 1, the network predicts the exact distribution of each token given the
    state of the other position. Above `latest`, the network treats states as if they were at time
    `latest`, and the predicted distribution becomes flatter with time.

    An exact network would ignore all states at t = 1 if q_1 equals the prior. The conformance check
    could then not detect a wrong state at t = 1. A state that cannot occur does not change the
    prediction.
    """
    latest = inner_information_window(process)[1]
    # the factor 0.5 flattens the joint, so that no term is tiny
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
    """Copy a process and replace its prior by one that differs from q_1, the marginal at t = 1.

    With a prior equal to q_1, the check could not detect a prior term that draws states from
    q_1(.|x0) instead of the prior. In the new prior, every state has a positive probability, which
    increases with the id of the state.
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
    """Evaluate `nelbo` of n sequences x0 [n,L] at every Sobol point.

    The noise times lie on an `InformationPath`.

    Args:
        process: forward process.
        table: network, as a function (zt, t) -> log_p.
        x0: [n,L] clean tokens.
        scored: bool [n,L]; positions that are not scored stay clean and add nothing to the bound.
        window: first and last noise time.
        points: number of Sobol points for each sequence.

    Returns:
        - the terms of the bound, a tensor [n,points,L] for each,
        - the random generator, which has counted the draws of each channel (random stream).
    """
    length = x0.shape[1]
    sequence, point = product(
        torch.arange(len(x0)),
        torch.arange(points),
    )
    # every sequence has separate points, so that errors do not add up over sequences
    rng = SobolRng(
        sequence * points + point,
        len(x0) * points,
        length,
    )
    # v is the middle of one of CELLS cells, so that the enumeration can use the same times
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
    """Moments of a term of the bound, in nats, for n sequences.

    Attributes:
        mean: [n,L] mean of the term at each position.
        square: [n,L] mean of the squared term at each position.
        square_of_sum: [n] mean of the squared sum of the term over the positions.
    """

    mean: Tensor
    square: Tensor
    square_of_sum: Tensor


class Enumeration:
    """Exact moments of the three terms of the bound for sequences x0 [n,L].

    A moment is the expectation of a term, or of its square, over all states of the scored
    positions. It is computed from the formulas of the process. Positions that are not scored keep
    their tokens and have noise time 0.

    Args:
        process: forward process.
        table: network, as a function (zt, t) -> log_p.
        x0: [n,L] clean tokens.
        scored: bool [n,L], True at positions that add to the bound.
        window: first and last noise time.
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
        """Return means of the prior term KL( q_t1(.|x) || predicted q_t1 ) and of its square.

        t1 is the last noise time (`window[1]`). The network makes its prediction at t = 1, for
        states from the prior.
        """

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
        """Return a tensor [1,L] with the time t at every position."""
        return torch.full(
            (1, self.x0.shape[1]),
            t,
            dtype=torch.float64,
        )

    def _marginals(self, t: Tensor) -> Tensor:
        """Return the marginals q_t(z|x) [n,L,V,S] at times t [n,L].

        There are V tokens x and S states z, and n sequences of L positions.
        """
        q = likelihoods_by_row(self.process, t.reshape(-1))
        return q.reshape(*t.shape, *q.shape[1:])

    def _moments(
        self, t: Tensor, weight: Tensor, probabilities: Tensor, formula: Formula, query_t: Tensor
    ) -> Moments:
        """Return the moments of weight * formula over quadrature nodes and states.

        All quadrature nodes have the same probability.

        Args:
            t: [nodes,L] noise times passed to the formula.
            weight: [nodes,L] factor on the formula.
            probabilities: [nodes, 1 or L, V, S] probability of each of S states given each of V
                tokens.
            formula: term of the bound, as a function (prediction, x0, zt, t) -> nats.
            query_t: [nodes,L] noise times passed to the network.
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
        """Return the probability [r] of the L states in each row of zt [r,L].

        Args:
            probabilities: [nodes, 1 or L, V, S] probability of each state given each token.
            node: [r] quadrature node of each row.
            n: [r] index of the sequence of each row.
            zt: [r,L] states.
        """
        length = self.x0.shape[1]
        x0 = self.x0[n]
        position = torch.arange(length)
        by_position = probabilities.expand(-1, length, -1, -1)
        scored = by_position[node.unsqueeze(-1), position, x0, zt]
        # a position that is not scored keeps its token with probability 1
        return torch.where(self.scored[n], scored, (zt == x0).double()).prod(-1)


# ------------------------------------------------------------------ the law


@law("nelbo: every drawn term has its exact expectation", tolerance=1.0)
def terms_have_their_expectations(
    process: ForwardProcess,
    points: int = POINTS,
) -> Iterator[Gap]:
    """Check that every term of `nelbo` with random draws has its exact expectation.

    The expectation is computed by enumeration over all states. The prior, diffusion and decoding
    terms are compared separately at each position, on the window [0, 1] of noise times and on a
    window inside it. At positions that are not scored, the tokens must stay unchanged and the terms
    must be 0. Each channel (named stream of uniforms) of the random generator must be used for one
    draw only. The mean of a term is estimated from `points` Sobol points. Its error is divided by
    the allowed error: 0.5 % of the term, plus two standard errors of a mean over the same number of
    random points. Tolerance 1: means over Sobol points reach about half of the allowed error.
    """
    table = sensitive_table(process)
    # the sequences have the first, middle and last token at either position
    last = process.vocabulary.num_tokens - 1
    x0 = torch.tensor([[0, last], [last, last // 2], [last // 2, 0]])
    scored = torch.tensor([[True, True], [True, True], [True, False]])
    # a prior that differs from q_1 exposes a prior term that draws states from q_1
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
            label = {"number of draws from the random channel": channel}
            yield compare(torch.tensor(count), 1.0, label)


def _moment_gaps(
    drawn: Tensor, exact: Moments, x0: Tensor, labels: Mapping[str, object]
) -> Iterator[Gap]:
    """Compare the mean of a drawn term over Sobol points with its exact expectation.

    `drawn` [n,points,L] holds the term at each point, for n sequences of L positions.

    Means are compared at each position of each sequence, and in the sum over all sequences. `x0`
    and `labels` describe the place of a difference in the report.
    """
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
    """Return the largest accepted error of a mean over `points` Sobol points.

    `mean` and `square` are the exact means of the estimated quantity and of its square.
    """
    return 0.005 * mean + 2.0 * (square / points).sqrt() + EXACT
