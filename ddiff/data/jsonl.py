"""Documents from JSON lines: a text and what is known of it, one object a line."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain, islice
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
from datasets import Dataset

from ddiff.data.arrow import read_table, table_in_memory, write_table
from ddiff.data.cache import Cache
from ddiff.data.compression import open_uncompressed
from ddiff.data.documents import Documents, check_any, divided, file_fingerprint
from ddiff.data.paths import base_name, find_train_and_validation, printable
from ddiff.data.text import RULES, check_text, text_lines
from ddiff.errors import ArgumentError, DataError, suggest
from ddiff.progress import progress

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
    """Read files of JSON lines by fsspec path or glob: the field `text` of each object is a document.

    Fields `labels` hold whole numbers from 0, fields `vectors` lists of numbers; a field that is null or not there is
    absent. They become columns of the same name. See `read_text_files` for `validation` and `held_out`. DataError names
    file and line of what cannot be read, and a field that has a value in no line of `train`.
    """
    if not validation and not 0 < held_out < 1:
        raise ArgumentError(
            f"read_json_lines: held_out must lie in (0, 1); got {held_out}. Or name validation files."
        )
    reader = _Reader(text, tuple(labels), tuple(vectors))
    paths, validation_paths = find_train_and_validation(train, validation)
    corpus = reader.read(paths, cache)
    reader.check_found(corpus, paths, train)
    if validation_paths:
        return Documents(corpus, reader.read(validation_paths, cache))
    return divided(corpus, held_out, "by line")


def json_objects(file: BinaryIO, path: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """Yield the objects of a file of JSON lines, or of one JSON array: their numbers (of the line, or in the array, from
    1), their places as messages name them, and themselves. DataError names the place of what is no object."""
    lines = enumerate(text_lines(file, printable(path)), start=1)
    name = base_name(path)
    first = True
    for number, line in lines:
        if not line or line.isspace():
            continue
        if first and line.lstrip().startswith("["):
            yield from _array_objects("\n".join(chain([line], (later for _, later in lines))), name)
            return
        first = False
        place = f"{name} line {number}"
        yield number, place, _checked_object(_parsed(line, place), place)


def check_once(found: dict[str, Any], fields: Iterable[str], place: str) -> None:
    """DataError if an object has one of these fields twice: JSON does not say which counts."""
    if isinstance(found, _Repeating) and (twice := sorted(found.twice & set(fields))):
        raise DataError(f'{place} has the field "{twice[0]}" twice. Leave one of them out.')


class _Repeating(dict[str, Any]):
    """An object of which some fields are written more than once."""

    twice: frozenset[str]


class _Reader:
    """Which fields are read, and as what."""

    def __init__(self, text: str, labels: tuple[str, ...], vectors: tuple[str, ...]) -> None:
        named = ("text", "name", *labels, *vectors)
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise ArgumentError(
                f"read_json_lines: labels and vectors must be names of their own, none of them text or "
                f"name; got {twice} twice."
            )
        self.text, self.labels, self.vectors = text, labels, vectors
        self.schema = pa.schema(
            [
                ("text", pa.large_string()),
                ("name", pa.string()),
                *((name, pa.int64()) for name in labels),
                *((name, pa.list_(pa.float32())) for name in vectors),
            ]
        )

    def read(self, paths: Sequence[str], cache: Cache | None) -> Dataset:
        if cache is None:
            corpus = table_in_memory(self.schema, self._batches(paths))
        else:
            inputs = {
                "files": [[base_name(path), file_fingerprint(path)] for path in paths],
                "text": self.text,
                "labels": self.labels,
                "vectors": self.vectors,
                "rules": RULES,
            }
            entry = cache.load_or_build(
                "json_lines", inputs, lambda place: self._write(paths, place)
            )
            corpus = read_table(entry / "documents.arrow")
        check_any(corpus, paths)
        return corpus

    def check_found(self, corpus: Dataset, paths: Sequence[str], patterns: Sequence[str]) -> None:
        """Raise DataError for a label or vector that no document has: a name misspelt would be trained without."""
        for name in (*self.labels, *self.vectors):
            if corpus.data.column(name).null_count == len(corpus):
                fields = {
                    field for path in paths for _, found in self._objects(path) for field in found
                }
                others = sorted(fields - {self.text, name})
                key = "labels" if name in self.labels else "vectors"
                where = ", ".join(map(printable, patterns))
                raise DataError(
                    f'read_json_lines: {key} names the field "{name}", but it has a value in no line of {where}; '
                    f"beside the text the lines have {others or 'no fields'}.{suggest(name, others)} Mend [data] {key}, or "
                    "leave the field out."
                )

    def _write(self, paths: Sequence[str], place: Path) -> None:
        write_table(self.schema, self._batches(paths), place / "documents.arrow")

    def _batches(self, paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with progress(len(paths), "reading text") as bar:
            for path in paths:
                documents = self._documents(path)
                while rows := list(islice(documents, _ROWS_AT_ONCE)):
                    yield pa.RecordBatch.from_pylist(rows, schema=self.schema)
                bar.advance(1)

    def _documents(self, path: str) -> Iterator[dict[str, Any]]:
        for place, found in self._objects(path):
            text = check_text(found[self.text], place)
            values: dict[str, Any] = {
                name: self._label(found.get(name), name, place) for name in self.labels
            }
            values |= {name: self._vector(found.get(name), name, place) for name in self.vectors}
            if text and not text.isspace():
                yield {"text": text, "name": place, **values}

    def _objects(self, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every object of a file with its place; DataError for one without the text."""
        with open_uncompressed(path) as file:
            for _, place, found in json_objects(file, path):
                check_once(found, (self.text, *self.labels, *self.vectors), place)
                if self.text not in found:
                    raise DataError(
                        f'{place} must be an object with the field "{self.text}"; it has {sorted(found)}. Name the field '
                        'of the text: text = "...".'
                    )
                yield place, found

    def _label(self, value: Any, name: str, place: str) -> int | None:
        whole = isinstance(value, int) and not isinstance(value, bool)
        if value is None or (whole and 0 <= value <= _LARGEST_LABEL):
            return value
        raise DataError(
            f'{place}: the label "{name}" must be a whole number from 0 (to {_LARGEST_LABEL}), or null; got '
            f"{_short(value)}. Number the classes."
        )

    def _vector(self, value: Any, name: str, place: str) -> list[float] | None:
        if value is None or (isinstance(value, list) and value and all(map(_fits_float32, value))):
            return value
        what = "a list of numbers, or null"
        if isinstance(value, list) and value and all(map(_is_number, value)):
            what += f"; each must be finite and at most {_LARGEST_NUMBER:.4g} in size"
        raise DataError(f'{place}: the vector "{name}" must be {what}; got {_short(value)}.')


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _fits_float32(value: Any) -> bool:
    # a whole number is compared as it is: one of 400 digits is no float
    if not _is_number(value) or (isinstance(value, float) and not math.isfinite(value)):
        return False
    return bool(-_LARGEST_NUMBER <= value <= _LARGEST_NUMBER)


def _array_objects(written: str, name: str) -> Iterator[tuple[int, str, dict[str, Any]]]:
    """The objects of a file that is one JSON array."""
    found = _parsed(written, name)
    for number, value in enumerate(found, start=1):
        place = f"{name} object {number}"
        yield number, place, _checked_object(value, place)


def _checked_object(value: Any, place: str) -> dict[str, Any]:
    if not isinstance(value, dict):
        raise DataError(
            f"{place} must be an object, {{...}}; got {_short(value)} ({type(value).__name__})."
        )
    return value


def _parsed(written: str, place: str) -> Any:
    try:
        return _DECODER.decode(written)
    except RecursionError as error:
        raise DataError(
            f"{place} is nested too deeply to be read as JSON. Drop the line."
        ) from error
    except ValueError as error:  # also a number of more digits than Python converts
        raise DataError(
            f"{place} is no JSON: it cannot be read ({error}). Every line must be one object."
        ) from error


def _object_of(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) == len(pairs):
        return found
    written = Counter(name for name, _ in pairs)
    repeating = _Repeating(found)
    repeating.twice = frozenset(name for name, times in written.items() if times > 1)
    return repeating


_DECODER = json.JSONDecoder(
    object_pairs_hook=_object_of
)  # made once: json.loads would make one for each line


def _short(value: Any) -> str:
    try:
        written = repr(value)
    except ValueError:  # more digits than Python writes
        return "a number of very many digits"
    return written if len(written) <= _SHOWN else f"{written[:_SHOWN]} ..."
