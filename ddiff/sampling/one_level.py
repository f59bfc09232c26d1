"""Step of the published hierarchical sampler: at most one level down (arXiv 2510.08632)."""

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
    """Sampler for trees that moves a position down at most one level in a step. Order 1.

    In a step from time t to time s, a position at level l leaves the level with probability
    min(1, (F_l(t) - F_l(s)) / pi_l(t)). Here pi_l(t) is the probability that a position is at
    level l at time t, and F_l the sum of pi_m over m >= l. Level 0 contains the tokens. If the
    fraction is at most 1 for every l, every level has its exact probability at time s after the
    step.

    The step differs from the ancestral step, which may pass several levels at once. With one level
    above the tokens the two steps are equal. The last step draws tokens at all positions. The
    process must be monotone: its reverse steps only move down the tree.
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
    """Draw descendants [k] of `node` [k] at `level` [k] from `dist`, with uniforms u [k]."""
    return dist.draw(node, level, u)


def _leave_probability(process: ForwardProcess, level: Tensor, t: Tensor, s: Tensor) -> Tensor:
    """Return (F_l(t) - F_l(s)) / pi_l(t) [r] for the levels l [r]; a value may exceed 1."""
    level = level.unsqueeze(-1)
    pi_t = _occupation(process, t)
    pi_s = _occupation(process, s)
    decrease = _sum_from_level(pi_t) - _sum_from_level(pi_s)
    return (decrease.gather(-1, level) / pi_t.gather(-1, level)).squeeze(-1)


def _occupation(process: ForwardProcess, t: Tensor) -> Tensor:
    """Return pi_l(t) [r,L+1], the probability that a position is at level l."""
    times, place = torch.unique(t, return_inverse=True)
    vocabulary = process.vocabulary
    # The probability of a level does not depend on the clean token; a uniform one is convenient.
    zeros = torch.zeros(len(times), vocabulary.num_tokens, dtype=torch.float64, device=t.device)
    mass = process.log_marginal(zeros.log_softmax(-1), times).exp()
    by_level = [part.sum(-1) for part in mass.split(vocabulary.level_sizes, -1)]
    return torch.stack(by_level, -1)[place]


def _sum_from_level(occupation: Tensor) -> Tensor:
    """Return F_l [r,L+1], the sum of pi_m over m >= l."""
    return occupation.flip(-1).cumsum(-1).flip(-1)
