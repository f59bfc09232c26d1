"""The step of the published hierarchical sampler: one level down at a time (arXiv 2510.08632)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.sampling.grid_sampler import GridSampler, draw_uniforms
from ddiff.sampling.loop import Canvas, Predicts, step_rows
from ddiff.sampling.unmasking import require_monotone


@final
class OneLevelSampler(GridSampler):
    """From level l one down with probability min(1, (F_l(t) - F_l(s)) / pi_l(t)), F_l the share at l or above.

    Order 1. A mask takes at least as many steps as there are levels. The share of every level is kept where nothing is cut
    off at 1, but it is not the posterior, which may pass several levels; on one level the two are the same. The last step
    draws words. Needs a monotone process.
    """

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_monotone(self, process, predicts)

    def move(
        self, process: ForwardProcess, network: Network, canvas: Canvas, s: Tensor, rng: CounterRng
    ) -> Canvas:
        u, then = draw_uniforms(rng, "level", 2), s.reshape(-1)
        level_of = process.vocabulary.level_of

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            level = level_of(zt).unsqueeze(-1)
            now, soon = occupation(process, t), occupation(process, then[rows])
            fallen = (above(now) - above(soon)).gather(-1, level) / now.gather(-1, level)
            moving = (u[rows, 0] < fallen.squeeze(-1)).nonzero().squeeze(-1)
            below = level.squeeze(-1) - 1

            zs = zt.clone()
            if len(moving):
                z = zt[moving]
                zs[moving] = query(
                    moving, process.scope(z), draw_below, z, below[moving], u[rows[moving], 1]
                )
            return zs

        return canvas.advance(step_rows(network, canvas, draw, process.active(canvas.zt)), s)


def draw_below(dist: CleanDistribution, node: Tensor, level: Tensor, u: Tensor) -> Tensor:
    """Draw [k] descendants of node [k] at level [k]."""
    return dist.draw(node, level, u)


def occupation(process: ForwardProcess, t: Tensor) -> Tensor:
    """[r,L+1] pi_l(t), how much of a position's law is at each level."""
    times, place = torch.unique(t, return_inverse=True)
    vocabulary = process.vocabulary
    flat = torch.zeros(
        len(times), vocabulary.num_tokens, dtype=torch.float64, device=t.device
    ).log_softmax(-1)
    mass = process.log_marginal(flat, times).exp()
    return torch.stack([part.sum(-1) for part in mass.split(vocabulary.level_sizes, -1)], -1)[place]


def above(occupation: Tensor) -> Tensor:
    """[r,L+1] F_l = sum of pi_m over m >= l."""
    return occupation.flip(-1).cumsum(-1).flip(-1)
