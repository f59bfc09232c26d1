"""Build the context of a batch: padding, documents and conditions, which training may drop."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from ddiff.core.rng import CounterRng
from ddiff.nn.denoiser import Context

if TYPE_CHECKING:
    from ddiff.data.batch import Batch


def build_context(batch: Batch) -> Context:
    """Collect padding, document numbers and conditions of a batch.

    Without padding the field `valid` is None, and without packing the field `document` is None, so
    that attention runs without a mask.
    """
    valid = None if bool(batch.valid.all()) else batch.valid
    document = batch.document if batch.packed else None
    return Context(valid, document, batch.conditions)


def drop_conditions(
    context: Context,
    dropout: Mapping[str, float],
    rng: CounterRng,
) -> Context:
    """Drop conditions of random samples: mark each absent with probability `dropout[name]`.

    The network then also learns the unconditional distribution, which classifier-free guidance
    needs.
    """
    conditions = dict(context.conditions)
    for name, share in dropout.items():
        if name in conditions and share > 0:
            # There is one decision per sample. A condition with one value per position is dropped
            # at all positions of the sample.
            dropped = rng.uniform(f"condition.{name}")[:, 0] < share
            conditions[name] = mark_absent(conditions[name], dropped)
    return context._replace(conditions=conditions)


def mark_absent(condition: Tensor, dropped: Tensor) -> Tensor:
    """Mark a condition as absent in the samples with `dropped` [B] True.

    `condition` is the condition of a batch: labels become -1, vectors become NaN.
    """
    absent = torch.nan if condition.is_floating_point() else -1
    ones = [1] * (condition.dim() - 1)  # to broadcast over the dimensions after the batch
    return condition.masked_fill(dropped.reshape(-1, *ones), absent)
