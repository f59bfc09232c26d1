"""Documents from JSON lines: a text and what is known of it, one object a line."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import fsspec
import pyarrow as pa
from datasets import Dataset

from ddiff.data.arrow import read_table, table_in_memory, write_table
from ddiff.data.cache import Cache
from ddiff.data.documents import Documents, base_name, checked_text, divided, file_fingerprint, find_files
from ddiff.errors import ArgumentError, DataError, nearest
from ddiff.progress import progress


def json_lines(
    train: Sequence[str],
    *,
    text: str = "text",
    labels: Sequence[str] = (),
    vectors: Sequence[str] = (),
    validation: Sequence[str] = (),
    held_out: float = 0.05,
    cache: Cache | None = None,
) -> Documents:
    """Files of JSON lines by fsspec path or glob: the field `text` of each object is a document.

    Fields `labels` hold whole numbers from 0, fields `vectors` lists of numbers; a field that is null or not there is
    absent. They become columns of the same name. See `text_files` for `validation` and `held_out`. DataError names file
    and line of what cannot be read, and a field that has a value in no line of `train`.
    """
    if not validation and not 0 < held_out < 1:
        raise ArgumentError(f"json_lines: held_out must lie in (0, 1); got {held_out}. Or name validation files.")
    reader = _Reader(text, tuple(labels), tuple(vectors))
    corpus = reader.read(train, cache)
    reader.check_found(corpus, train)
    if validation:
        return Documents(corpus, reader.read(validation, cache))
    return divided(corpus, held_out, "by line")


class _Reader:
    """Which fields are read, and as what."""

    def __init__(self, text: str, labels: tuple[str, ...], vectors: tuple[str, ...]) -> None:
        named = ("text", "name", *labels, *vectors)
        if twice := sorted({name for name in named if named.count(name) > 1}):
            raise ArgumentError(
                f"json_lines: labels and vectors must be names of their own, none of them text or name; got {twice} twice."
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

    def read(self, patterns: Sequence[str], cache: Cache | None) -> Dataset:
        paths = _paths(patterns)
        if cache is None:
            corpus = table_in_memory(self.schema, self._batches(paths))
        else:
            inputs = {
                "files": [[base_name(path), file_fingerprint(path)] for path in paths],
                "text": self.text,
                "labels": self.labels,
                "vectors": self.vectors,
            }
            entry = cache.entry("json_lines", inputs, lambda place: self._write(paths, place))
            corpus = read_table(entry / "documents.arrow")
        if not len(corpus):
            raise DataError(f"The corpus is empty: {', '.join(patterns)} holds no text. Name files with text in them.")
        return corpus

    def check_found(self, corpus: Dataset, patterns: Sequence[str]) -> None:
        """Raises DataError for a label or vector that no document has: a name misspelt would be trained without."""
        for name in (*self.labels, *self.vectors):
            if corpus.data.column(name).null_count == len(corpus):
                fields = {field for path in _paths(patterns) for _, found in self._objects(path) for field in found}
                others = sorted(fields - {self.text, name})
                key = "labels" if name in self.labels else "vectors"
                raise DataError(
                    f'json_lines: {key} names the field "{name}", but it has a value in no line of {", ".join(patterns)}; '
                    f"beside the text the lines have {others or 'no fields'}.{nearest(name, others)} Mend [data] {key}, or "
                    "leave the field out."
                )

    def _write(self, paths: Sequence[str], place: Path) -> None:
        write_table(self.schema, self._batches(paths), place / "documents.arrow")

    def _batches(self, paths: Sequence[str]) -> Iterator[pa.RecordBatch]:
        with progress(len(paths), "reading text") as bar:
            for path in paths:
                yield pa.RecordBatch.from_pylist(list(self._documents(path)), schema=self.schema)
                bar.advance(1)

    def _documents(self, path: str) -> Iterator[dict[str, Any]]:
        for place, found in self._objects(path):
            text = checked_text(found[self.text], place)
            values: dict[str, Any] = {name: self._label(found.get(name), name, place) for name in self.labels}
            values |= {name: self._vector(found.get(name), name, place) for name in self.vectors}
            if text.strip():
                yield {"text": text, "name": place, **values}

    def _objects(self, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
        """Every line that is not blank: its place and its object."""
        with fsspec.open(path, "rt", encoding="utf-8-sig") as file:
            try:
                lines = list(file)
            except UnicodeDecodeError as error:
                raise DataError(
                    f"{path} is not UTF-8: {error}. Convert it to UTF-8, for instance with iconv."
                ) from error
        for number, line in enumerate(lines, start=1):
            if line.strip():
                place = f"{base_name(path)} line {number}"
                yield place, self._object(line, place)

    def _object(self, line: str, place: str) -> dict[str, Any]:
        try:
            found = json.loads(line)
        except ValueError as error:
            raise DataError(f"{place} is no JSON: {error}. Every line must be one object.") from error
        if not isinstance(found, dict) or self.text not in found:
            fields = sorted(found) if isinstance(found, dict) else type(found).__name__
            raise DataError(
                f'{place} must be an object with the field "{self.text}"; it has {fields}. Name the field of the text: '
                'text = "...".'
            )
        return found

    def _label(self, value: Any, name: str, place: str) -> int | None:
        if value is None or (isinstance(value, int) and not isinstance(value, bool) and value >= 0):
            return value
        raise DataError(
            f'{place}: the label "{name}" must be a whole number from 0, or null; got {value!r}. Number the classes.'
        )

    def _vector(self, value: Any, name: str, place: str) -> list[float] | None:
        numbers = isinstance(value, list) and all(isinstance(x, int | float) and not isinstance(x, bool) for x in value)
        if value is None or (numbers and value):
            return value
        raise DataError(f'{place}: the vector "{name}" must be a list of numbers, or null; got {value!r}.')


def _paths(patterns: Sequence[str]) -> list[str]:
    return [path for pattern in patterns for path in find_files(pattern)]
