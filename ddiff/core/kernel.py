"""Kernels: one linear operator on the states per row. Generators and finite transitions are both kernels.

Row convention: K[y,z] is the rate, or the probability, of going from y to z; laws are row vectors and `apply(v) = v K`.
Structured kernels answer `row`, `column` and `apply` without ever forming [S,S]; `dense` is for the oracle.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from ddiff.core.numerics import to_column
from ddiff.errors import ArgumentError

MAX_DENSE = 512
FORGOTTEN = 1e-13  # singular values, relative to the largest, below which only the rounding of a vector would be read


class Kernel(ABC):
    """r operators on S states; ids [r] long, vectors [r,S]."""

    num_states: int

    @abstractmethod
    def row(self, ids: Tensor) -> Tensor:
        """[r,S] K[ids, .]: where each row's state goes."""

    @abstractmethod
    def column(self, ids: Tensor) -> Tensor:
        """[r,S] K[., ids]: where each row's state may have come from."""

    @abstractmethod
    def apply(self, vector: Tensor) -> Tensor:
        """[r,S] vector @ K."""

    def dense(self) -> Tensor:
        """[r,S,S] the whole operator, from its rows. Oracle only: O(r S^2) memory."""
        rows = [self.row(torch.full((self._num_rows(),), y)) for y in range(self.num_states)]
        return torch.stack(rows, 1)

    def solve(self, vector: Tensor) -> Tensor:
        """[r,S] x with x K = vector, in the vector's dtype; ArgumentError where K is singular.

        Derived: dense linear algebra, O(r S^3), for kernels of at most 512 states.
        """
        if self.num_states > MAX_DENSE:
            raise ArgumentError(
                f"{type(self).__name__}.solve: the kernel must have at most {MAX_DENSE} states, since it is solved as "
                f"a dense matrix; got {self.num_states}. Use a process whose transition has a structure of its own."
            )
        solved, info = torch.linalg.solve_ex(
            self.dense().transpose(-1, -2), vector.double().unsqueeze(-1)
        )
        require_invertible(info != 0, type(self).__name__)
        return solved.squeeze(-1).to(vector.dtype)

    @abstractmethod
    def _num_rows(self) -> int: ...

    def __add__(self, other: Kernel) -> Kernel:
        return SumKernel(self, other)

    def __rmul__(self, factor: Tensor) -> Kernel:
        return ScaledKernel(factor, self)


def require_invertible(singular: Tensor, name: str) -> None:
    """ArgumentError where a row of a kernel [r] has no inverse."""
    if bool(singular.any()):
        raise ArgumentError(
            f"{name}.solve: the kernel must be invertible in every row; {int(singular.sum())} of {len(singular)} are "
            f"singular, the first at row {int(singular.nonzero()[0, 0])}. A transition up to t = 1 forgets where it came "
            "from, and a generator has no inverse: start below t = 1."
        )


def solve_nearest(matrix: Tensor, base: Tensor, vectors: Tensor, place: Tensor) -> Tensor:
    """[r,A] distributions x with x matrix[place] = vectors [r,S], where several may be, the nearest to base[place].

    matrix [n,A,S] holds transition probabilities, base [n,A] a distribution of where they start, place [r] which of the n
    a row is of. Columns are divided by what base makes of them: states that are rare, such as tokens late in masking, then
    count as much as frequent ones. What is left is how well starts can be told from one another; directions in which they
    cannot be told are those of base. From base on, three steps of refinement by the residual: small probabilities get a
    relative accuracy of their own, which evidence of 1/t multiplies.
    """
    reached = (base.unsqueeze(1) @ matrix).squeeze(1)
    scale = torch.where(reached > 0, 1.0 / torch.where(reached > 0, reached, 1.0), 0.0)
    scaled = matrix * scale.unsqueeze(1)
    inverse = torch.linalg.pinv(scaled, rtol=FORGOTTEN)
    targets = vectors * scale[place]
    x = torch.zeros(len(vectors), matrix.shape[1], dtype=vectors.dtype, device=vectors.device)
    for k in range(
        len(matrix)
    ):  # one by one: [r,A,S] would be as large as the batch times the square of S
        rows = (place == k).nonzero().squeeze(-1)
        solved = base[k].expand(len(rows), -1)
        for _ in range(3):
            solved = solved + (targets[rows] - solved @ scaled[k]) @ inverse[k]
        x = x.index_copy(0, rows, solved)
    return x


@final
class DenseKernel(Kernel):
    """Any matrices [r,S,S]."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.num_states = matrix.shape[-1]

    def row(self, ids: Tensor) -> Tensor:
        return self.matrix[torch.arange(len(ids), device=ids.device), ids]

    def column(self, ids: Tensor) -> Tensor:
        return self.matrix[torch.arange(len(ids), device=ids.device), :, ids]

    def apply(self, vector: Tensor) -> Tensor:
        return (vector.unsqueeze(1) @ self.matrix.to(vector.dtype)).squeeze(1)

    def dense(self) -> Tensor:
        return self.matrix

    def _num_rows(self) -> int:
        return len(self.matrix)


@final
class InterpolatingKernel(Kernel):
    """K[y,z] = stay 1[y=z] + arrive[z]: a diagonal plus rank one, the same arrivals from every state.

    stay [r], arrive [r,S]. As a transition: keep with `stay`, else redraw. As a generator: stay = -sum(arrive).
    """

    def __init__(self, stay: Tensor, arrive: Tensor) -> None:
        self.stay, self.arrive = stay, arrive
        self.num_states = arrive.shape[-1]

    def row(self, ids: Tensor) -> Tensor:
        return self.arrive + self._diagonal(ids)

    def column(self, ids: Tensor) -> Tensor:
        return self.arrive.gather(-1, ids.unsqueeze(-1)) + self._diagonal(ids)

    def apply(self, vector: Tensor) -> Tensor:
        total = vector.sum(-1, keepdim=True)
        return to_column(self.stay, vector) * vector + total * self.arrive.to(vector.dtype)

    def solve(self, vector: Tensor) -> Tensor:
        """x = (v - |x| arrive) / stay, with |x| = |v| / (stay + |arrive|)."""
        leaving = self.stay + self.arrive.sum(-1)
        require_invertible(
            (self.stay == 0) | (leaving.abs() <= 1e-15 * self.stay.abs()), type(self).__name__
        )
        total = vector.sum(-1, keepdim=True) / to_column(leaving, vector)
        return (vector - total * self.arrive.to(vector.dtype)) / to_column(self.stay, vector)

    def _diagonal(self, ids: Tensor) -> Tensor:
        return torch.zeros_like(self.arrive).scatter(-1, ids.unsqueeze(-1), self.stay.unsqueeze(-1))

    def _num_rows(self) -> int:
        return len(self.stay)


@final
class SumKernel(Kernel):
    """The sum of two kernels."""

    def __init__(self, first: Kernel, second: Kernel) -> None:
        self.first, self.second = first, second
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
        self.factor, self.kernel = factor, kernel
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
