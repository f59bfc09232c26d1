"""Read tables of records: JSON lines, one JSON array, CSV and parquet files.

A record is one object or row. Files are recognized by their endings. Only the named columns are
read; other columns may hold anything.
"""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from typing import Any

import pyarrow.parquet as pq

from ddiff.data.compression import open_uncompressed
from ddiff.data.jsonl import check_no_duplicates, json_objects
from ddiff.data.paths import base_name, explain_errors, open_file, printable
from ddiff.errors import DataError, suggest

JSON_ENDINGS = (".json", ".jsonl", ".ndjson")
CSV_ENDINGS = (".csv", ".tsv")
PARQUET_ENDING = ".parquet"
ROWS_AT_ONCE = 256  # rows of a parquet file that are in memory together

Record = tuple[str, dict[str, Any]]
"""Name of a record in messages, such as "train.json object 3", and its values by column."""


def read_records(
    path: str, columns: Sequence[str], optional: Sequence[str] = ()
) -> Iterator[Record]:
    """Yield (place, values of the columns) for each record of a file.

    A value that is null, or an empty cell of a CSV file, is None.

    Args:
        path: file with one of the endings above.
        columns: columns that the file must have.
        optional: columns that the file may have; None in records without them.

    Raises DataError for another ending, a damaged file, and a file without one of `columns`.
    """
    ending = path[path.rfind(".") :].lower()
    if ending in JSON_ENDINGS:
        found = _read_json(path, [*columns, *optional])
    elif ending in CSV_ENDINGS:
        found = _read_csv(path, "\t" if ending == ".tsv" else ",")
    elif ending == PARQUET_ENDING:
        found = _read_parquet(path, columns, optional)
    else:
        known = ", ".join([*JSON_ENDINGS, *CSV_ENDINGS, PARQUET_ENDING])
        raise DataError(
            f"{printable(path)} must have one of the endings {known}, which tell the format of a "
            "table. Rename or convert the file."
        )
    is_first = True
    for place, values in found:
        if is_first:
            _check_columns(place, columns, list(values))
            is_first = False
        yield place, {name: values.get(name) for name in (*columns, *optional)}


def _read_json(path: str, columns: Sequence[str]) -> Iterator[Record]:
    with open_uncompressed(path) as file:
        for _, place, values in json_objects(file, path):
            check_no_duplicates(values, columns, place)
            yield place, values


def _read_csv(path: str, separator: str) -> Iterator[Record]:
    with open_uncompressed(path) as file, explain_errors(path):
        # utf-8-sig drops a byte order mark, which spreadsheets write
        text = io.TextIOWrapper(file, "utf-8-sig", newline="")
        reader = csv.DictReader(text, delimiter=separator, strict=True)
        for number, row in enumerate(reader, start=1):
            place = f"{base_name(path)} row {number}"
            if None in row or None in row.values():
                raise DataError(
                    f"{place} must have {len(reader.fieldnames or ())} cells, as many as the first "
                    "line of the file. Put cells with commas or line ends in quotation marks."
                )
            yield place, {name: value or None for name, value in row.items()}


def _read_parquet(path: str, columns: Sequence[str], optional: Sequence[str]) -> Iterator[Record]:
    with open_file(path) as file, explain_errors(path):
        table = pq.ParquetFile(file)
        existing = table.schema_arrow.names
        _check_columns(base_name(path), columns, existing)
        wanted = [name for name in (*columns, *optional) if name in existing]
        number = 0
        for batch in table.iter_batches(ROWS_AT_ONCE, columns=wanted):
            for values in batch.to_pylist():
                number += 1
                yield f"{base_name(path)} row {number}", values


def _check_columns(place: str, columns: Sequence[str], existing: Sequence[str]) -> None:
    for column in columns:
        if column not in existing:
            raise DataError(
                f'{place} has no column "{column}"; it has {sorted(map(str, existing))}.'
                f"{suggest(column, map(str, existing))} Name the column in [data]."
            )
