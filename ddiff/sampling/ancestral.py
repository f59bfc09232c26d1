"""The ancestral sampler: the exact reverse transition of the process, step by step from t = 1 to t = 0."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.grid import Steps
from ddiff.sampling.grid_sampler import (
    GridSampler,
    draw_tokens,
    draw_uniforms,
    every_row,
    find_undetermined,
    root_of,
)
from ddiff.sampling.loop import Canvas, step_rows


@final
class AncestralSampler(GridSampler):
    """P(z_s | z_t) = sum_x p(x) q(z_s | z_t, x) at every position, independently given the network's laws. Order 1.

    Each single position is exact whatever the step; what a step loses is how the positions of that step depend on each
    other. A step may go from mask to word through any number of levels. The last draw is a draw, unless `last = "argmax"`.
    """

    def __init__(self, grid: Steps | int = 64, last: Literal["draw", "argmax"] = "draw") -> None:
        super().__init__(grid)
        if last not in ("draw", "argmax"):
            raise ArgumentError(f'AncestralSampler: last must be "draw" or "argmax"; got {last!r}.')
        self.last = last

    def move(
        self, process: ForwardProcess, network: Network, canvas: Canvas, s: Tensor, rng: CounterRng
    ) -> Canvas:
        return reverse_step(process, network, canvas, s, rng, "step")

    def finish(
        self, process: ForwardProcess, network: Network, canvas: Canvas, rng: CounterRng
    ) -> Canvas:
        if self.last == "draw":
            return draw_tokens(process, network, canvas, rng)

        def choose(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            def likeliest(dist: CleanDistribution, z: Tensor, t: Tensor) -> Tensor:
                return (dist.log_mass(0) + process.log_likelihood(z, t)).argmax(-1)

            return query(every_row(zt), root_of(process, zt), likeliest, zt, t)

        return canvas.advance(
            step_rows(network, canvas, choose, find_undetermined(process, canvas)),
            torch.zeros_like(canvas.t),
        )


def reverse_step(
    process: ForwardProcess,
    network: Network,
    canvas: Canvas,
    s: Tensor,
    rng: CounterRng,
    channel: str,
) -> Canvas:
    """One exact reverse transition of every free position from its time to s [B,L]."""
    u, then = draw_uniforms(rng, channel, process.uniforms_per_step), s.reshape(-1)

    def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return process.step(query, zt, t, then[rows], u[rows])

    return canvas.advance(step_rows(network, canvas, draw, process.active(canvas.zt)), s)
