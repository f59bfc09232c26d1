"""Batches of validation samples for evaluation and sampling, on the device of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from numpy.typing import NDArray

from ddiff.data.fields_batch import FieldBatch, FieldsBatch
from ddiff.runs.fields.data import RunFields
from ddiff.training.device import to_device

AT_ONCE = 4096  # samples that are read together to find the absent ones


def move_batch(batch: FieldsBatch, device: torch.device) -> FieldsBatch:
    """Copy a batch to a device."""
    fields = {name: to_device(field, device) for name, field in batch.fields.items()}
    return FieldsBatch(
        fields, to_device(batch.index, device), to_device(dict(batch.conditions), device)
    )


def replace_fields(batch: FieldsBatch, others: Mapping[str, FieldBatch]) -> FieldsBatch:
    """Return the batch with other values of some fields."""
    return replace(batch, fields={**batch.fields, **others})


def spread_evenly(count: int, wanted: int | None) -> NDArray[np.int64]:
    """Return `wanted` of the numbers 0 .. count - 1, evenly spaced; None: all."""
    if wanted is None or wanted >= count:
        return np.arange(count)
    return np.arange(wanted) * count // wanted


def find_present(data: RunFields, names: Sequence[str]) -> NDArray[np.int64]:
    """Return the numbers of the validation samples that have all fields `names`."""
    count = len(data.documents.validation)
    is_present = np.ones(count, bool)
    for start in range(0, count, AT_ONCE):
        numbers = np.arange(start, min(start + AT_ONCE, count))
        for name in names:
            absent = data.fields[name].encode(numbers, "validation").absent
            is_present[numbers] &= ~absent.numpy()
    return is_present.nonzero()[0]
