"""Batch of packed rows, the input of the network and of the bound."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Batch:
    """Batch of B rows of L tokens.

    ids: [B,L] long.
    valid: [B,L] bool, False at padding.
    scored: [B,L] bool, True at the positions that metrics count; never at padding.
    document: [B,L] long, number of the document at each position.
    index: [B] long, slot in the global batch (training) or row number (evaluation).
    packed: whether at least one row holds tokens of two documents.
    conditions: values of each condition by name, one per row, or one per position if `packed`.
    """

    ids: Tensor
    valid: Tensor
    scored: Tensor
    document: Tensor
    index: Tensor
    packed: bool = False
    conditions: dict[str, Tensor] = field(default_factory=dict)

    def __repr__(self) -> str:
        rows, length = self.ids.shape
        text = f"{rows} rows of {length} on {self.ids.device}"
        if self.packed:
            text += ", packed"
        if self.conditions:
            text += f", conditions {', '.join(self.conditions)}"
        return f"Batch({text})"

    def with_prefixes(self, sizes: Tensor) -> Batch:
        """Return a copy of the batch in which the first `sizes` [B] positions are not scored."""
        is_after_prefix = torch.arange(self.ids.shape[1]) >= sizes.unsqueeze(-1)
        return replace(self, scored=self.scored & is_after_prefix)

    def to(self, device: torch.device | str) -> Batch:
        """Return a copy of the batch on a device."""
        return Batch(
            ids=self.ids.to(device),
            valid=self.valid.to(device),
            scored=self.scored.to(device),
            document=self.document.to(device),
            index=self.index.to(device),
            packed=self.packed,
            conditions={name: value.to(device) for name, value in self.conditions.items()},
        )
