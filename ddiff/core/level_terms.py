"""Divergences at the levels of a tree, for given occupancies of the levels.

The expected divergence at a position of level l, if all positions have the occupancies
F = (F_1, ..., F_L), is the field c_l(F). The diffusion term of the bound of a tree is the line
integral of the field along the path of the level clock (`ddiff.core.detour`).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from ddiff.core.clock import LevelClock
from ddiff.core.elbo import Network, evaluate_at, is_active
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy
from ddiff.core.tree import TreeProcess

# Halvings of [0,1] that determine a time up to rounding.
HALVINGS = 60


class LevelTerms(NamedTuple):
    """Sums over the positions of each row, by level l = 1..L.

    With many rows, the sum of `nats` of level l divided by the sum of `positions` estimates c_l(F),
    and so does the sum of `nats` divided by its expected number of positions.

    Attributes:
        nats: [B,L] float64, sum of the divergences at the positions of level l.
        positions: [B,L] float64, number of positions of level l.
    """

    nats: Tensor
    positions: Tensor


def draw_level_terms(
    process: TreeProcess,
    network: Network,
    x0: Tensor,
    scored: Tensor,
    occupancy: Tensor,
    t: float,
    rng: CounterRng,
) -> LevelTerms:
    """Draw states with given occupancies, and return the sums of the divergences by level.

    The uniforms of a row do not depend on the occupancies, so estimates at different occupancies
    are positively correlated, and their differences are accurate.

    Args:
        process: tree, whose clock is not used.
        network: function that returns the query of a corrupted batch.
        x0: [B,L] clean tokens.
        scored: bool [B,L]. Positions that are not scored stay clean and add nothing.
        occupancy: [levels] probability of having reached level l, falling with l.
        t: time that a network which depends on time receives.
        rng: random generator of the B samples.
    """
    flat = x0.flatten(0, 1)
    u = rng.uniform("occupancy", process.uniforms_per_sample).reshape(len(flat), -1)
    drawn = process.sample_at(flat, occupancy.to(u).expand(len(flat), -1), u)
    noisy = Noisy(
        zt=torch.where(scored, drawn.reshape(x0.shape), x0),
        t=torch.where(scored, t, 0.0).double(),
        clean=~scored,
    )
    evaluated = scored & is_active(process, noisy.zt)
    divergence = evaluate_at(
        network,
        noisy,
        evaluated,
        process.scope,
        process.divergence,
        x0,
        noisy.zt,
        noisy.t,
    )
    level = torch.where(evaluated, process.vocabulary.level_of(noisy.zt), 0)
    nats = []
    positions = []
    for l in range(1, process.clock.num_levels + 1):
        here = level == l
        nats.append(torch.where(here, divergence, 0.0).sum(-1))
        positions.append(here.sum(-1).double())
    return LevelTerms(torch.stack(nats, -1), torch.stack(positions, -1))


def find_time(clock: LevelClock, mean: float) -> float:
    """Return the time at which the mean of F_1..F_L of a clock is `mean`, a number in [0,1]."""
    low = 0.0
    high = 1.0
    for _ in range(HALVINGS):
        middle = (low + high) / 2.0
        at_middle = clock.cdf(torch.tensor([middle], dtype=torch.float64)).mean()
        if float(at_middle) < mean:
            low = middle
        else:
            high = middle
    return (low + high) / 2.0
