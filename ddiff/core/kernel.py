"""Kernels: linear operators on the S states, one per row of a batch.

A kernel is the generator at a time, or the transition from one time to a later time.
K[y,z] is the rate, or the probability, of going from state y to state z. Distributions are row
vectors, and `apply(v)` is v K. Structured kernels compute `row`, `column` and `apply` without
forming the [S,S] matrix. `dense` forms the matrix, for tests and small chains.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from ddiff.core.numerics import find_rows, to_column
from ddiff.errors import ArgumentError

# Largest number of states of a kernel that is solved as a dense matrix.
MAX_DENSE = 512

# Operators with a condition number up to this value are inverted by elimination, whose rounding
# errors are then small.
WELL_CONDITIONED = 1e4

# Singular values below this fraction of the largest only amplify rounding errors.
MIN_SINGULAR_SHARE = 1e-13


class Kernel(ABC):
    """Batch of r linear operators K on S states.

    The arguments `ids` are long [r], one state for each operator, and vectors are [r,S].
    """

    num_states: int

    @abstractmethod
    def row(self, ids: Tensor) -> Tensor:
        """Return K[ids, .], shape [r,S]: the rate or probability from state `ids` to each state."""

    @abstractmethod
    def column(self, ids: Tensor) -> Tensor:
        """Return K[., ids], shape [r,S]: the rate or probability from each state to state `ids`."""

    @abstractmethod
    def apply(self, vector: Tensor) -> Tensor:
        """Return the product of row vectors and operators, vector @ K, shape [r,S]."""

    def dense(self) -> Tensor:
        """Return the operators as full matrices [r,S,S].

        Takes O(r S^2) memory, so use it for tests and small chains.
        """
        rows = []
        for state in range(self.num_states):
            ids = torch.full((self._num_rows(),), state)
            rows.append(self.row(ids))
        return torch.stack(rows, 1)

    def solve(self, vector: Tensor) -> Tensor:
        """Return the solution x [r,S] of x K = vector, in the dtype of the vector.

        The default uses dense linear algebra, O(r S^3), for kernels of at most 512 states. Raises
        ArgumentError if K is singular in some row.
        """
        if self.num_states > MAX_DENSE:
            raise ArgumentError(
                f"{type(self).__name__}.solve: the kernel must have at most {MAX_DENSE} states, "
                f"since it is solved as a dense matrix; got {self.num_states}. Use a process whose "
                "transition kernel overrides solve."
            )
        transposed = self.dense().transpose(-1, -2)
        target = vector.double().unsqueeze(-1)
        solved, info = torch.linalg.solve_ex(transposed, target)
        require_invertible(info != 0, type(self).__name__)
        return solved.squeeze(-1).to(vector.dtype)

    @abstractmethod
    def _num_rows(self) -> int: ...

    def __add__(self, other: Kernel) -> Kernel:
        return SumKernel(self, other)

    def __rmul__(self, factor: Tensor) -> Kernel:
        return ScaledKernel(factor, self)


def require_invertible(singular: Tensor, name: str) -> None:
    """Raise ArgumentError if the kernel of any row is singular.

    `singular` is bool [r]. The message begins with `name`, the class of the kernel.
    """
    if bool(singular.any()):
        raise ArgumentError(
            f"{name}.solve: the kernel must be invertible in every row; {int(singular.sum())} of "
            f"{len(singular)} are singular, the first at row {int(singular.nonzero()[0, 0])}. A "
            "transition to t = 1 loses its start state, and a generator has no inverse. Use a "
            "transition to a time below 1."
        )


def solve_nearest(
    matrix: Tensor,
    base: Tensor,
    vectors: Tensor,
    index: Tensor,
) -> Tensor:
    """Solve x matrix[index] = vectors for x [r,A], with x as near to base[index] as possible.

    `matrix` [n,A,S] holds the transition probabilities of n problems from A start states to S end
    states. `base` [n,A] is a distribution over the start states of each problem. `vectors` [r,S]
    are the right-hand sides, and `index` [r] is the problem of each row.

    Each column of `matrix` belongs to an end state and is divided by the probability of this state
    under `base`. Rare end states, such as tokens at a time at which most tokens are masked, then
    count as much as frequent ones. If `vectors` do not determine some combination of the start
    states, x agrees with `base` in it. Three steps of iterative refinement, starting from `base`,
    make small probabilities accurate relative to their size. This accuracy matters, because
    decoding formulas multiply small probabilities by factors of order 1/t.
    """
    reached = (base.unsqueeze(1) @ matrix).squeeze(1)
    # End states that no start state reaches get scale 0, since 1/0 would lead to inf * 0.
    inverse_reached = 1.0 / torch.where(reached > 0, reached, 1.0)
    scale = torch.where(reached > 0, inverse_reached, 0.0)
    scaled = matrix * scale.unsqueeze(1)
    inverse = torch.linalg.pinv(scaled, rtol=MIN_SINGULAR_SHARE)
    targets = vectors * scale[index]
    x = vectors.new_zeros(len(vectors), matrix.shape[1])
    # One problem at a time: [r,A,S] would be as large as the batch times the square of S.
    for k in range(len(matrix)):
        rows = find_rows(index == k)
        solved = base[k].expand(len(rows), -1)
        # Each round of refinement adds the solution for the residual, which removes the errors of
        # `pinv` in small entries.
        for _ in range(3):
            residual = targets[rows] - solved @ scaled[k]
            solved = solved + residual @ inverse[k]
        x = x.index_copy(0, rows, solved)
    return x


def solve_well_conditioned(
    square: Tensor,
    s: Tensor,
    time_index: Tensor,
    p: Tensor,
) -> Tensor:
    """Replace p [r,V] by the solution of p K = s in rows whose operator K is well conditioned.

    `square` [n,S,S] holds the operators K of n times, `time_index` [r] the index of the time of
    each row, and `s` [r,S] the right-hand sides, which are scores. The result is [r,V]. Gaussian
    elimination keeps the relative accuracy of small probabilities at small t. This accuracy
    matters, because decoding formulas multiply small probabilities by factors of order 1/t.
    """
    well_conditioned = torch.linalg.cond(square) < WELL_CONDITIONED
    for k in find_rows(well_conditioned).tolist():
        rows = find_rows(time_index == k)
        # For row vectors, p K = s is the system K^T p^T = s^T.
        solved = torch.linalg.solve(square[k].T, s[rows].T).T
        p = p.index_copy(0, rows, solved[:, : p.shape[1]])
    return p


@final
class DenseKernel(Kernel):
    """Kernel given by explicit matrices [r,S,S], one per row."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.num_states = matrix.shape[-1]

    def row(self, ids: Tensor) -> Tensor:
        rows = torch.arange(len(ids), device=ids.device)
        return self.matrix[rows, ids]

    def column(self, ids: Tensor) -> Tensor:
        rows = torch.arange(len(ids), device=ids.device)
        return self.matrix[rows, :, ids]

    def apply(self, vector: Tensor) -> Tensor:
        product = vector.unsqueeze(1) @ self.matrix.to(vector.dtype)
        return product.squeeze(1)

    def dense(self) -> Tensor:
        return self.matrix

    def _num_rows(self) -> int:
        return len(self.matrix)


@final
class InterpolatingKernel(Kernel):
    """Diagonal plus rank-one kernel: K[y,z] = stay 1[y=z] + arrive[z] for states y and z.

    `stay` is [r] and `arrive` [r,S]. A transition keeps the state with probability `stay`, and
    otherwise draws a new state in proportion to `arrive`. A generator has stay = -sum(arrive).
    """

    def __init__(self, stay: Tensor, arrive: Tensor) -> None:
        self.stay = stay
        self.arrive = arrive
        self.num_states = arrive.shape[-1]

    def row(self, ids: Tensor) -> Tensor:
        return self.arrive + self._diagonal(ids)

    def column(self, ids: Tensor) -> Tensor:
        arrive = self.arrive.gather(-1, ids.unsqueeze(-1))
        return arrive + self._diagonal(ids)

    def apply(self, vector: Tensor) -> Tensor:
        total = vector.sum(-1, keepdim=True)
        kept = to_column(self.stay, vector) * vector
        return kept + total * self.arrive.to(vector.dtype)

    def solve(self, vector: Tensor) -> Tensor:
        """Return the solution x of x K = v for the vector v.

        Let |.| be the sum of the entries of a vector. For the attributes `stay` and `arrive` of the
        kernel, x = (v - |x| arrive) / stay, with |x| = |v| / (stay + |arrive|).
        """
        row_sum = self.stay + self.arrive.sum(-1)
        # A row sum as small as the rounding error of `stay` is the exact 0 of a generator.
        is_rounding = row_sum.abs() <= 1e-15 * self.stay.abs()
        singular = (self.stay == 0) | is_rounding
        require_invertible(singular, type(self).__name__)
        total = vector.sum(-1, keepdim=True) / to_column(row_sum, vector)
        arrived = total * self.arrive.to(vector.dtype)
        return (vector - arrived) / to_column(self.stay, vector)

    def _diagonal(self, ids: Tensor) -> Tensor:
        """Return a matrix [r,S] with the probability `stay` of each row at its id, else 0."""
        zeros = torch.zeros_like(self.arrive)
        stay = self.stay.unsqueeze(-1)
        return zeros.scatter(-1, ids.unsqueeze(-1), stay)

    def _num_rows(self) -> int:
        return len(self.stay)


@final
class SumKernel(Kernel):
    """Sum of two kernels."""

    def __init__(self, first: Kernel, second: Kernel) -> None:
        self.first = first
        self.second = second
        self.num_states = first.num_states

    def row(self, ids: Tensor) -> Tensor:
        return self.first.row(ids) + self.second.row(ids)

    def column(self, ids: Tensor) -> Tensor:
        return self.first.column(ids) + self.second.column(ids)

    def apply(self, vector: Tensor) -> Tensor:
        return self.first.apply(vector) + self.second.apply(vector)

    def _num_rows(self) -> int:
        return self.first._num_rows()


@final
class ScaledKernel(Kernel):
    """Kernel that multiplies each of the r operators of another kernel by its entry of `factor`."""

    def __init__(self, factor: Tensor, kernel: Kernel) -> None:
        self.factor = factor
        self.kernel = kernel
        self.num_states = kernel.num_states

    def row(self, ids: Tensor) -> Tensor:
        return self.factor.unsqueeze(-1) * self.kernel.row(ids)

    def column(self, ids: Tensor) -> Tensor:
        return self.factor.unsqueeze(-1) * self.kernel.column(ids)

    def apply(self, vector: Tensor) -> Tensor:
        return to_column(self.factor, vector) * self.kernel.apply(vector)

    def solve(self, vector: Tensor) -> Tensor:
        require_invertible(self.factor == 0, type(self).__name__)
        return self.kernel.solve(vector) / to_column(self.factor, vector)

    def _num_rows(self) -> int:
        return self.kernel._num_rows()
