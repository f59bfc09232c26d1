"""Paths of level occupancies: fields on them, and the path with the smallest line integral.

A path is a tensor [n,L] of points (F_1, ..., F_L) from (0, ..., 0) to (1, ..., 1), which rise along
the path, with 1 >= F_1 >= ... >= F_L >= 0. A field maps points [n,L] to c_1..c_L at each point,
[n,L]. The bound of a tree is the integral of sum_l c_l dF_l along the path of its clock
(`ddiff.core.detour`).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import product

import torch
from torch import Tensor

from ddiff.core.clock import CdfClock, LevelClock, LogTimeClock
from ddiff.core.schedule import MOST_VALUES, BernsteinSchedule

Field = Callable[[Tensor], Tensor]
"""Function of points [n,L] that returns the values c_1..c_L at each point, [n,L]."""

Node = tuple[int, ...]
"""Point of a lattice: the numbers of cells (F_1, ..., F_L) * cells."""


def choose_points(num_levels: int, cells: int) -> Tensor:
    """Return points [n,L] that cover the occupancies of L levels, away from the edges.

    A point is defined by the probabilities of the levels 0..L, which are proportional to k_l + 1/2
    for all numbers k_l >= 0 with sum `cells`. No level is empty, so that all c_l can be measured.
    """
    points = []
    for counts in _divide(cells, num_levels + 1):
        weights = torch.tensor(counts, dtype=torch.float64) + 0.5
        pi = weights / weights.sum()
        points.append(pi.flip(0).cumsum(0).flip(0)[1:])
    return torch.stack(points)


def _divide(total: int, parts: int) -> Iterator[Node]:
    """Yield all tuples of `parts` whole numbers >= 0 with the sum `total`."""
    if parts == 1:
        yield (total,)
        return
    for first in range(total + 1):
        for rest in _divide(total - first, parts - 1):
            yield (first, *rest)


# ---------------------------------------------------------------------- fields


@dataclass(frozen=True)
class PolynomialField:
    """Field whose components are polynomials of F_1..F_L.

    Attributes:
        exponents: [m,L] exponents of F_1..F_L in each monomial.
        coefficients: [m,L] coefficient of each monomial in c_1..c_L.
    """

    exponents: Tensor
    coefficients: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        return _evaluate_monomials(points, self.exponents) @ self.coefficients


def fit_field(points: Tensor, values: Tensor, weights: Tensor, degree: int) -> PolynomialField:
    """Fit polynomials of total degree `degree` by weighted least squares.

    Args:
        points: [n,L] points.
        values: [n,L] measured c_1..c_L.
        weights: [n,L] weights, inversely proportional to the variances of the values.
        degree: largest sum of the exponents of a monomial.
    """
    num_levels = points.shape[1]
    powers = [each for each in product(range(degree + 1), repeat=num_levels) if sum(each) <= degree]
    exponents = torch.tensor(powers, dtype=torch.float64)
    monomials = _evaluate_monomials(points, exponents)
    columns = []
    for level in range(num_levels):
        scale = weights[:, level : level + 1].sqrt()
        goal = scale * values[:, level : level + 1]
        columns.append(torch.linalg.lstsq(scale * monomials, goal).solution)
    return PolynomialField(exponents, torch.cat(columns, -1))


def _evaluate_monomials(points: Tensor, exponents: Tensor) -> Tensor:
    """Return the values [n,m] of m monomials with `exponents` [m,L] at `points` [n,L]."""
    return (points.unsqueeze(1) ** exponents).prod(-1)


def integrate_field(field: Field, path: Tensor) -> float:
    """Return the integral of sum_l c_l dF_l along the segments of a path [n,L], by midpoints."""
    middle = (path[1:] + path[:-1]) / 2.0
    return float((field(middle) * path.diff(dim=0)).sum())


# ---------------------------------------------------------------------- the best path


def find_path(field: Field, num_levels: int, cells: int) -> Tensor:
    """Return the path [n,L] on a lattice with the smallest integral of a field.

    The lattice divides every F_l into `cells` equal parts. A step of the path raises one F_l by one
    part, so that n = cells * L + 1. The integral over a step is that of `integrate_field`. The path
    is found by dynamic programming over all rising paths.
    """
    nodes = sorted(_lattice(num_levels, cells), key=sum)
    steps = [
        (node, level) for node in nodes for level in range(num_levels) if _is_free(node, level)
    ]
    costs = _step_costs(field, steps, cells)
    best = {nodes[0]: 0.0}
    came_from: dict[Node, Node] = {}
    # Steps are sorted by the node to which they lead, from near to far.
    for (node, level), cost in zip(steps, costs, strict=True):
        before = _lower(node, level)
        total = best[before] + cost
        if node not in best or total < best[node]:
            best[node] = total
            came_from[node] = before
    path = [nodes[-1]]
    while path[-1] in came_from:
        path.append(came_from[path[-1]])
    return torch.tensor(path[::-1], dtype=torch.float64) / cells


def _lattice(num_levels: int, cells: int) -> Iterator[Node]:
    """Yield all nodes (i_1, ..., i_L) with cells >= i_1 >= ... >= i_L >= 0."""
    if num_levels == 0:
        yield ()
        return
    for first in range(cells + 1):
        for rest in _lattice(num_levels - 1, first):
            yield (first, *rest)


def _is_free(node: Node, level: int) -> bool:
    """Return whether a step that raised F_l, of index `level`, can lead to the node."""
    above = node[level + 1] if level + 1 < len(node) else 0
    return node[level] > above


def _lower(node: Node, level: int) -> Node:
    return (*node[:level], node[level] - 1, *node[level + 1 :])


def _step_costs(field: Field, steps: list[tuple[Node, int]], cells: int) -> list[float]:
    """Return the integral of the field over each step, by the value at its middle."""
    ends = torch.tensor([node for node, _ in steps], dtype=torch.float64)
    level = torch.tensor([level for _, level in steps]).unsqueeze(-1)
    middle = ends.scatter_add(-1, level, torch.full(level.shape, -0.5, dtype=torch.float64))
    values = field(middle / cells).gather(-1, level).squeeze(-1)
    return (values / cells).tolist()


# ---------------------------------------------------------------------- clocks

SLOW_SHARE = 0.01
"""Share of a clock with rates 1/(1 - t) in the occupancies that keep levels apart."""


def tabulate_path(path: Tensor, means: Tensor) -> Tensor:
    """Return the points [k,L] of a path at which the mean of F_1..F_L has the values `means` [k].

    The path consists of straight segments between its points [n,L]. A point may be repeated.
    """
    at_points = path.mean(-1)
    right = torch.searchsorted(at_points, means).clamp(1, len(path) - 1)
    width = at_points[right] - at_points[right - 1]
    width = width.clamp_min(torch.finfo(width.dtype).tiny)  # 0 / 0 at a repeated point
    share = ((means - at_points[right - 1]) / width).clamp(0.0, 1.0)
    return torch.lerp(path[right - 1], path[right], share.unsqueeze(-1))


def make_path_clock(path: Tensor, inside: LevelClock, share: float) -> CdfClock:
    """Return a level clock whose occupancies follow a path.

    At time t, the clock has about the same mean occupancy as the clock `inside`, so that a network
    which depends on time receives times of the same meaning. The deviation is below 0.02 for rates
    of 1 and 2, but the table of 17 values does not follow very high or low rates: with rates of 20
    the deviation is 0.14, with rates of 0.05 it is 0.7 near t = 1. The occupancies are Bernstein
    polynomials (`BernsteinSchedule`), which smooth the path. A path may touch the edges F_l =
    F_{l+1}, where rates would be infinite, so that the points of the table are

        (1 - share) * path + share * (occupancies of `inside`).

    Args:
        path: [n,L] points of the path.
        inside: clock with 1 > F_1 > ... > F_L > 0 inside (0,1).
        share: number in (0,1].
    """
    t = torch.linspace(0.0, 1.0, MOST_VALUES, dtype=torch.float64)
    own = inside.cdf(t)
    # With high rates, all levels of `inside` round to 1 long before t = 1, and would be equal.
    slow = LogTimeClock((1.0,) * inside.num_levels).cdf(t)
    own = torch.lerp(own, slow, SLOW_SHARE)
    values = torch.lerp(tabulate_path(path, own.mean(-1)), own, share)
    # Rounding may leave [0,1] or fall by one unit in the last place.
    values = values.clamp(0.0, 1.0).cummax(0).values
    values[0] = 0.0
    values[-1] = 1.0
    return CdfClock([BernsteinSchedule(column) for column in values.T.tolist()])


def make_diagonal(num_levels: int) -> Tensor:
    """Return the path [2,L] on which all levels are reached together: masked diffusion."""
    return torch.stack([torch.zeros(num_levels), torch.ones(num_levels)]).double()
