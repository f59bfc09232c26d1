"""Detours: level occupancies near the path of a level clock, for training.

A level clock defines a path of the occupancies (F_1, ..., F_L), from (0, ..., 0) at t = 0 to
(1, ..., 1) at t = 1. F_l(t) is the probability that a position has reached level l, and
1 >= F_1 >= ... >= F_L >= 0. The diffusion term of the bound is the line integral

    sum_l integral c_l(F) dF_l

along the path. c_l(F) is the expected divergence at a position of level l if all other positions
have the occupancies F. The value is a bound for every rising path, and all paths have the same
value if the predictions are exact.

A detour is the path (1 - m) F(t) + m H(t) with a share m in [0,1). H is an extreme path, on which
levels are reached one after the other or together. The levels are divided into groups of
neighbouring levels. On H, the levels of a group are reached together, and a group is reached after
the groups below it. H(t) is the point of the extreme path with the mean occupancy of F(t),

    M(t) = (F_1(t) + ... + F_L(t)) / L,    H_l = clamp((L M - lower_l) / size_l, 0, 1),

where size_l is the number of levels in the group of level l, and lower_l the number of levels in
the groups below it. A single group is the diagonal F_1 = ... = F_L, which is masked diffusion.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple, final

import torch
from torch import Tensor

from ddiff.core.clock import LevelClock
from ddiff.core.numerics import evaluate_per_time, interior
from ddiff.errors import ArgumentError


class Detour(NamedTuple):
    """Detours of positions from the path of the level clock.

    Attributes:
        share: float64, share m in [0,1) of the extreme path in the occupancies.
        choice: float64 in [0,1), which selects one of the 2^(L-1) extreme paths of L levels.
    """

    share: Tensor
    choice: Tensor

    def take(self, rows: Tensor) -> Detour:
        """Return the detours at the flattened indices `rows` [r], two tensors [r]."""
        return Detour(self.share.reshape(-1)[rows], self.choice.reshape(-1)[rows])

    def flatten(self) -> Detour:
        """Return the detours of all positions as two tensors [r]."""
        return Detour(self.share.reshape(-1), self.choice.reshape(-1))


@final
class DetourClock(LevelClock):
    """Level clock of r rows with a detour each. All methods take r times, one for each row.

    The clock is used only to draw states and to compute weights in training.

    Args:
        clock: clock whose path the detours leave.
        detour: detours of the rows, two tensors [r].
    """

    def __init__(self, clock: LevelClock, detour: Detour) -> None:
        self.clock = clock
        self.num_levels = clock.num_levels
        self.closes_at_clean = clock.closes_at_clean
        self.closes_at_prior = clock.closes_at_prior
        self._share = detour.share.unsqueeze(-1)
        lower, size = tabulate_groups(clock.num_levels)
        row = (detour.choice * len(lower)).long()
        self._lower = lower.to(row.device)[row]
        self._size = size.to(row.device)[row]

    def per_time(self, values: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        """Return values(t) for all rows, since rows with equal times have different detours."""
        return values(t)

    def cdf(self, t: Tensor) -> Tensor:
        path = evaluate_per_time(self.clock.cdf, t)
        return torch.lerp(path, self._progress(path).clamp(0.0, 1.0), self._share)

    def pi(self, t: Tensor) -> Tensor:
        path = evaluate_per_time(self.clock.cdf, t)
        extreme = self._progress(path).clamp(0.0, 1.0)
        start = torch.ones_like(extreme[:, :1])
        end = torch.zeros_like(extreme[:, :1])
        reached = torch.cat([start, extreme, end], -1)
        # The probabilities of the clock itself are accurate if they are near 0.
        own = evaluate_per_time(self.clock.pi, t)
        return torch.lerp(own, reached[:, :-1] - reached[:, 1:], self._share)

    def inflow(self, t: Tensor) -> Tensor:
        t = interior(t)
        own = evaluate_per_time(self.clock.inflow, t)
        progress = self._progress(evaluate_per_time(self.clock.cdf, t))
        moves = (progress >= 0.0) & (progress < 1.0)
        extreme = torch.where(moves, own.sum(-1, keepdim=True) / self._size, 0.0)
        return torch.lerp(own, extreme, self._share)

    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        raise ArgumentError(
            "DetourClock.transition: detours are for training, which needs no transitions. Use the "
            "clock of the process."
        )

    def _progress(self, cdf: Tensor) -> Tensor:
        """Return (L M - lower_l) / size_l [r,L], which rises through [0,1] as H_l does."""
        return (cdf.sum(-1, keepdim=True) - self._lower) / self._size


def tabulate_groups(num_levels: int) -> tuple[Tensor, Tensor]:
    """Return lower_l and size_l [2^(L-1),L] of all divisions of L levels into groups.

    Row 0 is the division with one level per group, and the last row that with a single group.
    """
    lower = []
    size = []
    for pattern in range(2 ** (num_levels - 1)):
        # Bit l - 1 of the pattern joins the levels l and l + 1.
        starts = [0]
        for level in range(1, num_levels):
            joined = bool(pattern >> (level - 1) & 1)
            starts.append(starts[-1] if joined else level)
        lower.append(starts)
        size.append([starts.count(start) for start in starts])
    return torch.tensor(lower, dtype=torch.float64), torch.tensor(size, dtype=torch.float64)
