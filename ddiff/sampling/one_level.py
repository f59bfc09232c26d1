"""Sampler of the hierarchical diffusion paper: one level per step (arXiv 2510.08632)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.sampling.grid_sampler import GridSampler, draw_uniforms
from ddiff.sampling.loop import Canvas, step_rows
from ddiff.sampling.unmasking import require_monotone


@final
class OneLevelSampler(GridSampler):
    """Sampler for trees that moves a position down at most one level in a step (first order).

    Level 0 contains the tokens, and the highest level is the mask. Let pi_l(t) be the probability
    that a position is at level l at time t, and F_l(t) the probability that it is at level l or
    higher. In a step from time t to time s, a position at level l moves to level l - 1 with
    probability min(1, (F_l(t) - F_l(s)) / pi_l(t)). If no probability is cut off at 1, a position
    is at each level with its exact probability pi_l(s) after the step.

    In contrast, an ancestral step may move a position down several levels. With one level above the
    tokens, the two samplers are equal. The last step draws tokens at all positions. The process
    must be monotone, which means that reverse steps only move down the tree.
    """

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_monotone(self, process, predicts)

    def move(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        u = draw_uniforms(rng, "level", 2)
        flat_s = s.reshape(-1)

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            level = process.vocabulary.level_of(zt)
            # The query is evaluated only at rows that leave their level.
            leave = _leave_probability(process, level, t, flat_s[rows])
            moves = (u[rows, 0] < leave).nonzero().squeeze(-1)
            zs = zt.clone()
            if len(moves):
                z = zt[moves]
                below = level[moves] - 1
                scope = process.scope(z)
                zs[moves] = query(moves, scope, _draw_descendants, z, below, u[rows[moves], 1])
            return zs

        zs = step_rows(network, canvas, draw, process.active(canvas.zt))
        return canvas.advance(zs, s)


def _draw_descendants(dist: CleanDistribution, node: Tensor, level: Tensor, u: Tensor) -> Tensor:
    """Draw a descendant at level `level` [k] for each of k nodes, from uniforms u [k]."""
    return dist.draw(node, level, u)


def _leave_probability(process: ForwardProcess, level: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return (F_l(t) - F_l(s)) / pi_l(t) [r], where l are the levels `level` [r].

    pi_l(t) is the probability of level l at time t, and F_l(t) the probability of level l or
    higher. A value may exceed 1.
    """
    level = level.unsqueeze(-1)
    pi_t = _occupation(process, t)
    pi_s = _occupation(process, s)
    decrease = _sum_from_level(pi_t) - _sum_from_level(pi_s)
    return (decrease.gather(-1, level) / pi_t.gather(-1, level)).squeeze(-1)


def _occupation(process: ForwardProcess, t: Tensor) -> Tensor:
    """Return the probability [r,L+1] that a position is at level l = 0..L at time t [r]."""
    times, place = torch.unique(t, return_inverse=True)
    vocabulary = process.vocabulary
    # The probability of a level does not depend on the clean token; a uniform one is convenient.
    zeros = torch.zeros(len(times), vocabulary.num_tokens, dtype=torch.float64, device=t.device)
    mass = process.log_marginal(zeros.log_softmax(-1), times).exp()
    by_level = [part.sum(-1) for part in mass.split(vocabulary.level_sizes, -1)]
    return torch.stack(by_level, -1)[place]


def _sum_from_level(occupation: Tensor) -> Tensor:
    """Return the probability [r,L+1] that a position is at level l or higher, for l = 0..L.

    `occupation` [r,L+1] holds the probability of each level.
    """
    return occupation.flip(-1).cumsum(-1).flip(-1)
