"""Theta-trapezoidal method: two stages, the second with extrapolated rates (arXiv 2502.00234)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts
from ddiff.core.prediction import Prediction
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError
from ddiff.sampling.grid import Steps
from ddiff.sampling.grid_sampler import GridSampler, draw_uniforms
from ddiff.sampling.loop import Canvas, query_at_root, require_process, require_states, step_rows
from ddiff.sampling.tau_leaping import tau_leap


@final
class TrapezoidalSampler(GridSampler):
    """Tau-leaping in two stages per step, the second with extrapolated rates (second order).

    A step from time t to time s consists of two tau-leaps (rates stay constant in each):

    1. The first stage covers the fraction theta in (0,1) of the step. Its rates are mu, the reverse
       rates at time t.
    2. The second stage covers the rest of the step. Let mu* be the reverse rates at the state and
       time where the first stage ended, and a = 1 / (2 theta (1 - theta)). A position that has not
       moved has the rates max(0, a mu* - (a - 1) mu). A position that has moved has the rates
       a mu*, which makes the probability of two jumps in one step correct to second order.

    A step takes two network evaluations. The sampler uses only reverse rates, so the network may
    predict a score.

    The paper proves order 2 for rates that are smooth in t and whose extrapolation is positive.
    There are three exceptions, in which N is the number of steps:

    - The rates of masks are proportional to 1/t. The error then falls as ln N / N^2.
    - A draw at another position may reduce a rate to less than (a - 1)/a of its value (one half for
      theta = 1/2). The extrapolated rate is then negative and set to 0.
    - If rates are infinite at t = 1, the first step is inaccurate.

    In the last two cases the order tends to 1 for large N, with smaller errors than tau-leaping.
    """

    order = 2

    def __init__(self, grid: Steps | int = 64, theta: float = 0.5) -> None:
        super().__init__(grid)
        if not 0.0 < theta < 1.0:
            raise ArgumentError(f"TrapezoidalSampler: theta must be in (0, 1); got {theta}.")
        self.theta = theta
        # The factor a of the paper.
        self.extrapolation = 0.5 / (theta * (1.0 - theta))

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_process(self, process)
        require_states(self, process, predicts)

    def move(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        first = draw_uniforms(rng, "first", 2)
        second = draw_uniforms(rng, "second", 2)
        start_zt = canvas.zt.reshape(-1)
        start_t = canvas.t.reshape(-1)
        flat_s = s.reshape(-1)
        # One query for both stages, so that the rates at the start cost no third network call.
        start = network(canvas.network_input())
        middle_t = canvas.t - self.theta * (canvas.t - s)
        flat_middle_t = middle_t.reshape(-1)

        def start_network(noisy: Noisy) -> Query:
            return start

        def start_rates(rows: Tensor) -> Tensor:
            root = torch.full_like(rows, process.vocabulary.root)
            return start(rows, root, process.reverse_rates, start_zt[rows], start_t[rows])

        def first_jump(
            prediction: Prediction,
            z: Tensor,
            t: Tensor,
            middle_t: Tensor,
            u: Tensor,
        ) -> Tensor:
            return tau_leap(process.reverse_rates(prediction, z, t), z, t - middle_t, u)

        def first_stage(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return query_at_root(
                query,
                process,
                first_jump,
                zt,
                t,
                flat_middle_t[rows],
                first[rows],
            )

        def second_jump(prediction: Prediction, z: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            rates = self.extrapolation * process.reverse_rates(prediction, z, t)
            unmoved = (z == start_zt[rows]).nonzero().squeeze(-1)
            earlier = (self.extrapolation - 1.0) * start_rates(rows[unmoved])
            rates[unmoved] = (rates[unmoved] - earlier).clamp(min=0.0)
            return tau_leap(rates, z, t - flat_s[rows], second[rows])

        def second_stage(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return query_at_root(query, process, second_jump, zt, t, rows)

        z_middle = step_rows(start_network, canvas, first_stage, process.active(canvas.zt))
        middle = canvas.advance(z_middle, middle_t)
        zs = step_rows(network, middle, second_stage, process.active(middle.zt))
        return middle.advance(zs, s)
