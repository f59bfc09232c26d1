"""Tables of documents and samples, built from Arrow record batches and memory-mapped."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset

from ddiff.data.cache import Cache


def load_or_build_table(
    schema: pa.Schema,
    make_batches: Callable[[], Iterable[pa.RecordBatch]],
    *,
    kind: str,
    make_inputs: Callable[[], Mapping[str, Any]],
    cache: Cache | None,
    file: str = "documents.arrow",
) -> Dataset:
    """Return a table, memory-mapped from `cache`, or in memory without one.

    Args:
        schema: columns of the table.
        make_batches: returns the rows; called only if the table is not in the cache.
        kind: kind of the cache entry.
        make_inputs: returns the inputs of the cache entry, on which the rows depend; called only
            with a cache.
        cache: cache of the table; None: the table is built in memory.
        file: name of the file in the cache entry.
    """
    if cache is None:
        sink = pa.BufferOutputStream()
        _write_batches(schema, make_batches(), sink)
        return Dataset.from_buffer(sink.getvalue())

    def build(folder: Path) -> None:
        with pa.OSFile(str(folder / file), "wb") as sink:
            _write_batches(schema, make_batches(), sink)

    entry = cache.load_or_build(kind, make_inputs(), build)
    return Dataset.from_file(str(entry / file))


def _write_batches(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], sink: pa.NativeFile
) -> None:
    with pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
