"""Hyperschedules: a stepped sampler along the path of a time rule, every position at its own time (arXiv 2504.06416)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.information import IdentityTime
from ddiff.core.process import ForwardProcess
from ddiff.core.times import TimeRule, Times
from ddiff.sampling.grid_sampler import GridSampler
from ddiff.sampling.loop import Canvas, Predicts, Quality, RngAt, Sampler


@final
class HyperscheduleSampler(Sampler):
    """The moves of `inner` from rule.at(tau_k) to rule.at(tau_{k+1}), tau on the grid of `inner`; of its quality.

    A position that settles within a step draws its word, one that comes off the prior begins; both read what the network
    says at the beginning of the step. Given words stay as they are, wherever they stand; under a rule with blocks nobody
    sees those of a later block, and so it does not look ahead.
    """

    def __init__(self, inner: GridSampler, rule: TimeRule) -> None:
        self.inner, self.rule = inner, rule
        self.quality: Quality = inner.quality
        self.order = inner.order
        self.looks_ahead = (
            rule.at(IdentityTime(), torch.ones(1, dtype=torch.float64), 1).block is None
        )

    @property
    def steps(self) -> int:
        return self.inner.steps

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        self.inner.check_supported(process, predicts)

    def run(
        self, process: ForwardProcess, network: Network, canvas: Canvas, rng_at: RngAt
    ) -> Iterator[Canvas]:
        open_ = canvas.free
        for k, (tau, then) in enumerate(pairwise(self.inner.grid.times())):
            now = self._at(process, tau, canvas)
            later = self._at(process, then, canvas)
            settles = open_ & (later.clean | (then == 0.0))
            shown = replace(canvas, clean=canvas.clean | ~open_, t=_times(now), block=now.block)
            query = network(shown.network_input())
            shared = lambda noisy, query=query: query  # noqa: E731
            moved = self.inner.move(
                process, shared, replace(shown, free=open_ & ~settles), _times(later), rng_at(k)
            )
            ended = self.inner.finish(process, shared, replace(shown, free=settles), rng_at(k))
            zt = torch.where(settles, ended.zt, moved.zt)
            open_ = open_ & ~settles
            canvas = replace(shown, zt=zt, t=torch.where(open_, _times(later), 0.0), clean=~open_)
            yield canvas

    def _at(self, process: ForwardProcess, tau: float, canvas: Canvas) -> Times:
        reached = torch.full_like(canvas.t[:, 0], tau)
        return self.rule.at(process.information_time, reached, canvas.t.shape[1])


def _times(times: Times) -> Tensor:
    """[B,L] 1 where a position waits, 0 where it has settled."""
    t = times.t.masked_fill(times.clean, 0.0)
    return t if times.at_prior is None else t.masked_fill(times.at_prior, 1.0)
