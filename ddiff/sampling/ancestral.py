"""Ancestral sampler: the exact reverse transition of the process, from t = 1 to t = 0."""

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
    find_undetermined,
)
from ddiff.sampling.loop import Canvas, query_at_root, step_rows


@final
class AncestralSampler(GridSampler):
    """Ancestral sampler (first order): draws from the exact reverse transition at each position.

    A step from time t to time s draws z_s from P(z_s | z_t), which is proportional to
    sum_x p(x) q_t(z_t | x) q(z_s | z_t, x), where p is the predicted distribution of the clean
    token x. The distribution of each single position is exact for any step length. The only error
    is that the positions of a step are drawn independently. On a tree, a position may pass several
    levels in one step.

    `last` selects the last step: "draw" draws tokens, "argmax" takes the most likely tokens.
    """

    def __init__(self, grid: Steps | int = 64, last: Literal["draw", "argmax"] = "draw") -> None:
        super().__init__(grid)
        if last not in ("draw", "argmax"):
            raise ArgumentError(f'AncestralSampler: last must be "draw" or "argmax"; got {last!r}.')
        self.last = last

    def move(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        return reverse_step(process, network, canvas, s, rng, "step")

    def finish(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        rng: CounterRng,
    ) -> Canvas:
        if self.last == "draw":
            return draw_tokens(process, network, canvas, rng)

        def most_likely(dist: CleanDistribution, z: Tensor, t: Tensor) -> Tensor:
            return (dist.log_mass(0) + process.log_likelihood(z, t)).argmax(-1)

        def choose(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return query_at_root(query, process, most_likely, zt, t)

        tokens = step_rows(network, canvas, choose, find_undetermined(process, canvas))
        return canvas.advance(tokens, torch.zeros_like(canvas.t))


def reverse_step(
    process: ForwardProcess,
    network: Network,
    canvas: Canvas,
    s: Tensor,
    rng: CounterRng,
    channel: str,
) -> Canvas:
    """Draw z_s given z_t from the exact reverse transition, at the positions in `canvas.free`.

    `canvas` is the state of the batch: it has the states z_t, the times t, and the positions `free`
    that the sampler may change. `s` [B,L] are the new times. `channel` is the name of the uniforms
    that are drawn from `rng`.
    """
    # Uniforms are drawn for all positions, so that the draw at one position does not depend on the
    # set of positions that move.
    u = draw_uniforms(rng, channel, process.uniforms_per_step)
    flat_s = s.reshape(-1)

    def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
        return process.step(query, zt, t, flat_s[rows], u[rows])

    zs = step_rows(network, canvas, draw, process.active(canvas.zt))
    return canvas.advance(zs, s)
