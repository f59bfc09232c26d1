"""Read documents with labels and vectors from JSON lines, one object per line."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ddiff.data.cache import Cache
from ddiff.data.compression import open_uncompressed
from ddiff.data.documents import Documents, read_corpus, split_documents
from ddiff.data.paths import base_name, find_train_and_validation, printable
from ddiff.data.text import check_text, text_lines
from ddiff.errors import ArgumentError, DataError, suggest
from ddiff.progress import show_progress

_LARGEST_LABEL = 2**63 - 1
_LARGEST_NUMBER = float(np.finfo(np.float32).max)
_ROWS_AT_ONCE = 4096
_SHOWN = 80  # characters of a value in a message: a line of a scraped corpus may be a megabyte


def read_json_lines(
    train: Sequence[str],
    *,
    text: str = "text",
    labels: Sequence[str] = (),
    vectors: Sequence[str] = (),
    validation: Sequence[str] = (),
    held_out: float = 0.05,
    cache: Cache | None = None,
) -> Documents:
    """Read documents from JSON-lines files, given by fsspec paths or globs.

    Args:
        train, validation, held_out, cache: as in `read_text_files`.
        text: name of the field with the text of a document.
        labels: names of the fields with a class label, an integer >= 0.
        vectors: names of the fields with a list of numbers.

    Each label or vector field becomes a column of the same name. A document has no value in this
    column if its field is null or missing.

    Raises DataError if an object cannot be read; the message names the file and the line. Raises
    DataError also if no line of `train` has a value for one of the fields.
    """
    if not validation and not 0 < held_out < 1:
        raise ArgumentError(
            f"read_json_lines: held_out must lie in (0, 1); got {held_out}. Set held_out, or "
            "name validation files."
        )
    reader = _Reader(text, tuple(labels), tuple(vectors))
    paths, validation_paths = find_train_and_validation(train, validation)
    corpus = reader.read(paths, cache)
    reader.check_fields_occur(corpus, paths, train)
    if validation_paths:
        return Documents(corpus, reader.read(validation_paths, cache))
    return split_documents(corpus, held_out, "by line")


def json_objects(file: BinaryIO, path: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (number, place, object) for each object in a file of JSON lines or one JSON array.

    `number` is the line, or the place in the array, counted from 1. `place` is the name of the
    object in error messages, such as "train.jsonl line 3". Raises DataError for a value that is not
    an object.
    """
    lines = enumerate(text_lines(file, printable(path)), start=1)
    name = base_name(path)
    is_first = True
    for number, line in lines:
        if not line or line.isspace():
            continue
        if is_first and line.lstrip().startswith("["):
            following = (later for _, later in lines)
            yield from _array_objects("\n".join(chain([line], following)), name)
            return
        is_first = False
        place = f"{name} line {number}"
        yield number, place, _check_object(_parse(line, place), place)


def check_no_duplicates(found: dict[str, Any], fields: Iterable[str], place: str) -> None:
    """Raise DataError if the JSON object `found` has one of `fields` twice.

    JSON does not define which of the two values is valid. `place`: file and line of the object, for
    the message.
    """
    if not isinstance(found, _ObjectWithDuplicates):
        return
    duplicates = sorted(found.duplicates & set(fields))
    if duplicates:
        raise DataError(f'{place} has the field "{duplicates[0]}" twice. Remove one of the two.')


class _ObjectWithDuplicates(dict[str, Any]):
    """JSON object in which some fields are written more than once."""

    duplicates: frozenset[str]


class _Reader:
    """Reader of the text, label and vector fields of JSON objects."""

    def __init__(self, text: str, labels: tuple[str, ...], vectors: tuple[str, ...]) -> None:
        names = ("text", "name", *labels, *vectors)
        duplicates = sorted({name for name in names if names.count(name) > 1})
        if duplicates:
            raise ArgumentError(
                "read_json_lines: the fields in labels and vectors must differ from each other "
                f'and from "text" and "name"; these names occur twice: {duplicates}.'
            )
        self.text = text
        self.labels = labels
        self.vectors = vectors
        self.schema = pa.schema(
            [
                ("text", pa.large_string()),
                ("name", pa.string()),
                *((name, pa.int64()) for name in labels),
                *((name, pa.list_(pa.float32())) for name in vectors),
            ]
        )

    def read(self, paths: Sequence[str], cache: Cache | None) -> Dataset:
        return read_corpus(
            paths,
            self.schema,
            lambda: self._batches(paths),
            kind="json_lines",
            settings={"text": self.text, "labels": self.labels, "vectors": self.vectors},
            cache=cache,
        )

    def check_fields_occur(
        self, corpus: Dataset, paths: Sequence[str], patterns: Sequence[str]
    ) -> None:
        """Raise DataError for a label or vector field without a value in any document.

        A misspelt field name would otherwise stay unnoticed.

        Args:
            corpus: all documents.
            paths: files that contain the documents.
            patterns: paths and globs of these files as written by the user, for the message.
        """
        for name in (*self.labels, *self.vectors):
            if corpus.data.column(name).null_count < len(corpus):
                continue
            fields: set[str] = set()
            for path in paths:
                for _, found in self._objects(path):
                    fields.update(found)
            others = sorted(fields - {self.text, name})
            key = "labels" if name in self.labels else "vectors"
            raise DataError(
                f'read_json_lines: {key} names the field "{name}", but no line of '
                f"{', '.join(map(printable, patterns))} has a value for it. Fields besides the "
                f"text: {others or 'none'}.{suggest(name, others)} Correct the name in [data] "
                f"{key}, or remove it."
            )

    def _batches(self, paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with show_progress(len(paths), "reading text") as bar:
            for path in paths:
                documents = self._documents(path)
                while rows := list(islice(documents, _ROWS_AT_ONCE)):
                    yield pa.RecordBatch.from_pylist(rows, schema=self.schema)
                bar.advance(1)

    def _documents(self, path: str) -> Iterator[dict[str, Any]]:
        for place, found in self._objects(path):
            text = check_text(found[self.text], place)
            document: dict[str, Any] = {"text": text, "name": place}
            for name in self.labels:
                document[name] = self._check_label(found.get(name), name, place)
            for name in self.vectors:
                document[name] = self._check_vector(found.get(name), name, place)
            if text and not text.isspace():
                yield document

    def _objects(self, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Yield (place, object) for each object of a file; `place` names file and line.

        Raises DataError for an object without the text field.
        """
        with open_uncompressed(path) as file:
            for _, place, found in json_objects(file, path):
                check_no_duplicates(found, (self.text, *self.labels, *self.vectors), place)
                if self.text not in found:
                    raise DataError(
                        f'{place} has no field "{self.text}"; its fields are {sorted(found)}. Name '
                        'the field that holds the text: text = "...".'
                    )
                yield place, found

    def _check_label(self, value: Any, name: str, place: str) -> int | None:
        # bool is a subclass of int in Python, but `true` is not a label.
        is_whole = isinstance(value, int) and not isinstance(value, bool)
        if value is None or (is_whole and 0 <= value <= _LARGEST_LABEL):
            return value
        raise DataError(
            f'{place}: the label "{name}" must be an integer in 0..{_LARGEST_LABEL}, or null; got '
            f"{_shorten(value)}. Give each class a number."
        )

    def _check_vector(self, value: Any, name: str, place: str) -> list[float] | None:
        if value is None:
            return None
        is_list = isinstance(value, list) and bool(value)
        if is_list and all(map(_fits_float32, value)):
            return value
        expected = "a list of numbers, or null"
        if is_list and all(map(_is_number, value)):
            expected += f"; each must be finite and at most {_LARGEST_NUMBER:.4g} in size"
        raise DataError(f'{place}: the vector "{name}" must be {expected}; got {_shorten(value)}.')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits_float32(value: Any) -> bool:
    if not _is_number(value) or (isinstance(value, float) and not math.isfinite(value)):
        return False
    # An integer is compared without conversion, because an integer of 400 digits does not fit into
    # a float.
    return bool(-_LARGEST_NUMBER <= value <= _LARGEST_NUMBER)


def _array_objects(written: str, name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield (number, place, object) for each object of `written`, the text of one JSON array.

    `number` is the place in the array, counted from 1. `place` is the name of the object in error
    messages, which begins with the file name `name`.
    """
    for number, value in enumerate(_parse(written, name), start=1):
        place = f"{name} object {number}"
        yield number, place, _check_object(value, place)


def _check_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{place} must be an object, {{...}}; got {_shorten(value)} ({type(value).__name__})."
        )
    return value


def _parse(written: str, place: str) -> Any:
    try:
        return _DECODER.decode(written)
    except RecursionError as error:
        raise DataError(
            f"{place} is nested too deeply to be read as JSON. Remove the line."
        ) from error
    except ValueError as error:  # also raised for a number with more digits than Python converts
        raise DataError(
            f"{place} is not JSON: it cannot be read ({error}). Every line must be one object."
        ) from error


def _build_object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    counts = Counter(name for name, _ in pairs)
    with_duplicates = _ObjectWithDuplicates(found)
    with_duplicates.duplicates = frozenset(name for name, count in counts.items() if count > 1)
    return with_duplicates


# One decoder for all lines, because json.loads with a hook would make a decoder for each line.
_DECODER = json.JSONDecoder(object_pairs_hook=_build_object)


def _shorten(value: Any) -> str:
    try:
        written = repr(value)
    except ValueError:  # a number with more digits than Python writes
        return "a number of very many digits"
    return written if len(written) <= _SHOWN else f"{written[:_SHOWN]} ..."
