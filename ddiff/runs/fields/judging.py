"""Findings of the judge of a recipe on drawn samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddiff.core.normalizer import Normalizer
from ddiff.evaluation.judges import DrawnField, DrawnFields, Finding, Judge, Values
from ddiff.runs.fields.data import RunFields
from ddiff.runs.fields.sampling import DrawnSamples
from ddiff.runs.fields.values import FieldValues


def judge_samples(judge: Judge, data: RunFields, drawn: DrawnSamples) -> Sequence[Finding]:
    """Return what a judge finds on the samples of one target."""
    fields = {}
    for name, column in drawn.values.items():
        values = data.fields[name]
        truth = None
        if drawn.numbers is not None and name in drawn.target.drawn:
            truth = read_truth(values, drawn.numbers)
        normalize = None
        if values.normalizer is not None:
            normalize = _normalize(values.normalizer)
        fields[name] = DrawnField(plain_values(values, column), truth, normalize)
    target = drawn.target
    found = DrawnFields(str(target), target.drawn, target.given, fields, drawn.numbers)
    return judge.judge(found)


def read_truth(values: FieldValues, numbers: NDArray[np.int64]) -> Values:
    """Return the values of validation samples.

    A sample without the field has the text None, or vectors of NaN.
    """
    found = values.encode(numbers, "validation")
    truth = plain_values(values, values.decode(found.values))
    absent = found.absent.numpy()
    if isinstance(truth, list):
        return [None if missing else text for text, missing in zip(truth, absent, strict=True)]
    if truth.dtype.kind == "f":
        truth[absent] = np.nan
    return truth


def plain_values(values: FieldValues, column: Sequence[Any]) -> list[str] | NDArray[Any]:
    """Return the values of samples as texts, ids [N,n], or vectors [N,n,d] in units of the data."""
    if values.tokenizer is not None:
        return [value["text"] for value in column]
    if values.vocabulary is not None:
        return np.asarray([value["ids"] for value in column], np.int64)
    return np.asarray([value["vectors"] for value in column], np.float64)


def _normalize(normalizer: Normalizer) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
    def normalize(vectors: NDArray[np.float64]) -> NDArray[np.float64]:
        return normalizer.encode(torch.from_numpy(vectors)).numpy()

    return normalize
