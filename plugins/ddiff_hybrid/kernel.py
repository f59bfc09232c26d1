"""Kernel (transition or generator matrix) of the gamma-hybrid process."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff import ArgumentError, Kernel


@final
class RedrawKernel(Kernel):
    """Batch of kernels K in which a token stays, becomes any token, or becomes the mask.

    The entries K[y,z] from state y to state z are, for V tokens and the mask as last state:

        token y, token z    keep 1[y = z] + each
        token y, mask       leave
        mask, token z       0
        mask, mask          rest

    `keep`, `each`, `leave` and `rest` are tensors [r], one value per kernel. In a transition from
    time s to t, let A be the probability that a token is not masked, and B the probability that it
    is not redrawn. Then keep = A B, each = A (1 - B)/V, leave = 1 - A and rest = 1.
    """

    def __init__(
        self, keep: Tensor, each: Tensor, leave: Tensor, rest: Tensor, num_tokens: int
    ) -> None:
        self.keep = keep
        self.each = each
        self.leave = leave
        self.rest = rest
        self.num_tokens = num_tokens
        self.num_states = num_tokens + 1

    def row(self, ids: Tensor) -> Tensor:
        is_token = ids < self.num_tokens
        row = torch.where(is_token, self.each, 0.0).unsqueeze(-1).repeat(1, self.num_states)
        row[:, -1] = torch.where(is_token, self.leave, 0.0)
        return self._add_diagonal(row, ids)

    def column(self, ids: Tensor) -> Tensor:
        is_token = ids < self.num_tokens
        off_diagonal = torch.where(is_token, self.each, self.leave)
        column = off_diagonal.unsqueeze(-1).repeat(1, self.num_states)
        column[:, -1] = 0.0
        return self._add_diagonal(column, ids)

    def _add_diagonal(self, values: Tensor, ids: Tensor) -> Tensor:
        diagonal = torch.where(ids < self.num_tokens, self.keep, self.rest)
        return values.scatter_add(-1, ids.unsqueeze(-1), diagonal.unsqueeze(-1))

    def apply(self, vector: Tensor) -> Tensor:
        keep, each, leave, rest = self._coefficients(vector.dtype)
        tokens = vector[:, :-1]
        mask = vector[:, -1:]
        total = tokens.sum(-1, keepdim=True)
        return torch.cat([keep * tokens + each * total, leave * total + rest * mask], -1)

    def solve(self, vector: Tensor) -> Tensor:
        """Return the row vectors x that solve x K = v, for the rows v of `vector` [r,S].

        The entries of K are functions of keep, each, leave and rest (docstring of the class). Let
        sum(v) be the sum over the V tokens, and n = sum(v)/(keep + V each). Then
        x = (v - each n)/keep at tokens and x = (v - leave n)/rest at the mask.
        """
        total_factor = self.keep + self.num_tokens * self.each
        # The total factor of a generator is 0, up to the rounding of keep and V each.
        is_zero = total_factor.abs() <= 1e-15 * self.keep.abs()
        is_singular = (self.keep == 0) | (self.rest == 0) | is_zero
        if bool(is_singular.any()):
            raise ArgumentError(
                "RedrawKernel.solve: the kernel must be invertible in every row; got a "
                "generator, or a transition to t = 1, which forgets the initial state. "
                "Use transitions to t < 1."
            )
        keep, each, leave, rest = self._coefficients(vector.dtype)
        tokens = vector[:, :-1]
        mask = vector[:, -1:]
        total = tokens.sum(-1, keepdim=True) / total_factor.to(vector.dtype).unsqueeze(-1)
        return torch.cat([(tokens - each * total) / keep, (mask - leave * total) / rest], -1)

    def _coefficients(self, dtype: torch.dtype) -> list[Tensor]:
        """Return the coefficients keep, each, leave and rest of the kernel, as tensors [r,1].

        The docstring of the class defines the coefficients.
        """
        coefficients = (self.keep, self.each, self.leave, self.rest)
        return [value.to(dtype).unsqueeze(-1) for value in coefficients]

    def _num_rows(self) -> int:
        return len(self.keep)
