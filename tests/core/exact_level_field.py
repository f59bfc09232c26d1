"""Exact field of the bound of a tree, for sequences of two tokens, by enumeration of all states.

The field c_l(F) is the expected divergence at a position of level l, averaged over positions, if
all other positions have the occupancies F = (F_1, ..., F_L). The expectation over the tokens is
that of a given joint distribution.
"""

from __future__ import annotations

import torch
from torch import Tensor

from ddiff.core.level_paths import Field
from ddiff.core.prediction import DenseDistribution
from ddiff.core.tree import TreeProcess
from ddiff.testing.bound import Table, all_sequences

LENGTH = 2


def make_exact_field(process: TreeProcess, table: Table, log_joint: Tensor) -> Field:
    """Return the function of points [n,L] that computes c_1..c_L at each point, [n,L].

    `table` maps states and times to predicted log-probabilities, and must not depend on the time.
    """
    vocabulary = process.vocabulary
    tokens = all_sequences(vocabulary.num_tokens, LENGTH)
    states = all_sequences(vocabulary.num_states, LENGTH)
    x0 = tokens.repeat_interleave(len(states), 0)
    zt = states.repeat(len(tokens), 1)
    joint = log_joint.exp().reshape(-1).repeat_interleave(len(states))
    level = vocabulary.level_of(zt)
    kappa = _move_probabilities(process, x0, zt, level)
    divergence = _divergences(process, table, x0, zt)

    def field(points: Tensor) -> Tensor:
        return torch.stack([_at_point(point) for point in points])

    def _at_point(point: Tensor) -> Tensor:
        edges = torch.cat([point.new_ones(1), point, point.new_zeros(1)])
        pi = (edges[:-1] - edges[1:])[level]
        found = []
        for l in range(1, vocabulary.num_levels + 1):
            total = point.new_zeros(())
            for position in range(LENGTH):
                # The position is at level l for sure, and the other one with the occupancies.
                other = 1 - position
                weight = joint * kappa.prod(-1) * pi[:, other]
                here = level[:, position] == l
                total = total + (weight * divergence[:, position])[here & (weight > 0)].sum()
            found.append(total / LENGTH)
        return torch.stack(found)

    return field


def _move_probabilities(process: TreeProcess, x0: Tensor, zt: Tensor, level: Tensor) -> Tensor:
    """Return the probability of each state [n,LENGTH], given its level and the token."""
    found = torch.zeros(zt.shape, dtype=torch.float64)
    for l in range(process.vocabulary.num_levels + 1):
        here = level == l
        found[here] = process.parents.entry(0, l, x0[here], zt[here])
    return found


def _divergences(process: TreeProcess, table: Table, x0: Tensor, zt: Tensor) -> Tensor:
    half = torch.full(zt.shape, 0.5, dtype=torch.float64)
    log_p = table(zt, half).flatten(0, 1)
    dist = DenseDistribution(log_p, process.vocabulary)
    values = process.divergence(dist, x0.flatten(), zt.flatten(), half.flatten())
    return values.reshape(zt.shape)


def draw_path(num_levels: int, steps: int, generator: torch.Generator) -> Tensor:
    """Return a random rising path [n,L] of straight segments, from (0, ..., 0) to (1, ..., 1)."""
    rises = torch.rand(steps, num_levels, generator=generator, dtype=torch.float64) ** 3
    points = (rises.cumsum(0) / rises.sum(0)).sort(-1, descending=True).values
    return torch.cat([torch.zeros(1, num_levels, dtype=torch.float64), points])


def list_lattice_paths(num_levels: int, cells: int) -> list[Tensor]:
    """Return all paths of single steps on the lattice, each a tensor [cells * L + 1, L]."""
    found: list[Tensor] = []

    def extend(path: list[tuple[int, ...]]) -> None:
        last = path[-1]
        if last == (cells,) * num_levels:
            found.append(torch.tensor(path, dtype=torch.float64) / cells)
            return
        for level in range(num_levels):
            limit = cells if level == 0 else last[level - 1]
            if last[level] < limit:
                extend([*path, (*last[:level], last[level] + 1, *last[level + 1 :])])

    extend([(0,) * num_levels])
    return found


def bend(table: Table, constants: Tensor) -> Table:
    """Return a network whose logits are those of `table` plus the constants [V]."""

    def bent(zt: Tensor, t: Tensor) -> Tensor:
        return (table(zt, t) + constants).log_softmax(-1)

    return bent
