"""Batch of samples of several fields: tokens, vectors, or both."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple, final

import torch
from torch import Tensor

from ddiff.errors import DataError


class FieldBatch(NamedTuple):
    """Values of one field in a batch of B samples with n positions.

    Attributes:
        values: tokens, long [B,n], or vectors, float64 [B,n,d]. Absent values are 0, never NaN,
            because a network computes with them.
        valid: bool [B,n], False at padding.
        scored: bool [B,n], True at the positions that count in loss and bound.
        absent: bool [B], samples without this field.
        counted: bool [B,n], scored positions that the unit of a reported bound counts. In a text
            that is filled with end marks, these are the tokens of the text and its first end mark.
    """

    values: Tensor
    valid: Tensor
    scored: Tensor
    absent: Tensor
    counted: Tensor

    @property
    def unit(self) -> str:
        """Return "token" for a field of tokens and "number" for a field of vectors."""
        return "token" if self.values.dim() == 2 else "number"

    def count_items(self) -> Tensor:
        """Return the number of scored tokens, or of numbers in scored vectors."""
        positions = (self.scored & ~self.absent.unsqueeze(-1)).sum()
        return positions if self.values.dim() == 2 else positions * self.values.shape[-1]


@final
@dataclass(frozen=True)
class FieldsBatch:
    """Batch of samples of several fields.

    Args:
        fields: values of every field, by name.
        index: long [B], slot of each sample in the global batch (training), or sample number.
        conditions: labels [B] or vectors [B,d] by name.
    """

    fields: Mapping[str, FieldBatch]
    index: Tensor
    conditions: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name, values in self.fields.items():
            if not bool(values.values.isfinite().all()):
                raise DataError(
                    f'FieldsBatch: the values of the field "{name}" must be finite; got NaN or '
                    "infinity. Mark a sample without the field in `absent`, with values 0."
                )

    def absent(self) -> dict[str, Tensor]:
        """Return the samples without each field, bool [B]; only fields that some sample lacks."""
        return {
            name: values.absent for name, values in self.fields.items() if bool(values.absent.any())
        }

    def padding(self) -> dict[str, Tensor]:
        """Return the valid positions bool [B,n] of every field that has padding."""
        return {
            name: values.valid
            for name, values in self.fields.items()
            if not bool(values.valid.all())
        }


def token_field(
    ids: Tensor,
    valid: Tensor | None = None,
    absent: Tensor | None = None,
    counted: Tensor | None = None,
) -> FieldBatch:
    """Make the batch of a field of tokens from ids [B,n]; every valid position is scored.

    The other arguments are attributes of `FieldBatch`. By default all positions are valid and
    counted, and no sample lacks the field. Raises DataError for another number of dimensions.
    """
    if ids.dim() != 2:
        raise DataError(
            "token_field: ids must be [B,n], with n tokens per sample; got a tensor of shape "
            f"{tuple(ids.shape)}."
        )
    valid = torch.ones_like(ids, dtype=torch.bool) if valid is None else valid
    return _make_field(ids, valid, absent, counted)


def vector_field(
    vectors: Tensor, valid: Tensor | None = None, absent: Tensor | None = None
) -> FieldBatch:
    """Make the batch of a field of vectors [B,n,d]; every valid position is scored.

    Raises DataError for another number of dimensions.
    """
    if vectors.dim() != 3:
        raise DataError(
            "vector_field: vectors must be [B,n,d], with n vectors of d numbers per sample; got a "
            f"tensor of shape {tuple(vectors.shape)}. For one vector per sample, pass "
            "vectors.unsqueeze(1)."
        )
    vectors = vectors.double()
    valid = torch.ones(vectors.shape[:2], dtype=torch.bool) if valid is None else valid
    return _make_field(vectors, valid, absent, None)


def _make_field(
    values: Tensor, valid: Tensor, absent: Tensor | None, counted: Tensor | None
) -> FieldBatch:
    if absent is None:
        absent = torch.zeros(len(values), dtype=torch.bool)
    scored = valid & ~absent.unsqueeze(-1)
    counted = scored if counted is None else scored & counted
    return FieldBatch(values, valid, scored, absent, counted)
