"""Exact bound of a time rule on a joint distribution of three symbols, without random draws.

A time rule gives the positions of a sequence their noise times. In a window rule, only the
positions of a window are noisy at the same time. The bound has three terms: the KL to the prior at
the end of the path (prior term), an integral over time (diffusion term), and decoding at the
start of the path. The functions of `ddiff.core.elbo` compute the terms for exact conditional
distributions. Expectations are sums over states and windows, and over quadrature nodes in time.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from ddiff.core.elbo import closing_term, corrupt, decoding_term, diffusion_term, network_from_noisy
from ddiff.core.information import IdentityTime
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy, Times, TimeSampler
from ddiff.testing.bound import all_sequences, enumerate_draws, random_joint
from ddiff.testing.probes import likelihoods

NUM_WORDS, LENGTH = 3, 3
SEQUENCES = all_sequences(NUM_WORDS, LENGTH)
LOG_JOINT = random_joint(NUM_WORDS, LENGTH)
JOINT = LOG_JOINT.exp().reshape(-1)
ENTROPY = -(JOINT * JOINT.log()).sum()


class Scripted(CounterRng):
    """Random generator whose draws of time, window and states are given.

    Args:
        time: uniforms [n] of the channel `time`.
        window: uniforms [n] of the channel `window`.
        zt: states [n, LENGTH] that all other channels draw.
        num_states: number of states of the process.
        rotated: return `time` as the uniform of a group, which shifts the times of all windows of a
            sequence together. The channel `time` is then 0.
    """

    def __init__(
        self, time: Tensor, window: Tensor, zt: Tensor, num_states: int, rotated: bool = False
    ) -> None:
        super().__init__(0, 0, torch.arange(len(zt)), LENGTH)
        self.rotation = time
        time = torch.zeros_like(time) if rotated else time
        self.given = {
            "time": time.unsqueeze(-1).expand(-1, LENGTH),
            "window": window.unsqueeze(-1).expand(-1, LENGTH),
        }
        self.cells = (zt.double() + 0.5) / num_states

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        drawn = self.given.get(channel, self.cells)
        return drawn if count == 1 else drawn.unsqueeze(-1).expand(-1, -1, count)

    def uniform_per_group(self, channel: str) -> Tensor:
        return self.rotation


def nodes(rule: TimeSampler, order: int = 6) -> tuple[Tensor, Tensor]:
    """Return Gauss-Legendre nodes [n] and weights [n] for an integral over path time in [0, 1].

    [0, 1] is divided into panels with `order` nodes each. The positions of a window are noisy
    during at least six panels. Panels begin and end where a window of `rule` begins or ends.
    """
    width, alone = getattr(rule, "width", LENGTH), not getattr(rule, "paired", True)
    panels = 6
    if alone:
        panels = (
            (LENGTH + width) * 6 // width
            if getattr(rule, "shape", "") == "slide"
            else -(-LENGTH // width) * 6
        )
    x, w = (torch.from_numpy(a) for a in np.polynomial.legendre.leggauss(order))
    left = torch.arange(panels, dtype=torch.float64).unsqueeze(-1)
    return ((left + (x + 1.0) / 2.0) / panels).reshape(-1), (w / 2.0 / panels).repeat(panels)


def exact_prediction(process: ForwardProcess) -> Callable[[Noisy], Tensor]:
    """Return a network that predicts P(x_i | states that position i attends to, except z_i).

    P is the conditional probability under JOINT and the forward process. States drawn from the
    prior (t = 1) are ignored, because they do not depend on the tokens.
    """

    def dist(noisy: Noisy) -> Tensor:
        batch = len(noisy.zt)
        block = torch.zeros(1, LENGTH, dtype=torch.long) if noisy.block is None else noisy.block
        block = block.expand(batch, -1)
        distinct, place = noisy.t.unique(return_inverse=True)
        evidence = (
            likelihoods(process, distinct)[place]
            .gather(-1, noisy.zt[..., None, None].expand(-1, -1, NUM_WORDS, 1))
            .squeeze(-1)
        )  # [B,L,V]
        evidence = torch.where((noisy.t < 1.0).unsqueeze(-1), evidence, 1.0)

        def certain(ids):
            return torch.nn.functional.one_hot(ids.clamp(max=NUM_WORDS - 1), NUM_WORDS).double()

        evidence = torch.where(noisy.clean.unsqueeze(-1), certain(noisy.zt), evidence)
        dists = []
        for i in range(LENGTH):
            of_sequences = JOINT.expand(batch, -1)
            for j in set(range(LENGTH)) - {i}:
                same, before = (
                    (block[:, j] == block[:, i])[:, None],
                    (block[:, j] < block[:, i])[:, None],
                )
                earlier = evidence[:, j] if noisy.memory is None else certain(noisy.memory[:, j])
                said = torch.where(same, evidence[:, j], torch.where(before, earlier, 1.0))
                of_sequences = of_sequences * said[:, SEQUENCES[:, j]]
            dists.append(of_sequences @ certain(SEQUENCES[:, i]))
        stacked = torch.stack(dists, 1)
        return (stacked / stacked.sum(-1, keepdim=True)).log()

    return dist


def exact_terms(
    process: ForwardProcess, rule: TimeSampler, dist: Callable[[Noisy], Tensor] | None = None
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the expected terms of the bound, each [27], for all sequences of three symbols.

    The terms are, in order: KL to the prior (closing), diffusion, decoding. `dist` is the
    prediction of the network, by default `exact_prediction(process)`.
    """
    twin, network = (
        enumerate_draws(process),
        network_from_noisy(dist or exact_prediction(process), process.vocabulary),
    )
    u, weight = nodes(rule)
    blocks = getattr(rule, "paired", False) and getattr(rule, "shape", "") == "block"
    rotated = blocks and rule.width < LENGTH  # a single window is not rotated
    scripted = partial(Scripted, rotated=rotated)
    cells = (
        torch.arange(6, dtype=torch.float64) + 0.5
    ) / 6.0  # a multiple of 1, 2 or 3: numbers of windows and of positions
    zero = torch.zeros(6, dtype=torch.float64)

    def first(rng: CounterRng, slot: Tensor) -> Times:
        return rule.ends(IdentityTime(), rng, slot, 1, LENGTH)[0]

    def last(rng: CounterRng, slot: Tensor) -> Times:
        return rule.ends(IdentityTime(), rng, slot, 1, LENGTH)[1]

    def drawn(rng: CounterRng, slot: Tensor) -> Times:
        return rule.draw(IdentityTime(), rng, slot, 1, LENGTH)

    def diffusion(x0: Tensor, times: Times, scored: Tensor, rng: CounterRng) -> Tensor:
        return diffusion_term(
            twin, network, x0, corrupt(twin, x0, times, scored, rng, "diffusion"), times.speed
        )

    closing = lambda *a: closing_term(twin, network, *a)  # noqa: E731
    decoding = lambda *a: decoding_term(twin, network, *a)  # noqa: E731
    flat = torch.full((6,), 1.0 / 6.0, dtype=torch.float64)
    return (
        _expected(process, scripted, last, zero, cells, flat, closing, at_prior=True),
        _expected(process, scripted, drawn, u, torch.zeros_like(u), weight, diffusion),
        _expected(process, scripted, first, zero, cells, flat, decoding),
    )


def _expected(
    process: ForwardProcess,
    scripted: Callable[..., CounterRng],
    times_of: Callable[[CounterRng, Tensor], Times],
    time: Tensor,
    window: Tensor,
    weight: Tensor,
    term: Callable[[Tensor, Times, Tensor, CounterRng], Tensor],
    at_prior: bool = False,
) -> Tensor:
    """Return the expectation [27] of a term of the bound for every sequence.

    Args:
        process: forward process.
        scripted: constructor of a `Scripted` generator.
        times_of: function that draws the noise times of the term.
        time: quadrature nodes [n], as uniforms of the channel `time`.
        window: uniforms [n] of the channel `window`.
        weight: quadrature weights [n].
        term: function that evaluates the term.
        at_prior: whether scored positions are drawn from the prior (see `_chance`).
    """
    states = process.vocabulary.num_states
    grid = all_sequences(states, LENGTH)
    total = torch.zeros(len(SEQUENCES), dtype=torch.float64)
    for part in torch.arange(len(weight)).split(max(1, 200_000 // (len(grid) * len(SEQUENCES)))):
        node, x, z = (axis.reshape(-1) for axis in torch.meshgrid(
            part, torch.arange(len(SEQUENCES)), torch.arange(len(grid)), indexing="ij"
        ))  # fmt: skip
        x0, zt = SEQUENCES[x], grid[z]
        chance = weight[node] * _chance(
            process, scripted, times_of, time[node], window[node], x0, zt, at_prior
        )
        kept = (chance > 0).nonzero().squeeze(-1)
        x0, zt, node = x0[kept], zt[kept], node[kept]
        rng = scripted(time[node], window[node], zt, states)
        times = times_of(rng, torch.zeros(len(kept), dtype=torch.long))
        values = term(x0, times, torch.ones_like(x0, dtype=torch.bool), rng).sum(-1)
        total.index_add_(0, x[kept], chance[kept] * values)
    return total


def _chance(
    process: ForwardProcess,
    scripted: Callable[..., CounterRng],
    times_of: Callable[[CounterRng, Tensor], Times],
    time: Tensor,
    window: Tensor,
    x0: Tensor,
    zt: Tensor,
    at_prior: bool,
) -> Tensor:
    """Return the probabilities [n] of the states zt, given the tokens x0.

    A state is a clean token, a draw from the prior, or a draw from q_t(.|x0). Positions marked in
    `times.at_prior` are drawn from the prior. With `at_prior`, scored positions (speed > 0) are
    drawn from the prior too, as in the KL term at the end of the path.
    """
    times = times_of(
        scripted(time, window, zt, process.vocabulary.num_states),
        torch.zeros(len(zt), dtype=torch.long),
    )
    distinct, place = times.t.unique(return_inverse=True)
    chance = likelihoods(process, distinct)[place, x0, zt]
    prior = torch.zeros_like(times.clean) if times.at_prior is None else times.at_prior
    prior = prior | (times.speed > 0) if at_prior else prior
    # `enumerate_draws` maps uniforms to the states of the prior in reverse order.
    from_above = process.vocabulary.num_states - 1 - zt
    chance = torch.where(prior, process.prior.log_prob.exp()[from_above], chance)
    return torch.where(times.clean, (x0 == zt).double(), chance).prod(-1)


def cost_of_ends(
    process: ForwardProcess, window: tuple[float, float], blocks: Sequence[Sequence[int]]
) -> Tensor:
    """Return by how many nats the KL and decoding terms raise the bound above the entropy.

    Both terms treat the positions of a block as independent. The cost is the sum, over `blocks` and
    over both ends t of the time window, of

        sum_i H(X_i | Z_t, B) - H(X | Z_t, B)

    where X are the tokens of the block, Z_t their states at time t, B the tokens of all earlier
    blocks, and H the conditional entropy. `blocks` lists the positions of each block.
    """
    early, late = likelihoods(process, torch.tensor(window, dtype=torch.float64))
    cost = torch.zeros((), dtype=torch.float64)
    for block in blocks:
        n, rest = len(block), tuple(range(block[-1] + 1, LENGTH))
        words = JOINT.reshape((NUM_WORDS,) * LENGTH)
        words = (words.sum(rest) if rest else words).reshape(
            -1, *(NUM_WORDS,) * n
        )  # [before, tokens of the block]
        x_axes = tuple(range(1, n + 1))
        with_early, with_late = words, words
        for axis in x_axes:  # append one axis per state after the axes of the tokens
            with_early, with_late = (
                p.unsqueeze(-1)
                * rows.reshape([-1 if a == axis else 1 for a in range(p.dim())] + [rows.shape[-1]])
                for p, rows in ((with_early, early), (with_late, late))
            )
        noisy = with_late.sum(x_axes)
        for axis in x_axes:
            others = tuple(other for other in x_axes if other != axis)
            cost = cost + _conditional(with_early.sum(others) if others else with_early, (1,))
            cost = cost + _conditional(noisy.sum(others) if others else noisy, (1,))
        cost = cost - _conditional(with_early, x_axes) - _conditional(noisy, x_axes)
    return cost


def _conditional(p: Tensor, unknown: tuple[int, ...]) -> Tensor:
    entropy = lambda q: torch.where(q > 0, -q * q.log(), 0.0).sum()  # noqa: E731
    return cast(Tensor, entropy(p) - entropy(p.sum(unknown)))


def mean(values: Any) -> float:
    return float((JOINT * values).sum())
