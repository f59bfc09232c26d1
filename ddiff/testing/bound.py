"""Laws of the bound as it is assembled by `core.elbo.nelbo`: every expectation is enumerated, every integral a quadrature.

`exact_nelbo` runs the real assembly with the states themselves in place of noise and quadrature nodes in place of drawn
times, so that what it returns is the exact expectation of what training and evaluation estimate.
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
    logit_nodes,
    num_panels,
    product,
    random_log_probs,
    times,
)
from ddiff.testing.report import Gap, compare, law

Window = tuple[float, float]
Path = Callable[
    [Tensor, int], tuple[Tensor, Tensor]
]  # v in [0,1], position -> place in logit t, its derivative
Table = Callable[[Tensor, Tensor], Tensor]  # (zt [B,L], t [B,L]) -> log_p [B,L,V]
FINITE: tuple[Window, ...] = ((1e-3, 1.0 - 1e-3), (0.05, 0.9))
WHOLE: Window = (0.0, 1.0)
NODES, FEWER_NODES = 10, 7  # per panel; with two positions states are many, and seven leave 1e-11


class Expectation(NamedTuple):
    """Exact expectations of the three terms for every clean sequence x0 [n,L], [n] nats each."""

    closing: Tensor
    diffusion: Tensor
    decoding: Tensor

    @property
    def total(self) -> Tensor:
        return self.closing + self.diffusion + self.decoding


class NodeTimes:
    """A time rule that gives quadrature nodes in t itself, whatever the clock: t, speed [B,L], and the window's ends."""

    def __init__(self, t: Tensor, speed: Tensor, window: Window) -> None:
        self.t, self.speed, self.window = t, speed, window

    def draw(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> Times:
        return Times(self.t, self.speed, torch.zeros_like(self.t, dtype=torch.bool))

    def ends(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> tuple[Times, Times]:
        first, last = (torch.full_like(self.t, end) for end in self.window)
        ones, clean = torch.ones_like(self.t), torch.zeros_like(self.t, dtype=torch.bool)
        return Times(first, ones, clean), Times(last, ones, clean)


CHANNELS = (
    "diffusion",
    "decoding",
    "prior",
)  # each is read off cells of its own; "closing" is never drawn from here


class EnumeratedRng(CounterRng):
    """Each channel gives the middle of the cell (state, state + 1) / S, for `enumerated` processes to read back.

    The state is zt shifted by the place of the channel among CHANNELS: still every state once, but a term that reads the
    channel of another is shown states that its probabilities do not belong to.
    """

    def __init__(self, zt: Tensor, num_states: int) -> None:
        super().__init__(0, 0, torch.arange(len(zt)), zt.shape[1])
        self.zt, self.num_states = zt, num_states

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        cells = (shift_states(self.zt, channel, self.num_states).double() + 0.5) / self.num_states
        return cells if count == 1 else cells.unsqueeze(-1).expand(-1, -1, count)


def shift_states(zt: Tensor, channel: str, num_states: int) -> Tensor:
    """The states that a channel gives where zt are enumerated."""
    place = CHANNELS.index(channel) if channel in CHANNELS else len(CHANNELS)
    return (zt + place) % num_states


class EnumeratedPrior(Prior):
    """Reads states off the uniforms from above: a prior that is drawn in place of a sample, or the other way, shows."""

    def draw(self, u: Tensor) -> Tensor:
        return ((1.0 - u) * len(self.log_prob)).long()


def enumerate_draws(process: ForwardProcess) -> ForwardProcess:
    """The same process, except that its draws are read off the uniforms: state = floor(u S)."""
    twin = copy.copy(process)
    states = process.vocabulary.num_states
    twin.sample = lambda x0, t, u: (u[:, 0] * states).long()  # type: ignore[method-assign]
    twin.prior = EnumeratedPrior(process.prior.log_prob)
    return twin


def straight_path(v: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """The path that every position shares: its place between the ends of logit t, and the derivative."""
    return v, torch.ones_like(v)


def bent_path(v: Tensor, position: int) -> tuple[Tensor, Tensor]:
    """A path of its own for every position, between the same ends: t_i = f_i(tau)."""
    bend = 0.4 * (-1.0) ** position
    return v + bend * v * (1.0 - v), 1.0 + bend * (1.0 - 2.0 * v)


def exact_nelbo(
    process: ForwardProcess,
    table: Table,
    length: int,
    window: Window,
    path: Path = straight_path,
    finer: int = 1,
) -> Expectation:
    """Exact expectations of `nelbo` for every sequence of `length` words, in the order of `torch.cartesian_prod`.

    Cost O(nodes (V S)^length): for toys. `path` says where position i is when the window is at v in [0,1]; `finer`
    multiplies the nodes.
    """
    vocabulary = process.vocabulary
    v, _, width = logit_nodes(
        *window, num_panels(*window, finer), NODES if length == 1 else FEWER_NODES
    )
    t, speed = _nodes(v, width, window, length, path)  # [n,L]
    sequences = all_sequences(vocabulary.num_tokens, length)
    states = all_sequences(vocabulary.num_states, length)
    node, x, z = product(
        torch.arange(len(v)), torch.arange(len(sequences)), torch.arange(len(states))
    )
    x0, zt = sequences[x], states[z]
    chances = _chances(process, t, window, node, x0, zt)
    kept = sum(chances) > 0
    node, x, x0, zt = node[kept], x[kept], x0[kept], zt[kept]
    rule = NodeTimes(t[node], speed[node], window)
    slot = torch.arange(len(node))
    terms = nelbo(
        enumerate_draws(process), network_from_table(table, vocabulary), x0, torch.ones_like(x0, dtype=torch.bool), rule,
        EnumeratedRng(zt, vocabulary.num_states), slot, len(slot),
    )  # fmt: skip
    parts = []
    for chance, term in zip(chances, (terms.closing, terms.diffusion, terms.decoding)):
        weighted = torch.where(chance[kept] > 0, chance[kept] * term.sum(-1), 0.0)
        parts.append(torch.zeros(len(sequences), dtype=torch.float64).index_add(0, x, weighted))
    return Expectation(*parts)


def all_sequences(count: int, length: int) -> Tensor:
    """[count^length, length] every sequence."""
    return torch.cartesian_prod(*[torch.arange(count)] * length).reshape(-1, length)


def _nodes(
    v: Tensor, width: Tensor, window: Window, length: int, path: Path
) -> tuple[Tensor, Tensor]:
    """[n,L] times of every position at every node, and dt_i dv."""
    first, last = torch.logit(times((max(window[0], EARLIEST), min(window[1], LATEST))))
    t, speed = [], []
    for position in range(length):
        place, slope = path(v, position)
        here = torch.sigmoid(first + place * (last - first))
        t.append(here)
        speed.append(here * (1.0 - here) * (last - first) * slope * width)
    return torch.stack(t, -1), torch.stack(speed, -1)


def _chances(
    process: ForwardProcess, t: Tensor, window: Window, node: Tensor, x0: Tensor, zt: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Probabilities [B] under the prior, q_t and q_{t0} of what each term is shown; what does not depend on the node is
    counted once."""
    length, once = x0.shape[1], node == 0
    states = process.vocabulary.num_states
    started = states - 1 - shift_states(zt, "prior", states)
    decoded = shift_states(zt, "decoding", states)
    prior = process.prior.log_prob.exp()[started].prod(-1) * once
    first = likelihoods(process, times((window[0],)))[0][x0, decoded].prod(-1) * once
    along = torch.ones(len(node), dtype=torch.float64)
    for position in range(length):
        distinct, place = t[:, position].unique(return_inverse=True)
        along = (
            along * likelihoods(process, distinct)[place[node], x0[:, position], zt[:, position]]
        )
    return prior, along, first


@law("constant denoiser: bound = -ln p(x)", tolerance=1e-9)
def constant_denoiser(process: ForwardProcess, finer: int = 1) -> Iterator[Gap]:
    """A denoiser that always says p makes the reverse chain the exact reversal for data of law p: NELBO(x) = -ln p(x) for
    every word, on any window. Quadrature and rounding leave 1e-10.

    On [0, 1] the window reaches to 1e-12 from the ends; what is owed beyond is added.
    """
    num_tokens = process.vocabulary.num_tokens
    words = torch.arange(num_tokens)
    for log_p in random_log_probs(num_tokens, 2, seed=1):
        table = constant_table(log_p)
        for window in FINITE:
            yield compare(
                exact_nelbo(process, table, 1, window, finer=finer).total,
                -log_p,
                {"x0": words, "window": window},
            )
        total = exact_nelbo(process, table, 1, WHOLE, finer=finer).total + _beyond(process, log_p)
        yield compare(total, -log_p, {"x0": words, "window": WHOLE})


def constant_table(log_p: Tensor) -> Table:
    return lambda zt, t: log_p.expand(*zt.shape, -1)


def _beyond(process: ForwardProcess, log_p: Tensor) -> Tensor:
    """[V] what is still owed within 1e-12 of the ends, where quadrature does not go: the end terms there, less those at
    the ends themselves."""
    words = torch.arange(process.vocabulary.num_tokens)
    prediction = DenseDistribution(log_p.expand(len(words), -1), process.vocabulary)

    def closing(t: float) -> Tensor:
        return ForwardProcess.closing_kl(
            process, prediction, words, torch.full(words.shape, t, dtype=torch.float64)
        )

    def decoding(t: float) -> Tensor:
        joint = log_p.exp().unsqueeze(-1) * likelihoods(process, times((t,)))[0]
        posterior, chance = joint / joint.sum(0), joint / log_p.exp().unsqueeze(-1)
        return torch.where(chance > 0, -chance * posterior.log(), 0.0).sum(-1)

    owed = closing(LATEST) + decoding(EARLIEST)
    owed = owed if process.closes_at_prior else owed - closing(1.0)
    return owed if process.closes_at_clean else owed - decoding(0.0)


def random_joint(num_tokens: int, length: int = 2, seed: int = 4) -> Tensor:
    """[V, ..., V] log-probabilities of sequences whose positions depend on each other strongly."""
    shape = (num_tokens,) * length
    logits = 1.5 * torch.randn(
        shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64
    )
    return logits - logits.logsumexp(tuple(range(length)))


def rest_conditional_table(process: ForwardProcess, log_joint: Tensor) -> Table:
    """The exact law of each of two positions given the other's state: P(x_i | z_j), own evidence excluded.

    At t = 1 it is the law before anything was said, which is what the closing term asks for.
    """
    joint = log_joint.exp()

    def table(zt: Tensor, t: Tensor) -> Tensor:
        laws = []
        for position in (0, 1):
            other = 1 - position
            evidence = _evidence(process, zt[:, other], t[:, other])  # [B,V] over the other's word
            evidence = torch.where((t[:, other] < 1.0).unsqueeze(-1), evidence, 1.0)
            laws.append(evidence @ (joint.T if position == 0 else joint))
        stacked = torch.stack(laws, 1)
        return (stacked / stacked.sum(-1, keepdim=True)).log()

    return table


def full_conditional_table(process: ForwardProcess, log_joint: Tensor) -> Table:
    """The exact law given ALL states, own evidence included: what the bound's formulas must not be given."""
    rest = rest_conditional_table(process, log_joint)

    def table(zt: Tensor, t: Tensor) -> Tensor:
        own = torch.stack([_evidence(process, zt[:, i], t[:, i]) for i in (0, 1)], 1)
        own = torch.where((t < 1.0).unsqueeze(-1), own, 1.0)
        return (rest(zt, t) + own.log()).log_softmax(-1)

    return table


def _evidence(process: ForwardProcess, zt: Tensor, t: Tensor) -> Tensor:
    """[B,V] q_t(z|x) over words x, from the marginal; each distinct time is computed once."""
    distinct, place = t.unique(return_inverse=True)
    return likelihoods(process, distinct)[place, :, zt]


@law("entropy: bound with exact conditionals = entropy + what factorising costs", tolerance=1e-8)
def entropy_equality(
    process: ForwardProcess,
    window: Window = (0.05, 0.9),
    denoiser: Callable[..., Table] = rest_conditional_table,
    finer: int = 1,
) -> Iterator[Gap]:
    """With the exact law of each position given the REST, for a random joint of two positions,
    E NELBO - H(X) = [sum_i H(X_i|Z_t0) - H(X|Z_t0)] + [sum_i H(Z_i,t1) - H(Z_t1)], on any window.

    Quadrature of a smooth integrand and rounding of logarithms leave 1e-9.
    """
    log_joint = random_joint(process.vocabulary.num_tokens)
    terms = exact_nelbo(process, denoiser(process, log_joint), 2, window, finer=finer)
    yield compare(
        _mean(log_joint, terms.total),
        entropy_of_window(process, log_joint, window),
        {"window": window},
    )


@law("speed: positions with times of their own", tolerance=1e-8)
def speed_equality(
    process: ForwardProcess, window: Window = (0.05, 0.9), path: Path = bent_path, finer: int = 1
) -> Iterator[Gap]:
    """Each position runs its own path t_i = f_i(tau) between the same ends. With the factor dt_i/dtau the bound is what it
    is on the common path, because only the ends matter. Quadrature leaves 1e-9."""
    log_joint = random_joint(process.vocabulary.num_tokens)
    terms = exact_nelbo(process, rest_conditional_table(process, log_joint), 2, window, path, finer)
    yield compare(
        _mean(log_joint, terms.total),
        entropy_of_window(process, log_joint, window),
        {"window": window},
    )


def _mean(log_joint: Tensor, values: Tensor) -> Tensor:
    return (log_joint.exp().reshape(-1) * values).sum()


def entropy_of_window(process: ForwardProcess, log_joint: Tensor, window: Window) -> Tensor:
    """H(X) + [sum_i H(X_i|Z_t0) - H(X|Z_t0)] + [sum_i H(Z_i,t1) - H(Z_t1)] in nats, by enumeration."""
    joint = log_joint.exp()
    early, late = likelihoods(process, times(window))
    full = torch.einsum("ab,ai,bj->abij", joint, early, early)
    start = (
        _conditional(full.sum(1), (0,))
        + _conditional(full.sum(0), (0,))
        - _conditional(full, (0, 1))
    )
    noisy = torch.einsum("ab,ai,bj->ij", joint, late, late)
    return (
        _entropy(joint) + start + _entropy(noisy.sum(0)) + _entropy(noisy.sum(1)) - _entropy(noisy)
    )


def _entropy(p: Tensor) -> Tensor:
    return torch.where(p > 0, -p * p.log(), 0.0).sum()


def _conditional(p: Tensor, unknown: tuple[int, ...]) -> Tensor:
    """H(unknown axes | the others)."""
    return _entropy(p) - _entropy(p.sum(unknown))


@law("discrete steps: their bound reaches the integral at O(1/N)", tolerance=1e-3)
def discrete_bound_converges(process: ForwardProcess) -> Iterator[Gap]:
    """sum_k E KL( q(z_s|z_t,x) || reverse(z_s|z_t,law) ) over N steps differs from the integral of the density by
    c/N + d/N^2 + ...; what remains at N = 32, 64, 128 after removing both is of order (c/N)^3. Relative, down to 1e-9 nats.

    The law depends on state and time, so density and reverse step must belong to the same generator.
    """
    window = FINITE[1]
    table = state_and_time_table(process)
    integral = exact_nelbo(process, table, 1, window).diffusion
    coarse, middle, fine = (_discrete(process, table, window, steps) for steps in (32, 64, 128))
    limit = (8.0 * fine - 6.0 * middle + coarse) / 3.0
    words = torch.arange(process.vocabulary.num_tokens)
    yield compare(limit, integral, {"x0": words, "window": window}, integral.abs().clamp(min=1e-9))


def state_and_time_table(process: ForwardProcess) -> Table:
    """A denoiser with no symmetry: its logits are linear in t with coefficients of the row's own state."""
    generator = torch.Generator().manual_seed(6)
    shape = (2, process.vocabulary.num_states, process.vocabulary.num_tokens)
    level, slope = torch.randn(shape, generator=generator, dtype=torch.float64)
    return lambda zt, t: (level[zt] + slope[zt] * t.unsqueeze(-1)).log_softmax(-1)


def _discrete(process: ForwardProcess, table: Table, window: Window, steps: int) -> Tensor:
    """[V] the discrete-time bound without its end terms, steps even in logit t."""
    vocabulary = process.vocabulary
    first, last = torch.logit(times(window))
    grid = torch.sigmoid(torch.linspace(float(first), float(last), steps + 1, dtype=torch.float64))
    step, x0, zt = product(
        torch.arange(steps),
        torch.arange(vocabulary.num_tokens),
        torch.arange(vocabulary.num_states),
    )
    chance = likelihoods(process, grid[1:])[step, x0, zt]
    kept = chance > 0
    step, x0, zt, chance = step[kept], x0[kept], zt[kept], chance[kept]
    s, t = grid[step], grid[step + 1]
    truth = process.reverse_log_probs(certain_log_probs(vocabulary.num_tokens)[x0], zt, t, s)
    model = process.reverse_log_probs(table(zt.unsqueeze(1), t.unsqueeze(1)).squeeze(1), zt, t, s)
    divergence = torch.where(truth.isfinite(), truth.exp() * (truth - model), 0.0).sum(-1)
    return torch.zeros(vocabulary.num_tokens, dtype=torch.float64).index_add(
        0, x0, chance * divergence
    )


@law("weights: every level is charged once", tolerance=1e-8)
def weights_are_level_flows(
    process: ForwardProcess, windows: Sequence[Window] = FINITE
) -> Iterator[Gap]:
    """The expected weight of a level's rows is the flow into that level: F_l(t1) - F_l(t0), which is 1 over [0,1] where the
    clock closes. For trees, whose weights mean that; quadrature leaves 1e-9."""
    if not isinstance(process, TreeProcess):
        return
    vocabulary = process.vocabulary
    for window in windows:
        v, y, width = logit_nodes(*window, num_panels(*window))
        words, states = torch.arange(vocabulary.num_tokens), torch.arange(vocabulary.num_states)
        node, x0, zt = product(torch.arange(len(v)), words, states)
        t = torch.sigmoid(y)
        dt = t * (1.0 - t) * (torch.logit(times(window)) @ times((-1.0, 1.0))) * width
        chance = likelihoods(process, t)[node, x0, zt]
        weight = process.weight(x0, zt, t[node])
        flow = torch.zeros(vocabulary.num_tokens, vocabulary.num_levels + 1, dtype=torch.float64)
        flow.index_put_(
            (x0, vocabulary.level_of(zt)),
            torch.where(chance > 0, chance * weight * dt[node], 0.0),
            True,
        )
        start, stop = process.clock.cdf(times(window))
        levels = torch.arange(1, vocabulary.num_levels + 1).expand(vocabulary.num_tokens, -1)
        yield compare(
            flow[:, 1:], (stop - start).expand_as(flow[:, 1:]), {"level": levels, "window": window}
        )
