"""Conformance checks of the likelihood bound (`ddiff.core.elbo.nelbo`) by exact expectations.

The bound is a sum of three terms for a window (t0, t1) of noise times:

- the decoding term -ln P(x | z_t0) for the states at the start of the window,
- the diffusion term, which is the integral of `ForwardProcess.density` over the window,
- the prior term KL( q_t1(.|x) || predicted q_t1 ) for the states at the end of the window.

`exact_nelbo` runs `nelbo` with enumerated states in place of random draws and with quadrature nodes
in place of random noise times. The result is the exact expectation of the estimate that training
and evaluation draw.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from ddiff.core.elbo import nelbo, network_from_table
from ddiff.core.information import TimeChange
from ddiff.core.numerics import EARLIEST, LATEST
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess, Prior
from ddiff.core.rng import CounterRng
from ddiff.core.times import Times
from ddiff.core.tree import TreeProcess
from ddiff.testing.probes import (
    certain_log_probs,
    likelihoods,
    likelihoods_by_row,
    logit_nodes,
    num_panels,
    product,
    random_log_probs,
    times,
    token_likelihoods,
)
from ddiff.testing.report import Gap, compare, law

Window = tuple[float, float]
Path = Callable[[Tensor, int], tuple[Tensor, Tensor]]
"""Function (v [n] in [0,1], position) -> (place, derivative of the place by v).

The place is logit t, rescaled to [0, 1] over the window of noise times."""
Table = Callable[[Tensor, Tensor], Tensor]
"""Network as a function: (zt [B,L], t [B,L]) -> log_p [B,L,V]."""

FINITE: tuple[Window, ...] = ((1e-3, 1.0 - 1e-3), (0.05, 0.9))
WHOLE: Window = (0.0, 1.0)
NODES = 10  # per panel
FEWER_NODES = 7  # for two positions, which have many states; the quadrature error is still 1e-11


# ------------------------------------------------------------------ enumeration in place of draws


class Expectation(NamedTuple):
    """Exact expectations [n] of the prior, diffusion and decoding terms of n clean sequences.

    The unit is nats. `closing` is the prior term.
    """

    closing: Tensor
    diffusion: Tensor
    decoding: Tensor

    @property
    def total(self) -> Tensor:
        return self.closing + self.diffusion + self.decoding


class NodeTimes:
    """Time rule that returns given noise times, the nodes of a quadrature.

    Args:
        t: [B,L] noise times.
        speed: [B,L] weights in the diffusion term, which include the quadrature weights.
        window: first and last noise time of every position.
    """

    def __init__(
        self,
        t: Tensor,
        speed: Tensor,
        window: Window,
    ) -> None:
        self.t = t
        self.speed = speed
        self.window = window

    def draw(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> Times:
        return Times(self.t, self.speed, self._nowhere())

    def ends(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> tuple[Times, Times]:
        first, last = self.window
        return self._at(first), self._at(last)

    def _at(self, t: float) -> Times:
        return Times(
            torch.full_like(self.t, t),
            torch.ones_like(self.t),
            self._nowhere(),
        )

    def _nowhere(self) -> Tensor:
        return torch.zeros_like(self.t, dtype=torch.bool)


CHANNELS = ("diffusion", "decoding", "prior")  # random channels that `nelbo` draws states from


class EnumeratedRng(CounterRng):
    """Random generator whose uniforms encode given states zt [B,L].

    State z of S states is encoded as the uniform (z + 0.5) / S. `enumerate_draws` makes a process
    that decodes the state from the uniform.

    Each term of the bound draws from a separate channel, which is a named stream of uniforms. In
    each channel, the states are shifted by the index of the channel, modulo S. A term that uses the
    channel of another term therefore gets states with wrong probabilities, which the checks detect.
    """

    def __init__(
        self,
        zt: Tensor,
        num_states: int,
    ) -> None:
        super().__init__(
            0,
            0,
            torch.arange(len(zt)),
            zt.shape[1],
        )
        self.zt = zt
        self.num_states = num_states

    def uniform(
        self,
        channel: str,
        count: int = 1,
    ) -> Tensor:
        states = shift_states(self.zt, channel, self.num_states)
        cells = (states.double() + 0.5) / self.num_states
        if count == 1:
            return cells
        return cells.unsqueeze(-1).expand(-1, -1, count)


def shift_states(
    zt: Tensor,
    channel: str,
    num_states: int,
) -> Tensor:
    """Return the states zt, shifted by the index of a channel modulo the number of states.

    `channel` is the name of a stream of uniforms of `EnumeratedRng`. The uniforms of this channel
    encode the shifted states.
    """
    shift = CHANNELS.index(channel) if channel in CHANNELS else len(CHANNELS)
    return (zt + shift) % num_states


class EnumeratedPrior(Prior):
    """Prior that maps a uniform u to the state floor((1 - u) S), for S states.

    The method `sample` of a process that `enumerate_draws` returns gives the state floor(u S)
    instead. A term that draws from the prior instead of the process, or from the process instead of
    the prior, therefore changes the bound.
    """

    def draw(self, u: Tensor) -> Tensor:
        return ((1.0 - u) * len(self.log_prob)).long()


def enumerate_draws(process: ForwardProcess) -> ForwardProcess:
    """Copy a process, so that draws of the copy return the state that a uniform u encodes.

    For S states, `sample` returns floor(u S), and `prior.draw` returns floor((1 - u) S).
    """
    states = process.vocabulary.num_states

    def sample(
        x0: Tensor,
        t: Tensor,
        u: Tensor,
    ) -> Tensor:
        return (u[:, 0] * states).long()

    twin = copy.copy(process)
    twin.sample = sample  # type: ignore[method-assign]
    twin.prior = EnumeratedPrior(process.prior.log_prob)
    return twin


def straight_path(
    v: Tensor,
    position: int,
) -> tuple[Tensor, Tensor]:
    """Return logit t and its derivative by v, for a path of times t(v) on which logit t is linear.

    v runs from 0 to 1, and logit t is rescaled so that the window of times is [0, 1]. The result is
    therefore (v, 1). All positions have the same time.
    """
    return v, torch.ones_like(v)


def bent_path(
    v: Tensor,
    position: int,
) -> tuple[Tensor, Tensor]:
    """Return logit t and d logit(t)/dv, for a path of times t(v) that depends on `position`.

    v runs from 0 to 1, and logit t is rescaled so that the window of times is [0, 1]. Even and odd
    positions have different times, except at the limits of the window, v = 0 and v = 1.
    """
    bend = 0.4 * (-1.0) ** position
    return v + bend * v * (1.0 - v), 1.0 + bend * (1.0 - 2.0 * v)


def all_sequences(count: int, length: int) -> Tensor:
    """Return all sequences of `length` ids below `count`, as a tensor [count^length, length]."""
    axes = [torch.arange(count)] * length
    return torch.cartesian_prod(*axes).reshape(-1, length)


def exact_nelbo(
    process: ForwardProcess,
    table: Table,
    length: int,
    window: Window,
    path: Path = straight_path,
    finer: int = 1,
) -> Expectation:
    """Return the exact expectations of the terms of `nelbo` for every sequence of tokens.

    The sequences are those of `all_sequences(V, length)`. For V tokens, S states and n quadrature
    nodes in time, the cost is O(n (V S)^length), so V, S and `length` must be small.

    Args:
        process: forward process.
        table: network, as a function (zt, t) -> log_p.
        length: number of positions of a sequence.
        window: first and last noise time.
        path: function that gives the noise time of each position at every v in [0,1].
        finer: factor on the number of quadrature nodes.
    """
    vocabulary = process.vocabulary
    order = NODES if length == 1 else FEWER_NODES
    v, _, weight = logit_nodes(
        *window,
        num_panels(*window, finer),
        order,
    )
    t, speed = _times_of_nodes(v, weight, window, length, path)
    sequences = all_sequences(vocabulary.num_tokens, length)
    states = all_sequences(vocabulary.num_states, length)
    node, sequence, state = product(
        torch.arange(len(v)), torch.arange(len(sequences)), torch.arange(len(states))
    )
    x0 = sequences[sequence]
    zt = states[state]
    probabilities = _probabilities(process, t, window, node, x0, zt)
    # the network is not evaluated on states of probability 0
    possible = sum(probabilities) > 0
    node = node[possible]
    x0 = x0[possible]
    zt = zt[possible]
    terms = nelbo(
        enumerate_draws(process),
        network_from_table(table, vocabulary),
        x0,
        torch.ones_like(x0, dtype=torch.bool),
        NodeTimes(t[node], speed[node], window),
        EnumeratedRng(zt, vocabulary.num_states),
        # every row has one slot; `NodeTimes` ignores slots
        torch.arange(len(node)),
        len(node),
    )
    parts = []
    for probability, term in zip(probabilities, (terms.closing, terms.diffusion, terms.decoding)):
        chance = probability[possible]
        # a term may be infinite in a state of probability 0, and 0 * inf is NaN
        weighted = torch.where(chance > 0, chance * term.sum(-1), 0.0)
        total = torch.zeros(len(sequences), dtype=torch.float64)
        parts.append(total.index_add(0, sequence[possible], weighted))
    return Expectation(*parts)


def _times_of_nodes(
    v: Tensor, weight: Tensor, window: Window, length: int, path: Path
) -> tuple[Tensor, Tensor]:
    """Return the noise times [n,L] and the speeds [n,L] at the quadrature nodes v [n].

    The speed of a position with noise time t is dt/dv times `weight`, the quadrature weight of the
    node. `path(v, position)` returns a number in [0,1], the place of logit t in the interval
    `window` of noise times, and its derivative.
    """
    # rates are evaluated at interior times only
    first, last = torch.logit(times((max(window[0], EARLIEST), min(window[1], LATEST))))
    t = []
    speed = []
    for position in range(length):
        place, slope = path(v, position)
        at_node = torch.sigmoid(first + place * (last - first))
        t.append(at_node)
        # dt/dv by the chain rule, times the weight of the node
        speed.append(at_node * (1.0 - at_node) * (last - first) * slope * weight)
    return torch.stack(t, -1), torch.stack(speed, -1)


def _probabilities(
    process: ForwardProcess, t: Tensor, window: Window, node: Tensor, x0: Tensor, zt: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the probabilities [B] of the states zt for the prior, diffusion and decoding terms.

    Row b of zt and x0 belongs to the quadrature node `node[b]`, which has the noise times
    `t[node[b]]`. `window` is (first noise time, last noise time). Only the diffusion term depends
    on the node. The probabilities for the prior and decoding terms are 0 at all nodes except node
    0, so that these terms are counted once.
    """
    states = process.vocabulary.num_states
    at_first_node = node == 0
    # EnumeratedPrior maps u to floor((1 - u) S)
    prior_states = states - 1 - shift_states(zt, "prior", states)
    closing = process.prior.log_prob.exp()[prior_states].prod(-1) * at_first_node
    decoded_states = shift_states(zt, "decoding", states)
    at_start = likelihoods(process, times((window[0],)))[0]
    decoding = at_start[x0, decoded_states].prod(-1) * at_first_node
    diffusion = torch.ones(len(node), dtype=torch.float64)
    for position in range(x0.shape[1]):
        marginal = likelihoods_by_row(process, t[:, position])  # [nodes,V,S]
        # positions are corrupted independently given x0
        diffusion = diffusion * marginal[node, x0[:, position], zt[:, position]]
    return closing, diffusion, decoding


# ------------------------------------------------------------------ constant predictions


@law("bound: -ln p(x) for a constant denoiser", tolerance=1e-9)
def constant_denoiser(
    process: ForwardProcess,
    finer: int = 1,
) -> Iterator[Gap]:
    """Check that the bound of a denoiser that always predicts p is -ln p(x) for every token x.

    For data with the distribution p, this prediction is exact, so the bound equals the negative
    log-likelihood on every window of noise times. On the window [0, 1], the quadrature omits times
    within 1e-12 of 0 and 1, and their contribution is added. `finer` is a factor on the number of
    quadrature nodes. Tolerance 1e-9: quadrature and rounding have an error of 1e-10.
    """
    num_tokens = process.vocabulary.num_tokens
    tokens = torch.arange(num_tokens)
    for log_p in random_log_probs(num_tokens, 2, seed=1):
        table = constant_table(log_p)
        for window in FINITE:
            total = exact_nelbo(process, table, 1, window, finer=finer).total
            yield compare(total, -log_p, {"x0": tokens, "window": window})
        total = exact_nelbo(process, table, 1, WHOLE, finer=finer).total
        total = total + _beyond_quadrature(process, log_p)
        yield compare(total, -log_p, {"x0": tokens, "window": WHOLE})


def constant_table(log_p: Tensor) -> Table:
    """Make a network that predicts the log-distribution log_p [V] for every state and time."""

    def table(zt: Tensor, t: Tensor) -> Tensor:
        return log_p.expand(*zt.shape, -1)

    return table


def _beyond_quadrature(process: ForwardProcess, log_p: Tensor) -> Tensor:
    """Return the contribution [V] of times within 1e-12 of 0 or 1 to the bound of each token.

    The network always predicts log_p [V]. The bound is equal on every window, so the contribution
    is the prior term plus the decoding term on the window [1e-12, 1 - 1e-12], minus both terms on
    the window [0, 1].
    """
    missing = _closing(process, log_p, LATEST) + _decoding(process, log_p, EARLIEST)
    if not process.closes_at_prior:
        missing = missing - _closing(process, log_p, 1.0)
    if not process.closes_at_clean:
        missing = missing - _decoding(process, log_p, 0.0)
    return missing


def _closing(
    process: ForwardProcess,
    log_p: Tensor,
    t: float,
) -> Tensor:
    """Return the prior term KL( q_t(.|x) || predicted q_t ) of every token x, as a tensor [V].

    The predicted q_t is the marginal at time t of a token with the log-distribution log_p [V].
    """
    tokens = torch.arange(process.vocabulary.num_tokens)
    prediction = DenseDistribution(
        log_p.expand(len(tokens), -1),
        process.vocabulary,
    )
    at_t = torch.full(tokens.shape, t, dtype=torch.float64)
    return ForwardProcess.closing_kl(process, prediction, tokens, at_t)


def _decoding(
    process: ForwardProcess,
    log_p: Tensor,
    t: float,
) -> Tensor:
    """Return the decoding term E[-ln P(x | z_t)] of every token x, as a tensor [V].

    The expectation is over z_t ~ q_t(.|x). P is the posterior if tokens have the log-distribution
    log_p [V].
    """
    p = log_p.exp().unsqueeze(-1)
    joint = p * likelihoods(process, times((t,)))[0]
    posterior = joint / joint.sum(0)
    chance = joint / p
    return torch.where(chance > 0, -chance * posterior.log(), 0.0).sum(-1)


# ------------------------------------------------------------------ two dependent positions


def random_joint(
    num_tokens: int,
    length: int = 2,
    seed: int = 4,
) -> Tensor:
    """Return random log-probabilities [V, ..., V] of all sequences of `length` tokens.

    The tokens of a sequence depend strongly on each other.
    """
    shape = (num_tokens,) * length
    generator = torch.Generator().manual_seed(seed)
    # 1.5 makes positions strongly dependent, as in text
    logits = 1.5 * torch.randn(shape, generator=generator, dtype=torch.float64)
    return logits - logits.logsumexp(tuple(range(length)))


def rest_conditional_table(process: ForwardProcess, log_joint: Tensor) -> Table:
    """Make a network for two positions that predicts each token given the other position's state.

    The prediction for position i is the exact P(x_i | z_j) for the joint distribution
    exp(log_joint), where z_j is the state of the other position. The prediction does not use the
    state z_i, as the formulas of the bound require. At t = 1 the prediction is the marginal
    distribution of x_i, as the prior term of the bound requires.
    """
    joint = log_joint.exp()

    def table(zt: Tensor, t: Tensor) -> Tensor:
        second = _evidence(process, zt[:, 1], t[:, 1])
        first = _evidence(process, zt[:, 0], t[:, 0])
        p = torch.stack([second @ joint.T, first @ joint], 1)
        return (p / p.sum(-1, keepdim=True)).log()

    return table


def _evidence(
    process: ForwardProcess,
    zt: Tensor,
    t: Tensor,
) -> Tensor:
    """Return q_t(z|x) [B,V] of the states zt [B] for every token x, and 1 at t = 1.

    With the value 1, the prediction of a network at t = 1 does not depend on the states.
    """
    evidence = token_likelihoods(process, zt, t)
    return torch.where((t < 1.0).unsqueeze(-1), evidence, 1.0)


@law("bound: entropy plus factorization cost for exact conditionals", tolerance=1e-8)
def entropy_equality(
    process: ForwardProcess,
    window: Window = (0.05, 0.9),
    denoiser: Callable[..., Table] = rest_conditional_table,
    finer: int = 1,
) -> Iterator[Gap]:
    """Check the expected bound of an exact network against the entropy of the data.

    X is a pair of tokens from a random joint distribution, Z_t its noisy state, and H the entropy.
    The network predicts the exact distribution of each token X_i given the state of the other
    position. On a window (t0, t1) of noise times, the expected bound must be H(X) + [sum_i
    H(X_i|Z_t0) - H(X|Z_t0)] + [sum_i H(Z_i,t1) - H(Z_t1)]. The brackets are the costs, at t0 and at
    t1, of predicting the two tokens independently. `denoiser` makes the network from the process
    and the joint distribution, and `finer` is a factor on the number of quadrature nodes. Tolerance
    1e-8: quadrature and rounding have an error of 1e-9.
    """
    log_joint = random_joint(process.vocabulary.num_tokens)
    terms = exact_nelbo(
        process,
        denoiser(process, log_joint),
        2,
        window,
        finer=finer,
    )
    got = _mean(log_joint, terms.total)
    yield compare(
        got,
        entropy_of_window(process, log_joint, window),
        {"window": window},
    )


@law("bound: unchanged if every position has its own time", tolerance=1e-8)
def speed_equality(
    process: ForwardProcess, window: Window = (0.05, 0.9), path: Path = bent_path, finer: int = 1
) -> Iterator[Gap]:
    """Check that the bound is unchanged if every position follows a separate path of noise times.

    Position i has the noise time t_i(v), where v runs from 0 to 1, and its integrand of the bound
    is multiplied by dt_i/dv. All paths have the same first and last time. The bound depends only on
    these two times (`window`), so it must equal the value for one common path. `path` gives the
    times, and `finer` is a factor on the number of quadrature nodes. Tolerance 1e-8: the quadrature
    has an error of 1e-9.
    """
    log_joint = random_joint(process.vocabulary.num_tokens)
    table = rest_conditional_table(process, log_joint)
    terms = exact_nelbo(process, table, 2, window, path, finer)
    got = _mean(log_joint, terms.total)
    yield compare(
        got,
        entropy_of_window(process, log_joint, window),
        {"window": window},
    )


def _mean(log_joint: Tensor, values: Tensor) -> Tensor:
    return (log_joint.exp().reshape(-1) * values).sum()


def entropy_of_window(
    process: ForwardProcess,
    log_joint: Tensor,
    window: Window,
) -> Tensor:
    """Return the bound on a window (t0, t1) that `entropy_equality` expects, in nats.

    The bound is H(X) + [sum_i H(X_i|Z_t0) - H(X|Z_t0)] + [sum_i H(Z_i,t1) - H(Z_t1)], where X is a
    pair of tokens with the log-probabilities `log_joint`, Z_t its noisy state, and H the entropy.
    """
    joint = log_joint.exp()
    early, late = likelihoods(process, times(window))
    # the joint distribution of tokens and states
    full = torch.einsum("ab,ai,bj->abij", joint, early, early)  # x_1, x_2, z_1, z_2 at t0
    first_given_z = _conditional_entropy(full.sum(1), (0,))
    second_given_z = _conditional_entropy(full.sum(0), (0,))
    decoding = first_given_z + second_given_z - _conditional_entropy(full, (0, 1))
    noisy = torch.einsum("ab,ai,bj->ij", joint, late, late)
    total = _entropy(joint) + decoding
    total = total + _entropy(noisy.sum(0)) + _entropy(noisy.sum(1))
    return total - _entropy(noisy)


def _entropy(p: Tensor) -> Tensor:
    return torch.where(p > 0, -p * p.log(), 0.0).sum()


def _conditional_entropy(
    p: Tensor,
    unknown: tuple[int, ...],
) -> Tensor:
    """Return the entropy of some axes of a joint distribution p, given its other axes.

    `unknown` lists the axes whose entropy is returned.
    """
    return _entropy(p) - _entropy(p.sum(unknown))


# ------------------------------------------------------------------ discrete steps


@law("bound: the bound over N discrete steps converges as O(1/N)", tolerance=1e-3)
def discrete_bound_converges(process: ForwardProcess) -> Iterator[Gap]:
    """Check that the bound over N discrete steps converges to the diffusion term as O(1/N).

    The diffusion term is the integral of `density` over the noise times. The discrete bound is
    sum_k E KL( q(z_s|z_t,x) || p(z_s|z_t) ), where step k leads from time t to time s, and p is the
    reverse step under the network's prediction. The limit for large N is extrapolated from N = 32,
    64, 128 and compared with the integral. The error is relative to the integral. The prediction
    depends on state and time, so the check fails if density and reverse step belong to different
    generators. Tolerance 1e-3: extrapolation removes the errors of order 1/N and 1/N^2, and leaves
    an error of order 1/N^3.
    """
    window = FINITE[1]
    table = state_and_time_table(process)
    integral = exact_nelbo(process, table, 1, window).diffusion
    coarse = _discrete_bound(process, table, window, 32)
    middle = _discrete_bound(process, table, window, 64)
    fine = _discrete_bound(process, table, window, 128)
    limit = (8.0 * fine - 6.0 * middle + coarse) / 3.0  # Richardson extrapolation, twice
    tokens = torch.arange(process.vocabulary.num_tokens)
    scale = integral.abs().clamp(min=1e-9)
    yield compare(
        limit,
        integral,
        {"x0": tokens, "window": window},
        relative_to=scale,
    )


def state_and_time_table(process: ForwardProcess) -> Table:
    """Make a network whose logits are linear in t, with random coefficients for each state."""
    generator = torch.Generator().manual_seed(6)
    shape = (2, process.vocabulary.num_states, process.vocabulary.num_tokens)
    level, slope = torch.randn(
        shape,
        generator=generator,
        dtype=torch.float64,
    )

    def table(zt: Tensor, t: Tensor) -> Tensor:
        return (level[zt] + slope[zt] * t.unsqueeze(-1)).log_softmax(-1)

    return table


def _discrete_bound(
    process: ForwardProcess,
    table: Table,
    window: Window,
    steps: int,
) -> Tensor:
    """Return the sum over discrete steps of E KL( true || predicted reverse step ), a tensor [V].

    The sum has one value per clean token. `table` is the network. The window is divided into
    `steps` steps of equal length in logit t.
    """
    vocabulary = process.vocabulary
    num_tokens = vocabulary.num_tokens
    first, last = torch.logit(times(window))
    # steps are even in logit t, so that they are short near both ends
    grid = torch.sigmoid(torch.linspace(float(first), float(last), steps + 1, dtype=torch.float64))
    step, x0, zt = product(
        torch.arange(steps), torch.arange(num_tokens), torch.arange(vocabulary.num_states)
    )
    chance = likelihoods(process, grid[1:])[step, x0, zt]
    possible = chance > 0
    step = step[possible]
    x0 = x0[possible]
    zt = zt[possible]
    s = grid[step]
    t = grid[step + 1]
    truth = process.reverse_log_probs(
        certain_log_probs(num_tokens)[x0],
        zt,
        t,
        s,
    )
    log_p = table(zt.unsqueeze(1), t.unsqueeze(1)).squeeze(1)
    model = process.reverse_log_probs(log_p, zt, t, s)
    # states of probability 0 given the true token contribute 0
    kl = torch.where(truth.isfinite(), truth.exp() * (truth - model), 0.0).sum(-1)
    total = torch.zeros(num_tokens, dtype=torch.float64)
    return total.index_add(0, x0, chance[possible] * kl)


# ------------------------------------------------------------------ trees


@law("weights: the expected weight of a level = the flow into it", tolerance=1e-8)
def weights_are_level_flows(
    process: ForwardProcess, windows: Sequence[Window] = FINITE
) -> Iterator[Gap]:
    """Check that a level's expected weight integrates to the probability of entering the level.

    The check applies to tree processes. The integrand of the bound is weight * divergence. The
    expected weight of a level is the sum of probability * weight over its states. F_l(t) is the
    probability of having reached level l by time t. The integral of the expected weight of level l
    over a window (t0, t1) must be F_l(t1) - F_l(t0), the probability that a token enters level l
    within the window. Tolerance 1e-8: the quadrature has an error of 1e-9.
    """
    if not isinstance(process, TreeProcess):
        return
    vocabulary = process.vocabulary
    for window in windows:
        # level 0 is never entered
        flow = _expected_weight_by_level(process, window)[:, 1:]
        start, stop = process.clock.cdf(times(window))
        levels = torch.arange(1, vocabulary.num_levels + 1).expand(vocabulary.num_tokens, -1)
        expected = (stop - start).expand_as(flow)
        yield compare(flow, expected, {"level": levels, "window": window})


def _expected_weight_by_level(process: TreeProcess, window: Window) -> Tensor:
    """Integrate E[ weight(z_t) 1[level of z_t is l] ] over the window of times, for each level l.

    The weight is the factor of a state in the bound (`TreeProcess.weight`). Returns a tensor
    [V, levels + 1] with one row for each of the V clean tokens.
    """
    vocabulary = process.vocabulary
    num_tokens = vocabulary.num_tokens
    v, y, node_weight = logit_nodes(*window, num_panels(*window))
    node, x0, zt = product(
        torch.arange(len(v)), torch.arange(num_tokens), torch.arange(vocabulary.num_states)
    )
    t = torch.sigmoid(y)
    logit_width = torch.logit(times(window)) @ times((-1.0, 1.0))
    dt = t * (1.0 - t) * logit_width * node_weight
    chance = likelihoods(process, t)[node, x0, zt]
    weight = process.weight(x0, zt, t[node])
    charged = torch.where(
        chance > 0,
        chance * weight * dt[node],
        0.0,
    )
    flow = torch.zeros(
        num_tokens,
        vocabulary.num_levels + 1,
        dtype=torch.float64,
    )
    return flow.index_put_(
        (x0, vocabulary.level_of(zt)),
        charged,
        accumulate=True,
    )
