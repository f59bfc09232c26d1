"""Hyperschedule sampler: a grid sampler with a separate time per position (arXiv 2504.06416)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import pairwise
from typing import Any, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network, choose_states
from ddiff.core.field import FieldProcess
from ddiff.core.information import IdentityTime
from ddiff.core.network import Predicts
from ddiff.core.process import Query, States
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy, TimeRule, Times
from ddiff.sampling.grid_sampler import GridSampler
from ddiff.sampling.loop import Canvas, Quality, RngAt, Sampler


@final
class HyperscheduleSampler(Sampler):
    """Sample with the steps of a grid sampler, in which every position has a separate time.

    The grid of `inner` gives numbers tau_k that fall from 1 to 0, the progress of sampling. `rule`
    maps each tau to the times of all positions, and step k moves the positions from the times
    rule.at(tau_k) to the times rule.at(tau_{k+1}). If a position becomes clean in a step, its token
    is drawn from the prediction at the start of the step. Prompt tokens never change.

    If the rule has blocks, no position attends to a later block. The sampler has the `quality` (see
    `Sampler`) of `inner`.
    """

    def __init__(self, inner: GridSampler, rule: TimeRule) -> None:
        self.inner = inner
        self.states: States = inner.states
        self.rule = rule
        self.quality: Quality = inner.quality
        self.order = inner.order
        # A rule has blocks at every time and length or at none, so any time and length will do.
        start = rule.at(IdentityTime(), torch.ones(1, dtype=torch.float64), 1)
        self.looks_ahead = start.block is None

    @property
    def steps(self) -> int:
        return self.inner.steps

    def check_supported(self, process: FieldProcess | None, predicts: Predicts) -> None:
        self.inner.check_supported(process, predicts)

    def run(
        self,
        process: Any,
        network: Network,
        canvas: Canvas,
        rng_at: RngAt,
    ) -> Iterator[Canvas]:
        unfinished = canvas.free
        for k, (tau, next_tau) in enumerate(pairwise(self.inner.times(process))):
            now = self._times_at(process, tau, canvas)
            later = self._times_at(process, next_tau, canvas)
            finishes = unfinished & (later.clean | (next_tau == 0.0))
            continues = unfinished & ~finishes
            start = replace(
                canvas,
                clean=canvas.clean | ~unfinished,
                t=_sampling_times(now),
                block=now.block,
            )
            s = _sampling_times(later)
            moved = move_positions(
                self.inner, process, network, start, s, continues, finishes, rng_at(k)
            )
            unfinished = continues
            canvas = replace(
                moved,
                t=torch.where(unfinished, s, 0.0),
                clean=~unfinished,
            )
            yield canvas

    def _times_at(self, process: FieldProcess, tau: float, canvas: Canvas) -> Times:
        """Return the times of all positions at information time `tau`, which falls from 1 to 0."""
        progress = torch.full_like(canvas.t[:, 0], tau)
        return self.rule.at(process.information_time, progress, canvas.t.shape[1])


def move_positions(
    sampler: GridSampler,
    process: Any,
    network: Network,
    canvas: Canvas,
    s: Tensor,
    continues: Tensor,
    finishes: Tensor,
    rng: CounterRng,
) -> Canvas:
    """Move some positions of a canvas with a grid sampler and finish others, in one step.

    Both use the same network evaluation at the start of the step. Only states and extras of the
    result are new; the caller sets its times and its clean positions.

    Args:
        s: [B,n], the times to which positions move.
        continues: [B,n] bool, the positions that move.
        finishes: [B,n] bool, the positions that become clean.
    """
    start = canvas.network_input()
    shared = _SharedStart(network, start)
    moved = sampler.move(process, shared, replace(canvas, free=continues), s, rng)
    finished = sampler.finish(process, shared, replace(canvas, free=finishes), rng)
    zt = choose_states(finishes, finished.zt, moved.zt)
    return replace(canvas, zt=zt, extras=moved.extras)


class _SharedStart:
    """Network that evaluates the state `start` once. Other states are evaluated as usual."""

    def __init__(self, network: Network, start: Noisy) -> None:
        self.network = network
        self.start = start
        self.query = network(start)

    def __call__(self, noisy: Noisy) -> Query:
        is_start = torch.equal(noisy.zt, self.start.zt) and torch.equal(noisy.t, self.start.t)
        return self.query if is_start else self.network(noisy)


def _sampling_times(times: Times) -> Tensor:
    """Return the times [B,L] of the positions for a sampling step.

    The time is 1 at positions at the prior, 0 at clean positions, and `times.t` elsewhere.
    """
    t = times.t.masked_fill(times.clean, 0.0)
    if times.at_prior is None:
        return t
    return t.masked_fill(times.at_prior, 1.0)
