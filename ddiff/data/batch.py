"""What the network and the bound are given of some rows."""

from __future__ import annotations

from dataclasses import dataclass, field, fields, replace
from typing import Any, final

import torch
from torch import Tensor


@final
@dataclass(frozen=True)
class Batch:
    """Some rows as tensors.

    `ids` [B,L] long; `valid` [B,L] bool, False at padding; `scored` [B,L] bool, where figures are counted (never at
    padding); `document` [B,L] long, the document that each position belongs to; `index` [B] long, the slot in the global
    batch (training) or the row (evaluation); `packed`, whether some row holds two documents; `conditions` by name.
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
        told = f", conditions {', '.join(self.conditions)}" if self.conditions else ""
        return f"Batch({rows} rows of {length} on {self.ids.device}{', packed' if self.packed else ''}{told})"

    def with_prefixes(self, sizes: Tensor) -> Batch:
        """The first `sizes` [B] positions of each row are shown and not scored."""
        beyond = torch.arange(self.ids.shape[1]) >= sizes.unsqueeze(-1)
        return replace(self, scored=self.scored & beyond)

    def to(self, device: torch.device | str) -> Batch:
        """The same batch on a device."""
        moved: dict[str, Any] = {
            f.name: value.to(device)
            for f in fields(self)
            if isinstance(value := getattr(self, f.name), Tensor)
        }
        return replace(
            self,
            **moved,
            conditions={name: value.to(device) for name, value in self.conditions.items()},
        )
