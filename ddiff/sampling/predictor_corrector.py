"""Predictor-corrector sampler: after each step of a sampler, a corrector resamples positions."""

from __future__ import annotations

from typing import Self, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import reverse_step
from ddiff.sampling.grid_sampler import GridSampler, draw_uniforms
from ddiff.sampling.loop import Canvas, Quality, check_predicts_distribution, require_process


@final
class ForwardBackward:
    """Corrector: a forward step, then the reverse step back (arXiv 2402.04997, 2407.15595).

    The forward step is `share` times as long as the preceding step of the sampler. A correction
    takes one network evaluation. It does not change the distribution of any single position, but
    positions that are noised together lose part of their dependence. This error is smaller for
    shorter steps.
    """

    def __init__(self, share: float = 1.0) -> None:
        if not 0.0 < share < float("inf"):
            raise ArgumentError(
                f"ForwardBackward: share must be a finite number above 0; got {share}. "
                "It is the length of the forward step as a multiple of the sampler's step."
            )
        self.share = share

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        """Raise ArgumentError if `process` is None or the network predicts a score."""
        require_process(self, process)
        check_predicts_distribution(self, predicts)

    def correct(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        span: Tensor,
        rng: CounterRng,
        channel: str,
    ) -> Canvas:
        """Return the state of the batch after a correction, at the same times as `canvas`.

        `span` [B,L] is the length in time of the preceding step. `channel` is the prefix of the
        names of the random streams of `rng` that are used.
        """
        u = draw_uniforms(rng, f"{channel}.up", process.uniforms_per_forward_step)
        s = canvas.t
        t = (s + self.share * span).clamp(max=1.0)
        # All positions are noised and prompt tokens restored afterwards, so that uniforms need not
        # be selected.
        noised = process.forward_step(canvas.zt.reshape(-1), s.reshape(-1), t.reshape(-1), u)
        zt = torch.where(canvas.free, noised.reshape(s.shape), canvas.zt)
        return reverse_step(process, network, canvas.advance(zt, t), s, rng, f"{channel}.down")


@final
class PredictorCorrectorSampler(GridSampler):
    """Sampler that applies a corrector `rounds` times after each step of `inner` except the last.

    The sampler has the `quality` (see `Sampler`) of `inner`.
    """

    def __init__(self, inner: GridSampler, corrector: ForwardBackward, rounds: int = 1) -> None:
        super().__init__(inner.grid)
        if rounds < 1:
            raise ArgumentError(
                f"PredictorCorrectorSampler: rounds must be at least 1; got {rounds}.",
            )
        self.inner = inner
        self.corrector = corrector
        self.rounds = rounds
        self.quality: Quality = inner.quality
        self.order = inner.order

    def start_at(self, time: float) -> Self:
        started = super().start_at(time)
        started.inner = self.inner.start_at(time)
        return started

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        self.inner.check_supported(process, predicts)
        self.corrector.check_supported(process, predicts)

    def move(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        span = canvas.t - s
        canvas = self.inner.move(process, network, canvas, s, rng)
        for k in range(self.rounds):
            # Each round has its own channel, so rounds of one step draw different uniforms.
            canvas = self.corrector.correct(process, network, canvas, span, rng, f"correct{k}")
        return canvas

    def finish(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        rng: CounterRng,
    ) -> Canvas:
        # No correction after the last step: at t = 0 positions hold tokens.
        return self.inner.finish(process, network, canvas, rng)
