"""Tau-leaping: reverse rates held still over a step (arXiv 2205.14987, 2310.16834 "Euler")."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.numerics import draw_index
from ddiff.core.prediction import Prediction
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.sampling.grid_sampler import GridSampler, draw_uniforms, every_row, root_of
from ddiff.sampling.loop import Canvas, Predicts, require_process, step_rows


@final
class TauLeapingSampler(GridSampler):
    """Leave z with probability 1 - exp(-R (t - s)), R = sum_y R(y), for y ~ R(y) = Q[y,z] s_theta(y) at time t. Order 1.

    Needs reverse rates only, so a score will do.
    """

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_process(self, process)

    def move(
        self, process: ForwardProcess, network: Network, canvas: Canvas, s: Tensor, rng: CounterRng
    ) -> Canvas:
        u, then = draw_uniforms(rng, "leap", 2), s.reshape(-1)

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            def jump(prediction: Prediction, z: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
                return tau_leap(process.reverse_rates(prediction, z, t), z, t - s, u)

            root = root_of(process, zt)
            return query(every_row(zt), root, jump, zt, t, then[rows], u[rows])

        return canvas.advance(step_rows(network, canvas, draw, process.active(canvas.zt)), s)


def tau_leap(rates: Tensor, zt: Tensor, span: Tensor, u: Tensor) -> Tensor:
    """[r] where states zt are after a span [r] of constant rates [r,S]: the target of the last jump, if there is one."""
    moves = (u[:, 0] < -torch.expm1(-rates.sum(-1).double() * span)).nonzero().squeeze(-1)
    return zt.index_copy(0, moves, draw_index(rates[moves], u[moves, 1]))
