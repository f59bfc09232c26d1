"""Stream the texts of a large corpus from hub data sets or files.

Texts are not stored. Every chunk of texts has a cursor, the position in the stream after the chunk.
Another process can continue from a cursor without reading the earlier files again.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal, final

import datasets
import pyarrow.parquet as pq
from datasets import IterableDataset, load_dataset

from ddiff.data.compression import ENDINGS as PACKED
from ddiff.data.compression import open_decompressed
from ddiff.data.jsonl import check_no_duplicates, json_objects
from ddiff.data.paths import base_name, file_version, find_all_files, open_file, printable
from ddiff.data.pretrained import is_folder, is_local_path
from ddiff.data.text import RULES, Split, check_text, text_documents
from ddiff.data.tokenizer_workers import DOCUMENTS_AT_ONCE, TRAIN, Chunk
from ddiff.errors import ArgumentError, DataError, suggest

# By default the datasets library reports each opened data set to the hub, even for local files.
# Without a network, each such request waits for its timeout.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

Format = Literal["parquet", "json", "text"]
Texts = list[str | None]

_ENDINGS: dict[str, Format] = {
    ".parquet": "parquet",
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".txt": "text",
    ".text": "text",
}


@final
@dataclass(frozen=True)
class TextSource:
    """Source of texts in a fixed order.

    name: name of the source in error messages.
    identity: JSON that distinguishes sources.
    read: function (cursor) that yields pairs (list of texts, cursor after these texts). Reading
        begins after `cursor`, or at the start of the source if `cursor` is None. A cursor is JSON.
    paths: the files that the source reads, if known.
    """

    name: str
    identity: Any
    read: Callable[[Any], Iterator[tuple[Texts, Any]]]
    paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def chunks(self, cursor: Any = None, part: str | None = TRAIN) -> Iterator[Chunk]:
        """Yield the texts after the position `cursor` of the source as chunks, in order.

        If `cursor` is None, all texts are yielded. `part` is the part of every chunk: "train",
        "validation", or None if the hash of each text selects the part.

        Blank and missing texts are left out. Raises DataError if the source cannot be read, or if
        the text column is missing or is not text.
        """
        for found, after in self.read(cursor):
            texts = [text for text in found if text is not None and text and not text.isspace()]
            if texts:
                yield Chunk(texts, after, part)


def open_hub_source(
    path: str,
    *,
    config: str | None = None,
    split: str = "train",
    column: str = "text",
    revision: str | None = None,
) -> TextSource:
    """Open a hub data set or a local folder as a stream.

    Name, configuration, split, column and revision identify the source. `revision` should be a
    commit. Otherwise ddiff does not notice if the data set changes on the hub, and uses the cached
    shards of the earlier version.
    """
    if Path(path).is_file() or (is_local_path(path) and not is_folder(path)):
        raise DataError(
            f"The data set {path!r} cannot be read: it is neither a folder nor a name on the hub "
            "(NAME or OWNER/NAME). Correct the name, or name the folder of the data files; "
            "relative paths start in the working directory. Single files are read by [data] "
            'kind = "files".'
        )
    name = f"The data set {path} ({split})"
    if os.path.isdir(path):
        remedy = 'Check its files, or set kind = "files", which names the unreadable file.'
    else:
        remedy = (
            "Check name, config and split. For a data set with a loading script, set revision = "
            '"refs/convert/parquet". Without a connection, download the data set on another '
            f"machine (`hf download {path} --repo-type dataset --local-dir FOLDER`) and name "
            "the folder."
        )
    load = partial(load_dataset, path, config, split=split, revision=revision, streaming=True)
    stream = _HubStream(name, column, load, remedy)
    identity = {
        "hub": path,
        "config": config,
        "split": split,
        "column": column,
        "revision": revision,
    }
    return TextSource(name, identity, stream.read)


def open_file_source(
    patterns: Sequence[str],
    *,
    format: Format | None = None,
    column: str = "text",
    split: Split = "line",
) -> TextSource:
    """Open parquet, JSON-lines or text files, given by fsspec paths and globs.

    Files are read in the order of the patterns, and the files of one pattern in the order of their
    names. Each file is read once. Files may be compressed. A file is identified by its name, its
    size, and its modification time or entity tag.

    Args:
        format: format of all files. None: the format that the file endings show.
        column: column or field with the text, in parquet and JSON files. A row or an object is a
            document.
        split: unit of a document in text files: "line", "paragraph" or "file".

    Raises ArgumentError if `patterns` is empty or the files have different formats, DataError if a
    pattern matches no file.
    """
    if not patterns:
        raise ArgumentError(
            "open_file_source: patterns must hold at least one path or glob; got an empty list. "
            "Name the files of the corpus."
        )
    paths = find_all_files(patterns)
    found = format or _detect_format(paths)
    identity: dict[str, Any] = {
        "files": [file_version(path) for path in paths],
        "format": found,
        "column": column,
        "rules": RULES,
    }
    if found == "text":
        identity["split"] = split
    name = f"{', '.join(map(printable, patterns))} ({len(paths)} files of {found})"
    read = partial(_read_files, paths, _record_reader(found, column, split))
    return TextSource(name, identity, read, tuple(paths))


@dataclass(frozen=True)
class _HubStream:
    """Column of a streamed data set of the datasets library.

    name: name of the data set in error messages.
    remedy: last sentences of the error message for a data set that cannot be read.
    """

    name: str
    column: str
    load: Callable[[], IterableDataset]
    remedy: str

    def read(self, cursor: Any) -> Iterator[tuple[Texts, Any]]:
        stream = self._open()
        if cursor is not None:
            stream.load_state_dict(cursor)
        batches = stream.iter(DOCUMENTS_AT_ONCE)
        while (batch := self._next(batches)) is not None:
            _check_column(self.name, self.column, list(batch))
            texts = [_check_value(value, self.name, self.column) for value in batch[self.column]]
            yield texts, stream.state_dict()

    def _open(self) -> IterableDataset:
        try:
            stream = self.load()
        except Exception as error:  # each format and each file system has different error classes
            raise self._read_error(error) from error
        if stream.column_names is None:  # known only after the first batch
            return stream
        _check_column(self.name, self.column, stream.column_names)
        return stream.select_columns([self.column])

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches, None)
        except Exception as error:
            raise self._read_error(error) from error

    def _read_error(self, error: Exception) -> DataError:
        first = (str(error).splitlines() or [""])[0]
        return DataError(
            f"{self.name} cannot be read: {type(error).__name__}: {first}. {self.remedy}"
        )


Records = Callable[[str, int], Iterator[tuple[int, str | None]]]
"""Function (path, done) that yields (number, text) of the records after number `done`.

Numbers count from 1.
"""


def _read_files(paths: Sequence[str], records: Records, cursor: Any) -> Iterator[tuple[Texts, Any]]:
    """Yield pairs (list of texts, cursor after these texts) of files in order.

    A cursor is a pair: the index of a file, and the number of the last record that was read from
    the file.
    """
    first, done = (0, 0) if cursor is None else cursor
    texts: Texts = []
    after: list[int] = []
    for number in range(first, len(paths)):
        for record, text in records(paths[number], done if number == first else 0):
            texts.append(text)
            after = [number, record]
            if len(texts) == DOCUMENTS_AT_ONCE:
                yield texts, after
                texts = []
    if texts:
        yield texts, after


def _record_reader(format: Format, column: str, split: Split) -> Records:
    if format == "text":
        return partial(_text_records, split)
    if format == "json":
        return partial(_json_records, column)
    return partial(_parquet_records, column)


def _text_records(split: Split, path: str, done: int) -> Iterator[tuple[int, str | None]]:
    with open_decompressed(path) as file:
        for number, text in text_documents(file, printable(path), split):
            if number > done:
                yield number, text


def _json_records(column: str, path: str, done: int) -> Iterator[tuple[int, str | None]]:
    with open_decompressed(path) as file:
        is_first = True
        for number, place, found in json_objects(file, path):
            # Only the first object must have the column, because log files also contain other
            # objects.
            if is_first:
                _check_column(place, column, list(found))
                is_first = False
            check_no_duplicates(found, [column], place)
            if number > done:
                yield number, _check_value(found.get(column), place, column)


def _parquet_records(column: str, path: str, done: int) -> Iterator[tuple[int, str | None]]:
    if path.lower().endswith(tuple(PACKED)):
        raise DataError(
            f"{printable(path)} is a compressed parquet file, which cannot be read. Decompress the "
            "file: the columns inside a parquet file are already compressed."
        )
    with open_file(path) as file:
        table = pq.ParquetFile(file)
        name = printable(path)
        _check_column(name, column, table.schema_arrow.names)
        number = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if number + size <= done:
                number += size
                continue
            # No other column is read, because the other columns may differ from file to file.
            batches = table.iter_batches(DOCUMENTS_AT_ONCE, row_groups=[group], columns=[column])
            for batch in batches:
                for value in batch.column(column).to_pylist():
                    number += 1
                    if number > done:
                        yield number, _check_value(value, f"{name} row {number}", column)


def _check_value(value: Any, place: str, column: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(
            f'{place}: the column "{column}" must hold text; it holds {repr(value)[:80]} '
            f"({type(value).__name__}). Name the column of the text: column = ..."
        )
    return check_text(value, place)


def _check_column(place: str, column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        raise DataError(
            f'{place} has no column "{column}"; it has {sorted(columns)}.{suggest(column, columns)}'
            " Name the column of the text: column = ..."
        )


def _detect_format(paths: Sequence[str]) -> Format:
    found = {_ENDINGS.get(_ending(path)) for path in paths}
    format = found.pop()
    if found or format is None:
        endings = sorted({_ending(path) for path in paths})
        raise ArgumentError(
            f"files: all files must have the same format, one of "
            f"{sorted(set(_ENDINGS.values()))}; their endings {endings} do not show which. "
            "Set format = ..., or name files of one format."
        )
    return format


def _ending(path: str) -> str:
    name = base_name(path).lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return name[name.rfind(".") :] if "." in name else ""
