"""The ancestral sampler: the exact reverse transition of the process, step by step from t = 1 to t = 0."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal, final

import torch
from torch import Tensor

from ddiff.core.elbo import Ask
from ddiff.core.law import CleanLaw
from ddiff.core.noise import Noise
from ddiff.core.process import ForwardProcess, Visit
from ddiff.errors import ArgumentError
from ddiff.sampling.loop import Canvas, NoiseAt, Quality, step_rows


@final
class AncestralSampler:
    """`num_steps` equal steps, none skipped; positions move independently given the network's laws.

    A step may go from mask to word through any number of levels. The last draw is a draw, unless `last = "argmax"`.
    First order: the law of the samples tends to the network's own as 1/num_steps.
    """

    quality: Quality = "first order"

    def __init__(self, num_steps: int = 64, last: Literal["draw", "argmax"] = "draw") -> None:
        if num_steps < 1:
            raise ArgumentError(f"AncestralSampler: num_steps must be at least 1; got {num_steps}.")
        self.num_steps, self.last = num_steps, last

    @property
    def steps(self) -> int:
        return self.num_steps

    def run(self, process: ForwardProcess, ask: Ask, canvas: Canvas, noise_at: NoiseAt) -> Iterator[Canvas]:
        grid = torch.linspace(1.0, 0.0, self.num_steps + 1, dtype=torch.float64).tolist()
        for k, s in enumerate(grid[1:]):
            final = k == self.num_steps - 1
            if final and self.last == "argmax":
                zt = self._choose(process, ask, canvas)
            else:
                zt = self._step(process, ask, canvas, s, noise_at(k))
            canvas = Canvas(zt, torch.full_like(canvas.t, s), canvas.clamped)
            if final and self.last == "draw" and not process.closes_at_clean:
                canvas = Canvas(self._decode(process, ask, canvas, noise_at(k)), canvas.t, canvas.clamped)
            yield canvas

    def _step(self, process: ForwardProcess, ask: Ask, canvas: Canvas, s: float, noise: Noise) -> Tensor:
        u = _uniforms(noise, "step", process.uniforms_per_step)

        def draw(visit: Visit, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return process.step(visit, zt, t, torch.full_like(t, s), u[rows])

        return step_rows(process, ask, canvas, draw)

    def _decode(self, process: ForwardProcess, ask: Ask, canvas: Canvas, noise: Noise) -> Tensor:
        u = _uniforms(noise, "last", process.uniforms_per_decode)
        return step_rows(process, ask, canvas, lambda visit, zt, t, rows: process.decode(visit, zt, t, u[rows]))

    def _choose(self, process: ForwardProcess, ask: Ask, canvas: Canvas) -> Tensor:
        """The likeliest word of each position, own evidence included."""

        def draw(visit: Visit, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            root = torch.full_like(zt, process.vocabulary.root)

            def best(law: CleanLaw, idx: Tensor) -> Tensor:
                return (law.log_mass(0) + process.log_likelihood(zt[idx], t[idx])).argmax(-1)

            return visit(torch.arange(len(zt), device=zt.device), root, best)

        return step_rows(process, ask, canvas, draw)


def _uniforms(noise: Noise, channel: str, count: int) -> Tensor:
    """[B*L, count]."""
    return noise.uniform(channel, count).reshape(-1, count)
