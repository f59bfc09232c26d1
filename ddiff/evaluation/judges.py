"""Judges of samples: drawn values are compared with data or with an exact rule.

The samples have several fields, or are texts, which are then the field `TEXT_FIELD`.

A judge counts right samples, or measures errors of vectors. Every finding has a 95 % interval and,
if it is known, the value of samples whose fields are unrelated.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddiff.errors import ArgumentError
from ddiff.evaluation.intervals import grouped_share95, mean95, wilson95
from ddiff.evaluation.total_variation import count_values, total_variation, total_variation95

Values = Sequence[str | None] | NDArray[np.int64] | NDArray[np.float64]
"""Plain values of N samples: texts, tokens [N,n], or vectors [N,n,d] in data units."""


TEXT_FIELD = "text"
"""Name of the only field and of the target of a run of text."""


@dataclass(frozen=True)
class Finding:
    """One measured property of samples.

    Attributes:
        name: property, such as "images that show the given word".
        value: mean over the samples.
        interval: 95 % confidence interval of `value`; None for one sample.
        count: number of samples.
        chance: value for samples whose fields are unrelated; None if it is unknown.
    """

    name: str
    value: float
    interval: tuple[float, float] | None
    count: int
    chance: float | None = None


@dataclass(frozen=True)
class DrawnField:
    """Values of one field of N samples.

    Args:
        values: drawn or given values.
        truth: values of the validation samples whose other fields were given. A sample without
            this field has the text None, or vectors of NaN. None if the given values are no
            validation samples.
        normalize: maps vectors [k,d] in data units to normalized units [k,w], in which the mean of
            the training vectors is 0; None for tokens and texts.
    """

    values: Values
    truth: Values | None = None
    normalize: Callable[[NDArray[np.float64]], NDArray[np.float64]] | None = None


@dataclass(frozen=True)
class DrawnFields:
    """N samples of one target, such as "image | text".

    Args:
        target: text form of the target.
        drawn: names of the fields that the sampler drew.
        given: names of the fields that were given.
        fields: values of drawn and given fields, by name.
        numbers: numbers [N] of the validation samples whose fields were given. A number that
            occurs several times has several draws. None if the given values are not those of
            validation samples, or if nothing is given.
    """

    target: str
    drawn: Sequence[str]
    given: Sequence[str]
    fields: Mapping[str, DrawnField]
    numbers: NDArray[np.int64] | None = None

    def __post_init__(self) -> None:
        missing = [name for name in (*self.drawn, *self.given) if name not in self.fields]
        if missing:
            raise ArgumentError(
                f'DrawnFields: fields must have the values of every field of "{self.target}"; '
                f"missing are {', '.join(missing)}."
            )
        counts = {name: len(field.values) for name, field in self.fields.items()}
        if self.numbers is not None:
            counts["numbers"] = len(self.numbers)
        if len(set(counts.values())) > 1:
            raise ArgumentError(
                f"DrawnFields: all fields must have the same number of samples; got {counts}."
            )

    def __len__(self) -> int:
        return len(next(iter(self.fields.values())).values)


class Judge(Protocol):
    """Judge of samples."""

    def judge(self, drawn: DrawnFields) -> Sequence[Finding]:
        """Return what is found on the samples of one target; empty if nothing can be judged."""
        ...


def share_right(
    name: str,
    right: ArrayLike,
    chance: float | None = None,
    groups: NDArray[np.int64] | None = None,
) -> Finding:
    """Return the share of right samples, with the interval of Wilson.

    Args:
        name: name of the finding.
        right: N booleans, N >= 1.
        chance: see `Finding`.
        groups: group [N] of every sample. Samples of a group are averaged first, and the interval
            is that of independent groups.
    """
    marks = np.asarray(right, bool)
    count = len(marks)
    if groups is not None and len(np.unique(groups)) < count:
        means = group_means(marks.astype(np.float64), groups)
        interval = grouped_share95(means, count)
        return Finding(name, float(means.mean()), interval, len(means), chance)
    hits = int(marks.sum())
    return Finding(name, hits / count, wilson95(hits, count), count, chance)


def mean_value(
    name: str,
    values: ArrayLike,
    groups: NDArray[np.int64] | None = None,
    chance: float | None = None,
) -> Finding:
    """Return the mean of numbers [N], with the interval of `mean95`.

    Args:
        name: name of the finding.
        values: one number per sample.
        groups: group [N] of every sample. Samples of a group are averaged first, and the interval
            is that of independent groups.
        chance: see `Finding`.
    """
    numbers = np.asarray(values, np.float64)
    if groups is not None:
        numbers = group_means(numbers, groups)
    return Finding(name, float(numbers.mean()), mean95(numbers), len(numbers), chance)


def variation_of_values(name: str, values: ArrayLike, reference: ArrayLike) -> Finding:
    """Return the total variation between the distributions of two samples of integers.

    Args:
        name: name of the finding.
        values: integers [n], such as the lengths of drawn texts.
        reference: integers [m], such as the lengths of held-out texts.
    """
    counts = count_values(values, reference)
    interval = total_variation95(*counts)
    return Finding(name, total_variation(*counts), interval, int(counts[0].sum()))


def group_means(values: NDArray[np.float64], groups: NDArray[np.int64]) -> NDArray[np.float64]:
    """Return the mean of `values` [N,...] over every group, by rising group number."""
    _, members = np.unique(groups, return_inverse=True)
    counts = np.bincount(members)
    sums = np.zeros((len(counts), *values.shape[1:]))
    np.add.at(sums, members, values)
    return sums / counts.reshape(-1, *[1] * (values.ndim - 1))
