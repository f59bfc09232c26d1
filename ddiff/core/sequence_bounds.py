"""Estimates of the bound of each sequence, with a known Monte-Carlo error.

The bound of a sequence is an integral over time. Times are t(v) with v in [0,1], in the density
that has the least variance (`TimeChange.draw`). With t uniform, the variance of masked diffusion
would be infinite. f(v) is the integrand in v, an expectation over noisy states. A group of K draws
estimates the integral as the sum of w_k f(v_k), where the points v_k and the weights w_k are

    independent   v_k uniform in [0,1],                 w_k = 1/K
    strata        v_k uniform in [(k - 1)/K, k/K],      w_k = 1/K
    quadrature    nodes and weights of the Gauss-Legendre rule; only the noise is random

`mirrored` replaces f(v_k) by the mean of two draws. The second has v = 1 - v_k and mirrored random
numbers, so that positions that are noisy in the first draw tend to be clean in the second.

Groups are independent, so that their spread gives the standard error, for any choice of points.
With `quadrature`, the estimate also has the error of the rule, which the standard error does not
contain.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal, final, get_args

import numpy as np
import torch
from torch import Tensor

from ddiff.core.elbo import Network, nelbo
from ddiff.core.information import TimeChange
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, Times, TimeSampler
from ddiff.errors import ArgumentError

Points = Literal["independent", "strata", "quadrature"]


@dataclass(frozen=True)
class SequenceEstimate:
    """Estimated bounds of B sequences.

    Attributes:
        nats: [B] bound of each sequence, with a gradient if the network has one.
        standard_error: [B] Monte-Carlo standard error of `nats`; None for one group.
        groups: [G,B] estimate of each group, without a gradient.
    """

    nats: Tensor
    standard_error: Tensor | None
    groups: Tensor


@final
class SequenceBounds:
    """Estimator of the bound of each sequence.

        estimator = SequenceBounds(run.process, points="strata", count=4, groups=2)
        network = as_differentiable_network(run.denoiser, run.process)
        estimate = estimator(network, ids, scored, rng)
        loss = (advantage * estimate.nats).mean()

    The network is evaluated `groups` * `count` times per sequence, twice that if `mirrored`, and
    in addition at the ends of time, if the bound of the process has a prior or decoding term.

    Args:
        process: forward process; all positions of a sequence have the same time.
        points: points at which the integrand is evaluated (see the docstring of the module).
        count: number K of points in a group.
        groups: number G of independent groups; at least 2 for a standard error.
        mirrored: draw pairs with mirrored times and noise.
        tokens: number of tokens of a sequence for which the times have the least variance. None:
            the number of positions L.
    """

    def __init__(
        self,
        process: ForwardProcess,
        *,
        points: Points = "strata",
        count: int = 4,
        groups: int = 2,
        mirrored: bool = False,
        tokens: int | None = None,
    ) -> None:
        if points not in get_args(Points):
            raise ArgumentError(
                f"SequenceBounds: points must be one of {', '.join(get_args(Points))}; got "
                f"{points!r}."
            )
        for name, value in (("count", count), ("groups", groups)):
            if value < 1:
                raise ArgumentError(f"SequenceBounds: {name} must be at least 1; got {value}.")
        self.process = process
        self.points = points
        self.count = count
        self.groups = groups
        self.mirrored = mirrored
        self.tokens = tokens
        nodes, weights = np.polynomial.legendre.leggauss(count)
        self._nodes = torch.from_numpy((nodes + 1.0) / 2.0)
        self._weights = torch.from_numpy(weights / 2.0)

    def __call__(
        self, network: Network, ids: Tensor, scored: Tensor, rng: CounterRng
    ) -> SequenceEstimate:
        """Estimate the bounds of the sequences `ids` [B,L].

        `scored` [B,L] bool: positions that are part of the bound; the others stay clean, such as
        those of a prompt. `rng`: random generator of the B sequences. Equal generators give equal
        times and noise, for example to compare two networks.
        """
        estimates = []
        for group in range(self.groups):
            own = rng.derive(f"{rng.purpose}.bounds{group}", rng.length)
            draws = [
                self._estimate(network, ids, scored, v, weight, draw)
                for v, weight, draw in self._draw_points(own)
            ]
            estimates.append(torch.stack(draws).sum(0))
        groups = torch.stack(estimates)
        error = None
        if self.groups > 1:
            error = groups.detach().std(0) / self.groups**0.5
        return SequenceEstimate(groups.mean(0), error, groups.detach())

    def _draw_points(self, rng: CounterRng) -> Iterator[tuple[Tensor, float, CounterRng]]:
        """Yield for each draw of a group: points v [B,1] in [0,1), weight, and generator."""
        for k in range(self.count):
            own = rng.derive(f"{rng.purpose}.{k}", rng.length)
            u = own.uniform("time")[:, :1]
            weight = 1.0 / self.count
            if self.points == "strata":
                u = (k + u) / self.count
            elif self.points == "quadrature":
                u = self._nodes[k].to(u).expand_as(u)
                weight = float(self._weights[k])
            if not self.mirrored:
                yield u, weight, own
                continue
            yield u, weight / 2.0, own
            yield 1.0 - u, weight / 2.0, own.mirror()

    def _estimate(
        self,
        network: Network,
        ids: Tensor,
        scored: Tensor,
        v: Tensor,
        weight: float,
        rng: CounterRng,
    ) -> Tensor:
        """Return the part [B] of one draw in the estimate of a group.

        `v` [B,1] is the point of each sequence, and `weight` its weight in the integral.
        """
        slot = torch.zeros_like(rng.index)
        terms = nelbo(
            self.process, network, ids, scored, _GivenPoints(v, self.tokens), rng, slot, 1
        )
        # The terms at the ends of time do not depend on the point: the draws share them equally.
        draws = self.count * (2 if self.mirrored else 1)
        at_ends = (terms.closing + terms.decoding).sum(-1) / draws
        return weight * terms.diffusion.sum(-1) + at_ends


class _GivenPoints(TimeSampler):
    """Time rule with a given point of each sequence, at which all positions have the same time."""

    def __init__(self, v: Tensor, tokens: int | None) -> None:
        self.v = v
        self.tokens = tokens

    def draw(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> Times:
        t, speed = clock.draw(self.v, 0.0, 1.0, self.tokens or length)
        clean = torch.zeros(len(slot), length, dtype=torch.bool, device=slot.device)
        return Times(t.expand(-1, length), speed.expand(-1, length), clean)

    def ends(
        self,
        clock: TimeChange,
        rng: CounterRng,
        slot: Tensor,
        slots: int | Tensor,
        length: int,
    ) -> tuple[Times, Times]:
        return FlatTimes().ends(clock, rng, slot, slots, length)
