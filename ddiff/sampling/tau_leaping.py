"""Tau-leaping: reverse rates are constant over a step (arXiv 2205.14987, 2310.16834 "Euler")."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts
from ddiff.core.numerics import draw_index
from ddiff.core.prediction import Prediction
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.sampling.grid_sampler import GridSampler, draw_uniforms
from ddiff.sampling.loop import Canvas, query_at_root, require_process, require_states, step_rows


@final
class TauLeapingSampler(GridSampler):
    """Tau-leaping sampler: reverse rates stay constant during a step (first order).

    R(y) = Q[y,z] s_theta(y) is the reverse rate from the current state z to a state y at time t.
    Here Q[y,z] is the forward rate from y to z, and s_theta(y) = q_t(y)/q_t(z) is the predicted
    ratio. R is the sum of R(y) over the states y != z. In a step from time t to time s, a position
    leaves z with probability 1 - exp(-R (t - s)), and then moves to state y with probability
    R(y)/R. The sampler uses only reverse rates, so the network may predict a score.
    """

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
        u = draw_uniforms(rng, "leap", 2)
        flat_s = s.reshape(-1)

        def jump(prediction: Prediction, z: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
            return tau_leap(process.reverse_rates(prediction, z, t), z, t - s, u)

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return query_at_root(query, process, jump, zt, t, flat_s[rows], u[rows])

        zs = step_rows(network, canvas, draw, process.active(canvas.zt))
        return canvas.advance(zs, s)


def tau_leap(rates: Tensor, zt: Tensor, span: Tensor, u: Tensor) -> Tensor:
    """Return the states [r] after a time `span` [r] in which rates are constant.

    At most one jump is made. zt [r] are the states at the start, and `rates` [r,S] are the rates
    from there into the S states. u [r,2] are uniforms: u[:,0] decides whether the state jumps, and
    u[:,1] selects the new state.
    """
    # In float64: for short spans 1 - exp(-x) would lose its digits.
    probability = -torch.expm1(-rates.sum(-1).double() * span)
    # The cost of a draw is proportional to the number of states, so only rows that jump draw.
    moves = (u[:, 0] < probability).nonzero().squeeze(-1)
    return zt.index_copy(0, moves, draw_index(rates[moves], u[moves, 1]))
