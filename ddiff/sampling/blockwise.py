"""Semi-autoregressive sampling: any sampler inside a window, windows from left to right (arXiv 2503.09573)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, final

import torch

from ddiff.core.elbo import Network
from ddiff.core.process import ForwardProcess
from ddiff.errors import ArgumentError
from ddiff.sampling.loop import Canvas, Predicts, Quality, RngAt, Sampler

WindowSight = Literal["blocks", "all"]


@final
class BlockwiseSampler(Sampler):
    """Windows of `width` positions, each from noise to words by `inner`, seeing the settled ones before it.

    Later windows wait at the prior. `sight = "blocks"`: no position sees a later window, as block diffusion is trained, nor
    words given there; "all": the network sees them wait. Of the quality of `inner`. Positions draw from their own noise,
    so all windows may use the same steps of it.
    """

    def __init__(self, inner: Sampler, width: int, sight: WindowSight = "blocks") -> None:
        if width < 1:
            raise ArgumentError(f"BlockwiseSampler: width must be at least 1; got {width}.")
        if sight not in ("blocks", "all"):
            raise ArgumentError(
                f'BlockwiseSampler: sight must be "blocks" or "all"; got {sight!r}.'
            )
        self.inner, self.width, self.sight = inner, width, sight
        self.cached = sight == "blocks"  # then settled windows see nothing that comes later
        self.looks_ahead = sight == "all" and inner.looks_ahead
        self.quality: Quality = inner.quality
        self.order = inner.order

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        self.inner.check_supported(process, predicts)

    def run(
        self, process: ForwardProcess, network: Network, canvas: Canvas, rng_at: RngAt
    ) -> Iterator[Canvas]:
        block = torch.arange(canvas.zt.shape[1], device=canvas.zt.device) // self.width
        free, sight = canvas.free, block.unsqueeze(0) if self.sight == "blocks" else None
        for number in range(int(block.max()) + 1):
            window = free & (block == number)
            if not bool(window.any()):
                continue
            canvas = replace(canvas, free=window, block=sight)
            for canvas in self.inner.run(process, network, canvas, rng_at):  # noqa: B020
                yield canvas
            canvas = replace(canvas, clean=canvas.clean | window)
