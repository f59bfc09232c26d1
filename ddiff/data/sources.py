"""Where the texts of a large corpus come from: data sets of the hub, and files anywhere, read in order.

Nothing is copied: texts stream past. A chunk's cursor is the place in the stream after it, from which another process goes
on without reading what came before (the file under way excepted).
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
from ddiff.data.jsonl import check_once, json_objects
from ddiff.data.paths import base_name, file_version, find_all_files, open_file, printable
from ddiff.data.pretrained import is_folder, is_place
from ddiff.data.text import RULES, Split, check_text, text_documents
from ddiff.data.tokenizer_workers import DOCUMENTS_AT_ONCE, TRAIN, Chunk
from ddiff.errors import ArgumentError, DataError, suggest

# The library would tell the hub of every opening, that of local files too. Without a network each such request waits.
datasets.config.HF_UPDATE_DOWNLOAD_COUNTS = False

Format = Literal["parquet", "json", "text"]
Texts = list[str | None]

_ENDINGS: dict[str, Format] = {
    ".parquet": "parquet", ".json": "json", ".jsonl": "json", ".ndjson": "json", ".txt": "text", ".text": "text",
}  # fmt: skip


@final
@dataclass(frozen=True)
class TextSource:
    """The texts of a corpus in order.

    `name` is for messages, and `identity` (JSON) tells sources apart. `read(cursor)` gives lists of texts from a cursor on
    (None: from the start), each with the cursor after it (JSON). `paths` are the files that are read, if they are known.
    Blank and missing texts are left out.
    """

    name: str
    identity: Any
    read: Callable[[Any], Iterator[tuple[Texts, Any]]]
    paths: tuple[str, ...] = ()

    def __str__(self) -> str:
        return self.name

    def chunks(self, cursor: Any = None, part: str | None = TRAIN) -> Iterator[Chunk]:
        """The texts after a cursor (None: all) in order; DataError for a column that is missing or not of text, and for
        what cannot be read."""
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
    """A data set of the hub, or a local folder of files, streamed.

    It is known by its name, split and `revision`: pin one (a commit), since without it what was tokenised first stays.
    """
    if Path(path).is_file() or (is_place(path) and not is_folder(path)):
        raise DataError(
            f"The data set {path!r} cannot be read: it is no folder, and no name on the hub (NAME or OWNER/NAME). Correct "
            "it, or name the folder of the data files, relative to where ddiff runs; single files are read by "
            '[data] kind = "files".'
        )
    name = f"The data set {path} ({split})"
    remedy = (
        'Check its files, or take kind = "files", which names the one that is at fault.'
        if os.path.isdir(path)
        else 'Check name, config and split. One made by a script is read with revision = "refs/convert/parquet". Without a '
        f"connection, download it on a machine that has one (`hf download {path} --repo-type dataset --local-dir FOLDER`) "
        "and name the folder."
    )
    stream = _HubStream(
        name,
        column,
        lambda: load_dataset(path, config, split=split, revision=revision, streaming=True),
        remedy,
    )
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
    """Files of parquet, JSON lines or text, by fsspec paths and globs, in the order of the patterns, then of their names.

    `format` is told by the endings, packed or not; a file that two patterns name is read once. A document is a row, or a
    `split` of a text file. Files are known by name, size and time or tag of change: they are not read for it. DataError
    when there are none, or of several formats.
    """
    paths = find_all_files(patterns)
    found = format or _format(paths)
    options = {"split": split} if found == "text" else {}
    return TextSource(
        f"{', '.join(map(printable, patterns))} ({len(paths)} files of {found})",
        {
            "files": [file_version(path) for path in paths],
            "format": found,
            "column": column,
            "rules": RULES,
            **options,
        },
        partial(_read_files, paths, _records(found, column, split)),
        tuple(paths),
    )


@dataclass(frozen=True)
class _HubStream:
    """A stream of the datasets library, of which one column is read; `remedy` is for what cannot be opened."""

    name: str
    column: str
    load: Callable[[], IterableDataset]
    remedy: str

    def read(self, cursor: Any) -> Iterator[tuple[Texts, Any]]:
        stream = self._opened()
        if cursor is not None:
            stream.load_state_dict(cursor)
        batches = stream.iter(DOCUMENTS_AT_ONCE)
        while (batch := self._next(batches)) is not None:
            _check_named(self.name, self.column, list(batch))
            texts = [_text(value, self.name, self.column) for value in batch[self.column]]
            yield texts, stream.state_dict()

    def _opened(self) -> IterableDataset:
        try:
            stream = self.load()
        except Exception as error:  # of any library that reads some format from some place
            raise self._unreadable(error) from error
        if stream.column_names is None:
            return stream
        _check_named(self.name, self.column, stream.column_names)
        return stream.select_columns([self.column])

    def _next(self, batches: Iterator[Any]) -> Any:
        try:
            return next(batches, None)
        except Exception as error:
            raise self._unreadable(error) from error

    def _unreadable(self, error: Exception) -> DataError:
        first = (str(error).splitlines() or [""])[0]
        return DataError(
            f"{self.name} cannot be read: {type(error).__name__}: {first}. {self.remedy}"
        )


Records = Callable[[str, int], Iterator[tuple[int, str | None]]]
"""The texts of a file after so many of its records, each with the number of its record (counted from 1)."""


def _read_files(paths: Sequence[str], records: Records, cursor: Any) -> Iterator[tuple[Texts, Any]]:
    """Texts of files one after another; a cursor is the number of a file and of its last record that was read."""
    first, done = (0, 0) if cursor is None else cursor
    texts: Texts = []
    place: list[int] = []
    for number in range(first, len(paths)):
        for record, text in records(paths[number], done if number == first else 0):
            texts.append(text)
            place = [number, record]
            if len(texts) == DOCUMENTS_AT_ONCE:
                yield texts, place
                texts = []
    if texts:
        yield texts, place


def _records(format: Format, column: str, split: Split) -> Records:
    if format == "text":
        return partial(_text_records, split)
    return partial(_json_records if format == "json" else _parquet_records, column)


def _text_records(split: Split, path: str, done: int) -> Iterator[tuple[int, str | None]]:
    with open_decompressed(path) as file:
        for number, text in text_documents(file, printable(path), split):
            if number > done:
                yield number, text


def _json_records(column: str, path: str, done: int) -> Iterator[tuple[int, str | None]]:
    with open_decompressed(path) as file:
        first = True
        for number, place, found in json_objects(file, path):
            if (
                first
            ):  # later objects may lack it, and then have no text: logs hold other lines, too
                _check_named(place, column, list(found))
                first = False
            check_once(found, [column], place)
            if number > done:
                yield number, _text(found.get(column), place, column)


def _parquet_records(column: str, path: str, done: int) -> Iterator[tuple[int, str | None]]:
    if path.lower().endswith(tuple(PACKED)):
        raise DataError(
            f"{printable(path)} is a packed parquet file. Unpack it: parquet packs its columns itself."
        )
    with open_file(path) as file:
        table = pq.ParquetFile(file)
        name = printable(path)
        _check_named(name, column, table.schema_arrow.names)
        number = 0
        for group in range(table.num_row_groups):
            size = table.metadata.row_group(group).num_rows
            if number + size <= done:
                number += size
                continue
            # the other columns are not read: they may differ from file to file
            for batch in table.iter_batches(
                DOCUMENTS_AT_ONCE, row_groups=[group], columns=[column]
            ):
                for value in batch.column(column).to_pylist():
                    number += 1
                    if number > done:
                        yield number, _text(value, f"{name} row {number}", column)


def _text(value: Any, place: str, column: str) -> str | None:
    if value is None:
        return None
    if not isinstance(value, str):
        raise DataError(
            f'{place}: the column "{column}" must hold text; it holds {repr(value)[:80]} ({type(value).__name__}). '
            "Name the column of the text: column = ..."
        )
    return check_text(value, place)


def _check_named(place: str, column: str, columns: Sequence[str]) -> None:
    if column not in columns:
        raise DataError(
            f'{place} has no column "{column}"; it has {sorted(columns)}.{suggest(column, columns)} Name the column of '
            "the text: column = ..."
        )


def _format(paths: Sequence[str]) -> Format:
    found = {_ENDINGS.get(_ending(path)) for path in paths}
    if len(found) > 1 or None in found:
        endings = sorted({_ending(path) for path in paths})
        raise ArgumentError(
            f"files: the format cannot be told from the endings {endings}; one of {sorted(set(_ENDINGS.values()))} is due "
            "for all files. Say it (format = ...), or name files of one format."
        )
    (only,) = found
    assert only is not None
    return only


def _ending(path: str) -> str:
    name = base_name(path).lower()
    for packed in PACKED:
        name = name.removesuffix(packed)
    return name[name.rfind(".") :] if "." in name else ""
