"""Correctors: moves that leave the law of a time as it is, made between the steps of a sampler."""

from __future__ import annotations

from typing import Protocol, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import reverse_step
from ddiff.sampling.grid_sampler import GridSampler, draw_uniforms
from ddiff.sampling.loop import Canvas, Predicts, Quality, require_distribution, require_process


class Corrector(Protocol):
    """Moves a canvas without moving its time."""

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None: ...

    def correct(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        span: Tensor,
        rng: CounterRng,
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

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_process(self, process)
        require_distribution(self, predicts)

    def correct(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        span: Tensor,
        rng: CounterRng,
        channel: str,
    ) -> Canvas:
        u = draw_uniforms(rng, f"{channel}.up", process.uniforms_per_forward_step)
        s, above = canvas.t, (canvas.t + self.share * span).clamp(max=1.0)
        climbed = process.forward_step(
            canvas.zt.reshape(-1), s.reshape(-1), above.reshape(-1), u
        ).reshape(s.shape)
        higher = canvas.advance(torch.where(canvas.free, climbed, canvas.zt), above)
        return reverse_step(process, network, higher, s, rng, f"{channel}.down")


@final
class PredictorCorrectorSampler(GridSampler):
    """A sampler on a grid with `rounds` of a corrector after each step but the last; of the quality of that sampler."""

    def __init__(self, inner: GridSampler, corrector: Corrector, rounds: int = 1) -> None:
        super().__init__(inner.grid)
        if rounds < 1:
            raise ArgumentError(
                f"PredictorCorrectorSampler: rounds must be at least 1; got {rounds}."
            )
        self.inner, self.corrector, self.rounds = inner, corrector, rounds
        self.quality: Quality = inner.quality
        self.order = inner.order

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        self.inner.check_supported(process, predicts)
        self.corrector.check_supported(process, predicts)

    def move(
        self, process: ForwardProcess, network: Network, canvas: Canvas, s: Tensor, rng: CounterRng
    ) -> Canvas:
        span = canvas.t - s
        canvas = self.inner.move(process, network, canvas, s, rng)
        for k in range(self.rounds):
            canvas = self.corrector.correct(process, network, canvas, span, rng, f"correct{k}")
        return canvas

    def finish(
        self, process: ForwardProcess, network: Network, canvas: Canvas, rng: CounterRng
    ) -> Canvas:
        return self.inner.finish(process, network, canvas, rng)
