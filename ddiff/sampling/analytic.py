"""Analytic (Tweedie) sampler: reverse transition in closed form (arXiv 2310.16834, sec. 4.3)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff.core.dense import distinct_pairs
from ddiff.core.elbo import Network
from ddiff.core.kernel import Kernel, solve_nearest
from ddiff.core.network import Predicts
from ddiff.core.numerics import draw_index, interior
from ddiff.core.prediction import Prediction, Score
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.sampling.grid_sampler import GridSampler, draw_uniforms
from ddiff.sampling.loop import (
    CLAMPED_MASS,
    Canvas,
    query_at_root,
    require_process,
    require_states,
    step_rows,
)


@final
class AnalyticSampler(GridSampler):
    """Sampler whose steps solve for the reverse transition in closed form (first order).

    A step draws z_s from P(z_s = y | z_t) = (r K^-1)(y) K[y, z_t]. Here r is the row vector of the
    predicted ratios r(y) = q_t(y)/q_t(z_t) of all states y, and K[y,z] = P(z_t = z | z_s = y) is
    the forward transition. If the network predicts a distribution, the step equals the ancestral
    step.

    If the network predicts a score, probabilities may be negative. Negative probabilities are set
    to 0, and the others are normalized. The entry `clamped_mass` of `Canvas.extras` is the sum of
    the absolute values that were set to 0.
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
        u = draw_uniforms(rng, "step", 1)[:, 0]
        flat_s = s.reshape(-1)
        clamped = canvas.extras.get(CLAMPED_MASS, torch.zeros_like(canvas.t)).reshape(-1).clone()

        def jump(prediction: Prediction, z: Tensor, t: Tensor, s: Tensor, rows: Tensor) -> Tensor:
            probability = reverse_probs(process, prediction, z, t, s)
            clamped[rows] += probability.clamp(max=0.0).sum(-1).neg().double()
            return draw_index(probability.clamp(min=0.0), u[rows])

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            return query_at_root(query, process, jump, zt, t, flat_s[rows], rows)

        zs = step_rows(network, canvas, draw, process.active(canvas.zt))
        return canvas.advance(zs, s, **{CLAMPED_MASS: clamped.reshape(s.shape)})


def reverse_probs(
    process: ForwardProcess,
    prediction: Prediction,
    zt: Tensor,
    t: Tensor,
    s: Tensor,
) -> Tensor:
    """Return the probabilities P(z_s | z_t) [r,S] of the S states at time s.

    zt [r] are the states at times t [r], and `prediction` is the prediction at these rows. Each row
    of the result sums to 1, but may have negative entries if the prediction is a score.

    The forward transition from s to t may be singular in floating point, for example in a dense
    chain at t = 1. Several distributions of z_s then agree with the score. The result is the
    nearest of these distributions to the marginal q_s for a uniform clean token.
    """
    if not isinstance(prediction, Score):
        return process.reverse_log_probs(prediction.log_mass(0), zt, t, s).exp()
    # At t = 1 the state z_t is independent of z_s, and K has no inverse.
    kernel = process.transition(s, interior(t))
    ratio = prediction.log_ratio.double().exp()
    if type(kernel).solve is not Kernel.solve:
        return kernel.solve(ratio) * kernel.column(zt)
    # Without a closed form, solve once for each distinct pair of times.
    first, last, place = distinct_pairs(s, interior(t))
    matrix = process.transition(first, last).dense()
    even = torch.zeros(
        len(first),
        process.vocabulary.num_tokens,
        dtype=ratio.dtype,
        device=ratio.device,
    )
    base = process.log_marginal(even.log_softmax(-1), first).exp()
    total = ratio.sum(-1, keepdim=True)
    return solve_nearest(matrix, base, ratio / total, place) * total * kernel.column(zt)
