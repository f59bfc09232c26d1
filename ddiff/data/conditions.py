"""Conditions of documents: class labels and vectors, selected for each batch."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import numpy as np
import torch
from datasets import ClassLabel, Dataset, Value
from torch import Tensor

from ddiff.data.condition_forms import Form, Vector
from ddiff.errors import DataError

ABSENT = -1  # label of a document that has none; an absent vector is NaN


@final
@dataclass(frozen=True)
class Conditions:
    """Values of the conditions of D documents, by the name of the condition.

    A label condition is a long tensor [D], in which -1 stands for an absent label. A vector
    condition of width d is a float32 tensor [D,d], in which NaN stands for an absent vector.
    """

    values: Mapping[str, Tensor]

    def __repr__(self) -> str:
        shapes = ", ".join(f"{name} {tuple(value.shape)}" for name, value in self.values.items())
        return f"Conditions({shapes or 'none'})"

    def select(self, document: Tensor, packed: bool) -> dict[str, Tensor]:
        """Return the values of all conditions for a batch.

        `document` [B,L] is the index of the document at each position. The result has one value
        per position if `packed`, and one value per row otherwise.
        """
        numbers = document if packed else document[:, 0]
        return {name: value[numbers] for name, value in self.values.items()}

    @property
    def fingerprint(self) -> str:
        """SHA-256 of the names and values, 32 hexadecimal digits."""
        digest = hashlib.sha256()
        for name, value in sorted(self.values.items()):
            header = f"{name} {tuple(value.shape)} {value.dtype}"
            digest.update(header.encode())
            digest.update(value.numpy().tobytes())
        return digest.hexdigest()[:32]


def read_conditions(
    documents: Dataset, names: Iterable[str], forms: Mapping[str, Form] = {}
) -> Conditions:
    """Read the columns `names` of documents as conditions.

    A column of integers >= 0 is read as labels, and a column of lists of numbers as vectors. None
    in a column means that the document has no value. `forms` maps names to the expected types.
    Raises DataError if a column is missing, contains other values or vectors of different lengths,
    or does not match its expected type.
    """
    return Conditions({name: _read_column(documents, name, forms.get(name)) for name in names})


def _read_column(documents: Dataset, name: str, form: Form | None) -> Tensor:
    if name not in documents.column_names:
        others = [column for column in documents.column_names if column not in ("text", "name")]
        raise DataError(
            f'[denoiser] conditions has "{name}", but the documents have no such column. Columns '
            f"of the documents besides the text: {others or 'none'}. Use a [data] kind that reads "
            'this column, such as "jsonl", or remove the condition.'
        )
    column: list[Any] = documents[name][:]
    present = [value for value in column if value is not None]
    feature = documents.features[name]
    is_whole = isinstance(feature, Value | ClassLabel) and feature.dtype.startswith(("int", "uint"))
    if is_whole and min(present, default=0) >= 0:
        _check_labels(present, name, form)
        return torch.tensor([ABSENT if value is None else value for value in column])
    if present and all(isinstance(value, list) for value in present):
        return _stack_vectors(column, name, form)
    if not present and isinstance(form, Vector) and form.width is not None:
        return torch.full((len(column), form.width), torch.nan)
    example = next((value for value in present if not is_whole or value < 0), None)
    raise DataError(
        f'The column "{name}" of the documents cannot be a condition: all values must be integers '
        "of at least 0 (labels) or lists of numbers (vectors), or None (no value); the column "
        f"holds {example!r}. Give each class a number."
    )


def _check_labels(present: list[int], name: str, form: Form | None) -> None:
    if form is None:
        return
    if isinstance(form, Vector):
        raise DataError(
            f'The documents have labels in "{name}", but [denoiser] conditions expects {form}. Set '
            f"[denoiser] conditions.{name} = {{ classes = N }} to use the labels, or name a field "
            "of vectors in [data] vectors."
        )
    largest = max(present, default=0)
    if form.classes is not None and largest >= form.classes:
        raise DataError(
            f'The documents have the label {largest} in "{name}", but [denoiser] conditions '
            f"expects {form}. Set [denoiser] conditions.{name}.classes = {largest + 1}, or "
            "number the classes from 0 without gaps."
        )


def _stack_vectors(column: list[Any], name: str, form: Form | None) -> Tensor:
    widths = sorted({len(value) for value in column if value is not None})
    if len(widths) > 1:
        raise DataError(
            f'The column "{name}" of the documents holds vectors of lengths {widths}, but all '
            "vectors of a condition must have the same length. Correct the documents."
        )
    if form is not None and form != Vector(widths[0]) and form != Vector():
        raise DataError(
            f'The documents have vectors of length {widths[0]} in "{name}", but [denoiser] '
            f"conditions expects {form}. Set [denoiser] conditions.{name} = "
            f"{{ width = {widths[0]} }}, or correct the documents."
        )
    absent = np.full(widths[0], np.nan, np.float32)
    vectors = [absent if value is None else np.asarray(value, np.float32) for value in column]
    return torch.from_numpy(np.stack(vectors))
