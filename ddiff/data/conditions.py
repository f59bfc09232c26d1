"""What is known of a document beside its text: class labels and vectors, position by position in a batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from datasets import Dataset
from torch import Tensor

from ddiff.data.condition_forms import Form, Vector
from ddiff.errors import DataError

ABSENT = -1  # the label of a document that has none; a vector that is absent is NaN


@final
@dataclass(frozen=True)
class Conditions:
    """Values by name and document number: labels [D] long (-1: absent), vectors [D,d] float32 (NaN: absent)."""

    values: Mapping[str, Tensor]

    def __repr__(self) -> str:
        shown = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.values.items())
        return f"Conditions({shown or 'none'})"

    def of(self, document: Tensor, packed: bool) -> dict[str, Tensor]:
        """The values of a batch: one per position of document [B,L] where rows are packed, else one per row."""
        numbers = document if packed else document[:, 0]
        return {name: value[numbers] for name, value in self.values.items()}

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits of names and values."""
        digest = hashlib.sha256()
        for name, value in sorted(self.values.items()):
            digest.update(
                f"{name} {tuple(value.shape)} {value.dtype}".encode() + value.numpy().tobytes()
            )
        return digest.hexdigest()[:32]


def read_conditions(
    documents: Dataset, names: Iterable[str], forms: Mapping[str, Form] = {}
) -> Conditions:
    """The columns `names` of documents: whole numbers from 0 are labels, lists of numbers vectors, None is absent.

    DataError when a column is missing, holds something else, vectors of several lengths, or not what `forms` says of it.
    """
    return Conditions({name: _values(documents, name, forms.get(name)) for name in names})


def _values(documents: Dataset, name: str, form: Form | None) -> Tensor:
    if name not in documents.column_names:
        others = [column for column in documents.column_names if column not in ("text", "name")]
        raise DataError(
            f'[denoiser] conditions names "{name}", but the documents have no such column: beside their text they have '
            f'{others or "none"}. Take a [data] kind that carries it, such as "jsonl", or leave the condition out.'
        )
    column: list[Any] = documents[name][:]
    present = [value for value in column if value is not None]
    whole = getattr(documents.features[name], "dtype", "").startswith(("int", "uint"))
    if whole and min(present, default=0) >= 0:
        _check_labels(present, name, form)
        return torch.tensor([ABSENT if value is None else value for value in column])
    if present and all(isinstance(value, list) for value in present):
        return _vectors(column, name, form)
    if not present and isinstance(form, Vector) and form.width is not None:
        return torch.full((len(column), form.width), torch.nan)
    example = next((value for value in present if not whole or value < 0), None)
    raise DataError(
        f'The column "{name}" of the documents is to be a condition: it must hold whole numbers from 0 (labels) or lists '
        f"of numbers (vectors), and None where there is none; it holds {example!r}. Number the classes."
    )


def _check_labels(present: list[int], name: str, form: Form | None) -> None:
    if isinstance(form, Vector):
        raise DataError(
            f'The documents have labels in "{name}", but to the denoiser it is {form}. Write '
            f"[denoiser] conditions.{name} = {{ classes = N }}, or name a field of vectors in [data] vectors."
        )
    if (
        form is not None
        and form.classes is not None
        and (largest := max(present, default=0)) >= form.classes
    ):
        raise DataError(
            f'The documents have the label {largest} in "{name}", but to the denoiser it is {form}. Set [denoiser] '
            f"conditions.{name}.classes = {largest + 1}, or number the classes from 0 without gaps."
        )


def _vectors(column: list[Any], name: str, form: Form | None) -> Tensor:
    widths = sorted({len(value) for value in column if value is not None})
    if len(widths) > 1:
        raise DataError(
            f'The column "{name}" of the documents holds vectors of several lengths, {widths}; a condition has one.'
        )
    if form is not None and form != Vector(widths[0]) and form != Vector():
        raise DataError(
            f'The documents have vectors of length {widths[0]} in "{name}", but to the denoiser it is {form}. Write '
            f"[denoiser] conditions.{name} = {{ width = {widths[0]} }}, or mend the data."
        )
    absent = np.full(widths[0], np.nan, np.float32)
    return torch.from_numpy(
        np.stack([absent if value is None else np.asarray(value, np.float32) for value in column])
    )
