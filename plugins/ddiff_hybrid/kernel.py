"""Kernel of the gamma-hybrid, in which tokens are kept, redrawn uniformly or masked."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff import ArgumentError, Kernel


@final
class RedrawKernel(Kernel):
    """Kernel K = keep I + each 1 1^T between tokens, with `leave` from every token to the mask.

    The mask is the last state; its row of K has `rest` on the diagonal and is 0 elsewhere. `keep`,
    `each`, `leave` and `rest` have shape [r], one value per kernel of a batch. A transition from
    time s to t has keep = A B, each = A (1 - B)/V, leave = 1 - A and rest = 1. There V is the
    number of tokens, A the probability of not being masked between s and t, and B the probability
    of not being redrawn.
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
        """Return the row vectors x with x K = v.

        With |x| = |v|/(keep + V each), where |.| is the sum over the V tokens, the solution is
        x = (v - each |x|)/keep on tokens and x = (v - leave |x|)/rest at the mask.
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
        """Return keep, each, leave and rest with shape [r,1] in the given dtype."""
        coefficients = (self.keep, self.each, self.leave, self.rest)
        return [value.to(dtype).unsqueeze(-1) for value in coefficients]

    def _num_rows(self) -> int:
        return len(self.keep)
