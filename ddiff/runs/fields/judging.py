"""Findings of the judge of a recipe on drawn samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ddiff.core.normalizer import Normalizer
from ddiff.evaluation.judges import DrawnField, DrawnFields, Finding, Judge
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
            states = values.encode(drawn.numbers, "validation").values
            truth = plain_values(values, values.decode(states))
        normalize = None
        if values.normalizer is not None:
            normalize = _normalize(values.normalizer)
        fields[name] = DrawnField(plain_values(values, column), truth, normalize)
    target = drawn.target
    found = DrawnFields(str(target), target.drawn, target.given, fields, drawn.numbers)
    return judge.judge(found)


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


def describe_findings(findings: Sequence[Finding]) -> list[dict[str, Any]]:
    """Return findings as plain values."""
    found = []
    for finding in findings:
        interval = None if finding.interval is None else list(finding.interval)
        found.append({**vars(finding), "interval": interval})
    return found
