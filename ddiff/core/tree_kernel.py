"""Kernel on a vocabulary tree, with one block per pair of levels.

A kernel moves a position from level i to level j with the probability or rate K_ij. A position that
moves from node y of level i to level j gets to node z of level j with probability kappa_ij(y,z)
(see `ddiff.core.tree_parents`).
"""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff.core.kernel import Kernel, require_invertible
from ddiff.core.numerics import find_rows, to_column
from ddiff.core.tree_parents import StochasticParents, level_ids, level_slice


@final
class TreeKernel(Kernel):
    """Kernel on the states of a vocabulary tree.

    The kernel is block upper triangular, since a position only moves to higher levels.

    Args:
        levels: [r,L+1,L+1] probability or rate K_ij of a move from level i to level j, for each
            row.
        parents: probabilities of the nodes of level j, given a move from a node of level i to level
            j.
    """

    def __init__(self, levels: Tensor, parents: StochasticParents) -> None:
        self.levels = levels
        self.parents = parents
        self.num_states = parents.vocabulary.num_states

    def row(self, ids: Tensor) -> Tensor:
        values = self._zeros(ids)
        for i, j in self._level_pairs():
            rows, nodes = self._block(ids, i, j)
            kappa = self.parents.entry(i, j, ids[rows].unsqueeze(-1), nodes)
            values[rows.unsqueeze(-1), nodes] = self.levels[rows, i, j].unsqueeze(-1) * kappa
        return values

    def column(self, ids: Tensor) -> Tensor:
        values = self._zeros(ids)
        for i, j in self._level_pairs():
            rows, nodes = self._block(ids, j, i)
            kappa = self.parents.entry(i, j, nodes, ids[rows].unsqueeze(-1))
            values[rows.unsqueeze(-1), nodes] = self.levels[rows, i, j].unsqueeze(-1) * kappa
        return values

    def _zeros(self, ids: Tensor) -> Tensor:
        return torch.zeros(
            len(ids),
            self.num_states,
            dtype=self.levels.dtype,
            device=ids.device,
        )

    def _level_pairs(self) -> list[tuple[int, int]]:
        """Return all pairs of a level i and a level j >= i."""
        count = self.parents.vocabulary.num_levels + 1
        return [(i, j) for i in range(count) for j in range(i, count)]

    def _block(
        self,
        ids: Tensor,
        own_level: int,
        other_level: int,
    ) -> tuple[Tensor, Tensor]:
        """Return the indices of rows with ids at `own_level`, and all nodes of `other_level`."""
        vocabulary = self.parents.vocabulary
        rows = find_rows(vocabulary.level_of(ids) == own_level)
        return rows, level_ids(vocabulary, other_level, ids.device)

    def apply(self, vector: Tensor) -> Tensor:
        vocabulary = self.parents.vocabulary
        levels = []
        for j in range(vocabulary.num_levels + 1):
            total = vector.new_zeros(len(vector), vocabulary.level_sizes[j])
            for i in range(j + 1):
                weight = to_column(self.levels[:, i, j], vector)
                total = total + weight * self._push(vector, i, j)
            levels.append(total)
        return torch.cat(levels, -1)

    def solve(self, vector: Tensor) -> Tensor:
        """Return the solution x of x K = v for v = `vector`, level by level from the tokens up.

        Let x_j be the part of x at level j, K_ij the probability of a move from level i to level j,
        and push(x_i) the part x_i moved to level j. Then
        x_j = (v_j - sum_{i<j} K_ij push(x_i)) / K_jj.
        """
        vocabulary = self.parents.vocabulary
        diagonal = self.levels.diagonal(dim1=-2, dim2=-1)
        require_invertible((diagonal == 0).any(-1), type(self).__name__)
        # Block back substitution: `solved` is complete below level j.
        solved = torch.zeros_like(vector)
        for j in range(vocabulary.num_levels + 1):
            ids = level_slice(vocabulary, j)
            rest = vector[:, ids]
            for i in range(j):
                weight = to_column(self.levels[:, i, j], vector)
                rest = rest - weight * self._push(solved, i, j)
            solved[:, ids] = rest / to_column(diagonal[:, j], vector)
        return solved

    def _push(self, vector: Tensor, i: int, j: int) -> Tensor:
        """Return the product [r,n] of the part of `vector` at level i with the matrix kappa_ij.

        `vector` [r,S] has an entry for each state, and n is the number of nodes of level j.
        kappa_ij(y,z) is defined in the module's docstring.
        """
        vocabulary = self.parents.vocabulary
        block = vector[:, level_slice(vocabulary, i)]
        ids = level_ids(vocabulary, i, vector.device)
        index = vocabulary.ancestor(ids, j) - vocabulary.offsets[j]
        pushed = vector.new_zeros(len(vector), vocabulary.level_sizes[j])
        pushed.index_add_(-1, index, self.parents.sure[i][j] * block)
        stray = self.parents.stray[i][j]
        if stray is None:
            return pushed
        return pushed + block.sum(-1, keepdim=True) * stray.to(vector)

    def _num_rows(self) -> int:
        return len(self.levels)
