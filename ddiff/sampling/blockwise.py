"""Semi-autoregressive sampling: windows from left to right (arXiv 2503.09573)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Literal, final

import torch

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts
from ddiff.core.process import ForwardProcess, States
from ddiff.errors import ArgumentError
from ddiff.sampling.loop import Canvas, Quality, RngAt, Sampler

Visibility = Literal["blocks", "all"]


@final
class BlockwiseSampler(Sampler):
    """Sample windows of `width` positions from left to right, each with the sampler `inner`.

    A window is denoised from t = 1 to t = 0 before the next window starts. Until then, the next
    window stays at the prior, except for prompt tokens. `sight` selects the attention:

    - "blocks": a position attends to its own and earlier windows, as in the training of block
      diffusion. Prompt tokens in later windows have no influence.
    - "all": a position attends to all windows.

    The sampler has the `quality` (see `Sampler`) of `inner`.
    """

    def __init__(self, inner: Sampler, width: int, sight: Visibility = "blocks") -> None:
        if width < 1:
            raise ArgumentError(f"BlockwiseSampler: width must be at least 1; got {width}.")
        if sight not in ("blocks", "all"):
            raise ArgumentError(
                f'BlockwiseSampler: sight must be "blocks" or "all"; got {sight!r}.',
            )
        self.inner = inner
        self.states: States = inner.states
        self.width = width
        self.sight = sight
        # Finished windows attend to no later window, so their keys and values stay valid.
        self.cached = sight == "blocks"
        self.looks_ahead = sight == "all" and inner.looks_ahead
        self.quality: Quality = inner.quality
        self.order = inner.order

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        self.inner.check_supported(process, predicts)

    def run(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        rng_at: RngAt,
    ) -> Iterator[Canvas]:
        number = torch.arange(canvas.zt.shape[1], device=canvas.zt.device) // self.width
        block = number.unsqueeze(0) if self.sight == "blocks" else None
        free = canvas.free
        for index in range(int(number.max()) + 1):
            window = free & (number == index)
            # If all tokens of a window are in the prompt, the window needs no step.
            if not bool(window.any()):
                continue
            canvas = replace(canvas, free=window, block=block)
            # Every window counts its steps from 0. Positions have separate uniforms, so windows
            # share no random number.
            for canvas in self.inner.run(process, network, canvas, rng_at):  # noqa: B020
                yield canvas
            canvas = replace(canvas, clean=canvas.clean | window)
