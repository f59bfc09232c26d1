"""Batch of packed rows, the input of the network and of the likelihood bound."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Batch:
    """Batch of B rows of L tokens.

    ids: token ids, long [B,L].
    valid: bool [B,L], False at padding.
    scored: bool [B,L], True at the positions that count in loss and metrics, False at padding.
    document: long [B,L], number of the document at each position.
    index: long [B], number of each row in the global batch (training) or in the text (evaluation).
        The number determines the random numbers of the row, and the stratum from which the noise
        time of the row is drawn.
    packed: whether at least one row contains tokens of more than one document.
    conditions: name of a condition -> one value per row, or one value per position if `packed`.
    counted: bool [B,L], the scored positions that count as tokens: figures per token are divided by
        their number. False at end marks that only fill up an answer. None: all scored positions.
    """

    ids: Tensor
    valid: Tensor
    scored: Tensor
    document: Tensor
    index: Tensor
    packed: bool = False
    conditions: dict[str, Tensor] = field(default_factory=dict)
    counted: Tensor | None = None

    def __repr__(self) -> str:
        rows, length = self.ids.shape
        text = f"{rows} rows of {length} on {self.ids.device}"
        if self.packed:
            text += ", packed"
        if self.conditions:
            text += f", conditions {', '.join(self.conditions)}"
        return f"Batch({text})"

    @property
    def tokens(self) -> Tensor:
        """Positions that count as tokens, bool [B,L]."""
        return self.scored if self.counted is None else self.counted

    def with_prefixes(self, sizes: Tensor) -> Batch:
        """Return a copy of the batch in which row b is not scored before position `sizes[b]`."""
        is_after_prefix = torch.arange(self.ids.shape[1]) >= sizes.unsqueeze(-1)
        counted = None if self.counted is None else self.counted & is_after_prefix
        return replace(self, scored=self.scored & is_after_prefix, counted=counted)

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
            counted=None if self.counted is None else self.counted.to(device),
        )
