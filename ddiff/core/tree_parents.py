"""Stochastic parents: the probability of each node when a position moves up a vocabulary tree.

A position that moves up to level l gets to the parent of its node with probability xi_l. It gets to
each of the other n_l - 1 nodes of level l with probability (1 - xi_l)/(n_l - 1).

kappa_ij(y,z) is the probability of node z if a position moves from node y of level i to level j. It
is the sum of a part A_ij at the ancestor anc_j(y) of y at level j, and of a remainder r_ij that
does not depend on y:

    kappa_ij(y,z) = A_ij 1[anc_j(y) = z] + r_ij(z)
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from ddiff.core.numerics import Constant, draw_index, find_rows, safe_log
from ddiff.core.vocabulary import Vocabulary
from ddiff.errors import ArgumentError


class StochasticParents:
    """Probabilities kappa_ij(y,z) of node z if a position moves from node y of level i to level j.

    kappa_ij(y,z) = A_ij 1[z is the ancestor of y] + r_ij(z), where the number A_ij and the vector
    r_ij follow from `xi` and the sizes of the levels.

    Args:
        vocabulary: the tree.
        xi: for each level 1..L, the probability that a position that moves up to this level gets to
            its parent. A level with a single node has xi = 1.

    Attributes:
        sure: `sure[i][j]` is the number A_ij.
        stray: `stray[i][j]` is the vector r_ij over the nodes of level j in id order, or None if
            r_ij is zero.
        is_deterministic: whether all xi are 1.
    """

    def __init__(self, vocabulary: Vocabulary, xi: Sequence[float]) -> None:
        self.vocabulary = vocabulary
        upper_sizes = vocabulary.level_sizes[1:]
        # The only node of a level is the parent of all nodes below it.
        self.xi = tuple(1.0 if n == 1 else float(x) for x, n in zip(xi, upper_sizes))
        self.is_deterministic = all(x == 1.0 for x in self.xi)
        levels = range(vocabulary.num_levels + 1)
        self.sure = [[0.0] * len(levels) for _ in levels]
        self.stray: list[list[Tensor | None]] = [[None] * len(levels) for _ in levels]
        for i in levels:
            self.sure[i][i] = 1.0
            for j in range(i + 1, len(levels)):
                self._add_level(i, j)
        self._stray_constants: list[list[Constant | None]] = []
        for row in self.stray:
            constants = [None if stray is None else Constant(stray) for stray in row]
            self._stray_constants.append(constants)
        tables = [self._table_from_tokens(level) for level in levels]
        self._from_tokens = Constant(torch.cat(tables, 1))

    def _add_level(self, i: int, j: int) -> None:
        """Compute A_ij and r_ij (defined in the class) from A_i,j-1 and r_i,j-1.

        A move from level j-1 to level j turns a distribution p over the nodes of level j-1 into
        a * push(p) + b over the n nodes of level j. Here push(p) moves the probability of each node
        to its parent, b = (1 - xi_j)/(n - 1) and a = xi_j - b.
        """
        size = self.vocabulary.level_sizes[j]
        xi = self.xi[j - 1]
        b = 0.0 if xi == 1.0 else (1.0 - xi) / (size - 1)
        a = xi - b
        self.sure[i][j] = a * self.sure[i][j - 1]
        below = self.stray[i][j - 1]
        if below is None and b == 0.0:
            return
        pushed = torch.zeros(size, dtype=torch.float64)
        if below is not None:
            pushed.index_add_(0, self.vocabulary.parents[j - 1], below)
        # b is spread evenly over level j, and the remainder of level j-1 moves to the parents.
        self.stray[i][j] = a * pushed + b

    def _table_from_tokens(self, level: int) -> Tensor:
        """Return the probabilities of moves from tokens to the n nodes of level l = `level`.

        A token x moves to a node z with probability A_0l 1[z is the ancestor of x] + r_0l(z). The
        table [2,n] holds the two numbers A_0l and r_0l(z) for each node z.
        """
        stray = self.stray[0][level]
        if stray is None:
            stray = torch.zeros(self.vocabulary.level_sizes[level], dtype=torch.float64)
        sure = torch.full_like(stray, self.sure[0][level])
        return torch.stack([sure, stray])

    def from_tokens(self, z: Tensor) -> tuple[Tensor, Tensor]:
        """Return A_0l [r] and r_0l(z) [r] for ids z, where l is the level of each id.

        A token x moves to z with probability A_0l 1[z is the ancestor of x] + r_0l(z).
        """
        sure, stray = self._from_tokens.on(z.device)[:, z]
        return sure, stray

    def entry(self, i: int, j: int, y: Tensor, z: Tensor) -> Tensor:
        """Return kappa_ij(y,z), the probability that a move from node y to level j ends at node z.

        The ids y are at level i, and the ids z at level j. Their shapes are broadcast.
        """
        is_ancestor = self.vocabulary.ancestor(y, j) == z
        sure = self.sure[i][j] * is_ancestor.double()
        return sure + self.stray_at(i, j, z)

    def stray_at(self, i: int, j: int, z: Tensor) -> Tensor:
        """Return r_ij(z) for ids z of level j.

        kappa_ij(y,z) is the probability that a position moves from node y of level i to node z.
        r_ij(z) is the part of kappa_ij(y,z) that does not depend on y.
        """
        stray = self._stray_constants[i][j]
        if stray is None:
            return torch.zeros(z.shape, dtype=torch.float64, device=z.device)
        return stray.on(z.device)[z - self.vocabulary.offsets[j]]

    def log_spread(self, i: int, j: int, log_mass: Tensor) -> Tensor:
        """Return the log-probabilities [r,n] of the n nodes of level j after a move from level i.

        `log_mass` [r,n] holds for each node z of level j the log-probability that z is the ancestor
        of the node at level i.
        """
        stray = self._stray_constants[i][j]
        if stray is None:
            return log_mass
        remainder = stray.on(log_mass.device).to(log_mass.dtype)
        return safe_log(self.sure[i][j] * log_mass.exp() + remainder)

    def draw(self, ids: Tensor, level: Tensor, u: Tensor) -> Tensor:
        """Draw for each id the node of level `level` [r] to which it moves, with uniforms u[:,1].

        xi is the probability that a move up one level gets to the parent. If xi is 1 at all levels,
        the node is the ancestor of the id, and u is not used.
        """
        ancestor = self.vocabulary.ancestor(ids, level)
        if self.is_deterministic:
            return ancestor
        # One pair of levels at a time, since the vectors r_ij have different lengths.
        drawn = ancestor.clone()
        own = self.vocabulary.level_of(ids)
        for i in range(self.vocabulary.num_levels):
            for j in range(i + 1, self.vocabulary.num_levels + 1):
                rows = find_rows((own == i) & (level == j))
                if self.stray[i][j] is not None and len(rows):
                    stray = self._draw_stray(ancestor[rows], i, j, u[rows, 1])
                    drawn[rows] = stray
        return drawn

    def _draw_stray(self, ancestor: Tensor, i: int, j: int, u: Tensor) -> Tensor:
        """Draw for nodes of level i the node z of level j to which each moves, with uniforms u [r].

        The probability of z is A_ij 1[z = ancestor] + r_ij(z). The docstring of the class defines
        A_ij, r_ij and xi. `ancestor` [r] holds the ancestors at level j of the nodes of level i.
        A_ij can be negative if xi < 1/n for a level with n nodes.
        """
        stray = self.stray[i][j]
        assert stray is not None
        remainder = stray.to(u.device).repeat(len(ancestor), 1)
        place = (ancestor - self.vocabulary.offsets[j]).unsqueeze(-1)
        sure = remainder.new_full(place.shape, self.sure[i][j])
        weights = remainder.scatter_add(-1, place, sure)
        return self.vocabulary.offsets[j] + draw_index(weights, u)

    def node_information(self, level: int, mass: Tensor) -> Tensor:
        """Return the information H(node) - H(node | X) in nats that a node carries on the token X.

        The node is the one to which a position at token X moves when it moves to level `level`.
        `mass` [n] holds for each of the n nodes of this level the probability that it is the
        ancestor of X.
        """
        stray = self.stray[0][level]
        if stray is None:
            return -torch.special.xlogy(mass, mass).sum()
        sure = self.sure[0][level]
        spread = sure * mass + stray
        # Given X, each node z has the probability r(z), and the ancestor of X has A in addition.
        at_ancestor = torch.special.xlogy(sure + stray, sure + stray)
        at_ancestor = at_ancestor - torch.special.xlogy(stray, stray)
        conditional = torch.special.xlogy(stray, stray).sum()
        conditional = conditional + (mass * at_ancestor).sum()
        return conditional - torch.special.xlogy(spread, spread).sum()


def level_slice(vocabulary: Vocabulary, level: int) -> slice:
    """Return the ids of a level as a slice."""
    offset = vocabulary.offsets[level]
    return slice(offset, offset + vocabulary.level_sizes[level])


def level_ids(vocabulary: Vocabulary, level: int, device: torch.device) -> Tensor:
    """Return the ids of a level as a tensor [n]."""
    return vocabulary.offsets[level] + torch.arange(vocabulary.level_sizes[level], device=device)


def check_xi(xi: float | Sequence[float], num_levels: int) -> tuple[float, ...]:
    """Return xi for each level 1..L above the tokens as a tuple.

    xi is the probability that a position moves to its own parent, instead of another node of the
    level. A single number is used for all levels. If only the value of level L (the root) is
    missing, it is set to 1.

    Raises ArgumentError if the number of values or their range does not fit.
    """
    if isinstance(xi, (int, float)):
        values = (float(xi),) * num_levels
    else:
        values = tuple(float(x) for x in xi)
    if len(values) == num_levels - 1:
        values = (*values, 1.0)
    if len(values) != num_levels or not all(0.0 < x <= 1.0 for x in values):
        raise ArgumentError(
            f"TreeProcess: xi must be one number in (0, 1], or one for each of the {num_levels} "
            f"levels above the tokens; got {xi}. xi is the probability that a position moves to "
            "its own parent; 1 makes parents deterministic."
        )
    return values
