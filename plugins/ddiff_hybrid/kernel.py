"""The operators of the gamma-hybrid: words are kept, redrawn evenly or masked; masks stay."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff import ArgumentError, Kernel


@final
class RedrawKernel(Kernel):
    """On words K = keep I + each 1 1^T, with `leave` from every word to the mask, the last state; the mask's own row is
    `rest` at itself.

    [r] each. A transition keeps with A B, redraws with A (1 - B)/V, leaves with 1 - A and rests with 1.
    """

    def __init__(
        self, keep: Tensor, each: Tensor, leave: Tensor, rest: Tensor, num_tokens: int
    ) -> None:
        self.keep, self.each, self.leave, self.rest = keep, each, leave, rest
        self.num_tokens, self.num_states = num_tokens, num_tokens + 1

    def row(self, ids: Tensor) -> Tensor:
        word = ids < self.num_tokens
        row = torch.where(word, self.each, 0.0).unsqueeze(-1).repeat(1, self.num_states)
        row[:, -1] = torch.where(word, self.leave, 0.0)
        return row.scatter_add(
            -1, ids.unsqueeze(-1), torch.where(word, self.keep, self.rest).unsqueeze(-1)
        )

    def column(self, ids: Tensor) -> Tensor:
        word = ids < self.num_tokens
        column = torch.where(word, self.each, self.leave).unsqueeze(-1).repeat(1, self.num_states)
        column[:, -1] = 0.0
        return column.scatter_add(
            -1, ids.unsqueeze(-1), torch.where(word, self.keep, self.rest).unsqueeze(-1)
        )

    def apply(self, vector: Tensor) -> Tensor:
        keep, each, leave, rest = (part.to(vector.dtype).unsqueeze(-1) for part in self._parts())
        words, mask = vector[:, :-1], vector[:, -1:]
        total = words.sum(-1, keepdim=True)
        return torch.cat([keep * words + each * total, leave * total + rest * mask], -1)

    def solve(self, vector: Tensor) -> Tensor:
        """x = (v - each |x|)/keep on words, with |x| = |v|/(keep + V each); at the mask (v - leave |x|)/rest."""
        spread = self.keep + self.num_tokens * self.each
        if bool(
            ((self.keep == 0) | (self.rest == 0) | (spread.abs() <= 1e-15 * self.keep.abs())).any()
        ):
            raise ArgumentError(
                "RedrawKernel.solve: the kernel must be invertible in every row. A transition up to t = 1 forgets where it "
                "came from, and a generator has no inverse: start below t = 1."
            )
        keep, each, leave, rest = (part.to(vector.dtype).unsqueeze(-1) for part in self._parts())
        words, mask = vector[:, :-1], vector[:, -1:]
        total = words.sum(-1, keepdim=True) / spread.to(vector.dtype).unsqueeze(-1)
        return torch.cat([(words - each * total) / keep, (mask - leave * total) / rest], -1)

    def _parts(self) -> tuple[Tensor, ...]:
        return self.keep, self.each, self.leave, self.rest

    def _num_rows(self) -> int:
        return len(self.keep)
