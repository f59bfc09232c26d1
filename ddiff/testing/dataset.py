"""Conformance checks of data sets of texts and of several fields."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import NamedTuple

import torch

from ddiff.data.columns import ColumnShape, FieldsDocuments
from ddiff.data.documents import Documents, fingerprint_texts
from ddiff.errors import ArgumentError
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law


class DatasetCase(NamedTuple):
    """Data set to check.

    Attributes:
        documents: the data set.
        again: the data set, built a second time.
        shapes: description of the columns that `preview` returned; None: there is no preview.
    """

    documents: Documents | FieldsDocuments
    again: Documents | FieldsDocuments
    shapes: Mapping[str, ColumnShape] | None = None


def _fingerprints(documents: Documents | FieldsDocuments) -> dict[str, str]:
    """Return identifiers of the parts of a data set, or of their columns, by name."""
    found = {}
    if isinstance(documents, Documents):
        found["train"] = fingerprint_texts(documents.train)
        found["validation"] = fingerprint_texts(documents.validation)
        return found
    for part, table in (("train", documents.train), ("validation", documents.validation)):
        for name, column in table.columns.items():
            found[f"{part}, {name}"] = column.fingerprint
    return found


@law("dataset: two builds give the same data", tolerance=0.0)
def builds_are_equal(case: DatasetCase) -> Iterator[Gap]:
    """Check that the data depend on the settings and the seed only.

    A run that is resumed builds its data again. Tolerance 0: fingerprints are exact.
    """
    first = _fingerprints(case.documents)
    second = _fingerprints(case.again)
    for part, value in first.items():
        is_same = torch.tensor(float(second.get(part) == value))
        yield compare(is_same, 1.0, {"equal": part})


@law("dataset: both parts have texts", tolerance=0.0)
def parts_have_texts(case: DatasetCase) -> Iterator[Gap]:
    """Check that training and validation part have at least one text, and that texts are str.

    The law applies to data sets of texts. Tolerance 0: counts are integers.
    """
    documents = case.documents
    if not isinstance(documents, Documents):
        return
    for name, part in (("train", documents.train), ("validation", documents.validation)):
        count = len(part["text"])
        yield compare(torch.tensor(float(count > 0)), 1.0, {"has texts": name})
        wrong = sum(not isinstance(text, str) or not text for text in part["text"])
        yield compare(torch.tensor(wrong), 0.0, {"empty values in": name})


@law("dataset: columns are as preview describes them", tolerance=0.0)
def columns_are_as_described(case: DatasetCase) -> Iterator[Gap]:
    """Check that both parts have the columns that `preview` describes, with the same shapes.

    A dry run builds the model from the description. The law applies to data sets of several fields.
    Tolerance 0: shapes are integers.
    """
    documents = case.documents
    if isinstance(documents, Documents):
        return
    for name, part in (("train", documents.train), ("validation", documents.validation)):
        expected = documents.shapes if case.shapes is None else case.shapes
        names = torch.tensor(float(set(part.shapes) == set(expected)))
        yield compare(names, 1.0, {"names of the columns of": name})
        for column in set(part.shapes) & set(expected):
            is_same = torch.tensor(float(part.shapes[column] == expected[column]))
            labels = {"column": column, "part": name, "described as": expected[column]}
            yield compare(is_same, 1.0, labels)


DATASET_LAWS: tuple[Law, ...] = (builds_are_equal, parts_have_texts, columns_are_as_described)


def check_dataset(
    build: Callable[[], Documents | FieldsDocuments],
    shapes: Mapping[str, ColumnShape] | None = None,
    first: Documents | FieldsDocuments | None = None,
) -> list[LawReport]:
    """Apply every conformance check of data sets that fit in memory.

    Args:
        build: function without arguments that builds the data set, in the same way at every call.
        shapes: description of the columns that `preview` returned; None: there is no preview.
        first: result of an earlier call of `build`; None: it is called twice.

    Raises ArgumentError for a corpus that does not fit in memory.
    """
    documents = build() if first is None else first
    require_in_memory(documents)
    return evaluate_laws(DatasetCase(documents, build(), shapes), DATASET_LAWS)


def require_in_memory(documents: object) -> None:
    """Raise ArgumentError for a corpus that need not fit in memory."""
    if not isinstance(documents, Documents | FieldsDocuments):
        raise ArgumentError(
            "check_dataset: build must return Documents or FieldsDocuments; got "
            f"{type(documents).__name__}, which need not fit in memory. Check a smaller data set."
        )
