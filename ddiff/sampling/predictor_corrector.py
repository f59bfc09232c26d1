"""Correctors: moves that leave the law of a time as it is, made between the steps of a sampler."""

from __future__ import annotations

from typing import Protocol, final

import torch
from torch import Tensor

from ddiff.core.elbo import Ask
from ddiff.core.rng import Noise
from ddiff.core.process import ForwardProcess
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import reverse
from ddiff.sampling.loop import Canvas, Quality, Says, need_law, need_process
from ddiff.sampling.grid_sampler import SteppedSampler, uniforms


class Corrector(Protocol):
    """Moves a canvas without moving its time."""

    def needs(self, process: ForwardProcess | None, says: Says) -> None: ...

    def correct(
        self,
        process: ForwardProcess,
        ask: Ask,
        canvas: Canvas,
        span: Tensor,
        noise: Noise,
        channel: str,
    ) -> Canvas:
        """The canvas at the same times; span [B,L] is how far the step before went."""


@final
class ForwardBackward:
    """Up by the forward transition, back by the reverse one, over `share` of the step (arXiv 2402.04997, 2407.15595).

    One network call. Each position keeps its law; since the way shortens with the steps, so does what is lost between
    positions that return together.
    """

    def __init__(self, share: float = 1.0) -> None:
        if not 0.0 < share < float("inf"):
            raise ArgumentError(f"ForwardBackward: share of a step must be above 0; got {share}.")
        self.share = share

    def needs(self, process: ForwardProcess | None, says: Says) -> None:
        need_process(self, process)
        need_law(self, says)

    def correct(
        self,
        process: ForwardProcess,
        ask: Ask,
        canvas: Canvas,
        span: Tensor,
        noise: Noise,
        channel: str,
    ) -> Canvas:
        u = uniforms(noise, f"{channel}.up", process.uniforms_per_climb)
        s, above = canvas.t, (canvas.t + self.share * span).clamp(max=1.0)
        climbed = process.climb(canvas.zt.reshape(-1), s.reshape(-1), above.reshape(-1), u).reshape(
            s.shape
        )
        higher = canvas.moved(torch.where(canvas.free, climbed, canvas.zt), above)
        return reverse(process, ask, higher, s, noise, f"{channel}.down")


@final
class CorrectedSampler(SteppedSampler):
    """A sampler on a grid with `rounds` of a corrector after each step but the last; of the quality of that sampler."""

    def __init__(self, inner: SteppedSampler, corrector: Corrector, rounds: int = 1) -> None:
        super().__init__(inner.grid)
        if rounds < 1:
            raise ArgumentError(f"CorrectedSampler: rounds must be at least 1; got {rounds}.")
        self.inner, self.corrector, self.rounds = inner, corrector, rounds
        self.quality: Quality = inner.quality
        self.order = inner.order

    def needs(self, process: ForwardProcess | None, says: Says) -> None:
        self.inner.needs(process, says)
        self.corrector.needs(process, says)

    def move(
        self, process: ForwardProcess, ask: Ask, canvas: Canvas, s: Tensor, noise: Noise
    ) -> Canvas:
        span = canvas.t - s
        canvas = self.inner.move(process, ask, canvas, s, noise)
        for k in range(self.rounds):
            canvas = self.corrector.correct(process, ask, canvas, span, noise, f"correct{k}")
        return canvas

    def finish(self, process: ForwardProcess, ask: Ask, canvas: Canvas, noise: Noise) -> Canvas:
        return self.inner.finish(process, ask, canvas, noise)
