"""Kernels: one linear operator on the states per row, for generators and finite transitions.

Row convention: K[y,z] is the rate, or the probability, of going from y to z. Distributions are
row vectors and `apply(v)` is v K. Structured kernels compute `row`, `column` and `apply` without
forming [S,S]; `dense` is for the oracle.
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

# Singular values below this share of the largest hold only the rounding errors of a vector.
MIN_SINGULAR_SHARE = 1e-13


class Kernel(ABC):
    """r operators on S states; ids [r] long, vectors [r,S]."""

    num_states: int

    @abstractmethod
    def row(self, ids: Tensor) -> Tensor:
        """[r,S] K[ids, .]: where the state of each row goes."""

    @abstractmethod
    def column(self, ids: Tensor) -> Tensor:
        """[r,S] K[., ids]: where the state of each row may have come from."""

    @abstractmethod
    def apply(self, vector: Tensor) -> Tensor:
        """[r,S] vector @ K."""

    def dense(self) -> Tensor:
        """[r,S,S] the whole operator, from its rows. Oracle only: O(r S^2) memory."""
        rows = []
        for state in range(self.num_states):
            ids = torch.full((self._num_rows(),), state)
            rows.append(self.row(ids))
        return torch.stack(rows, 1)

    def solve(self, vector: Tensor) -> Tensor:
        """[r,S] x with x K = vector, in the vector's dtype; ArgumentError if K is singular.

        Derived: dense linear algebra, O(r S^3), for kernels of at most 512 states.
        """
        if self.num_states > MAX_DENSE:
            raise ArgumentError(
                f"{type(self).__name__}.solve: the kernel must have at most {MAX_DENSE} states, "
                f"since it is solved as a dense matrix; got {self.num_states}. Use a process whose "
                "transition has its own structure."
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
    """Raise ArgumentError if a row of a kernel has no inverse; singular bool [r]."""
    if bool(singular.any()):
        raise ArgumentError(
            f"{name}.solve: the kernel must be invertible in every row; {int(singular.sum())} of "
            f"{len(singular)} are singular, the first at row {int(singular.nonzero()[0, 0])}. A "
            "transition up to t = 1 forgets where it came from, and a generator has no inverse: "
            "start below t = 1."
        )


def solve_nearest(
    matrix: Tensor,
    base: Tensor,
    vectors: Tensor,
    index: Tensor,
) -> Tensor:
    """[r,A] distributions x with x matrix[index] = vectors [r,S], nearest to base[index].

    matrix [n,A,S] holds transition probabilities, base [n,A] a distribution of their starts, and
    index [r] the one of the n problems that a row belongs to. Columns are divided by their
    probability under base: rare states, such as tokens late in masking, then count as much as
    frequent ones. Directions in which the starts cannot be told apart are those of base. Starting
    from base, three steps of refinement by the residual give small probabilities their own relative
    accuracy, which evidence of 1/t multiplies.
    """
    reached = (base.unsqueeze(1) @ matrix).squeeze(1)
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
        for _ in range(3):
            residual = targets[rows] - solved @ scaled[k]
            solved = solved + residual @ inverse[k]
        x = x.index_copy(0, rows, solved)
    return x


@final
class DenseKernel(Kernel):
    """Any matrices [r,S,S]."""

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
    """K[y,z] = stay 1[y=z] + arrive[z]: a diagonal plus rank one, equal arrivals from every state.

    stay [r], arrive [r,S]. As a transition: keep the state with probability `stay`, else redraw it
    in proportion to `arrive`. As a generator: stay = -sum(arrive).
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
        """x = (v - |x| arrive) / stay, with |x| = |v| / (stay + |arrive|)."""
        row_sum = self.stay + self.arrive.sum(-1)
        # A row sum that is rounding of `stay` alone is the 0 of a generator.
        is_rounding = row_sum.abs() <= 1e-15 * self.stay.abs()
        singular = (self.stay == 0) | is_rounding
        require_invertible(singular, type(self).__name__)
        total = vector.sum(-1, keepdim=True) / to_column(row_sum, vector)
        arrived = total * self.arrive.to(vector.dtype)
        return (vector - arrived) / to_column(self.stay, vector)

    def _diagonal(self, ids: Tensor) -> Tensor:
        """[r,S] `stay` at ids, 0 elsewhere."""
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
    """A kernel times a factor per row [r]."""

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
