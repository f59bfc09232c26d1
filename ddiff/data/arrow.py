"""Write tables as Arrow streams and read them as memory-mapped `datasets.Dataset` objects."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset


def write_table(schema: pa.Schema, batches: Iterable[pa.RecordBatch], path: Path) -> None:
    """Write record batches to a local Arrow stream file, one batch at a time."""
    with pa.OSFile(str(path), "wb") as sink:
        _write_batches(schema, batches, sink)


def read_table(path: Path) -> Dataset:
    """Memory-map the table of an Arrow stream file."""
    return Dataset.from_file(str(path))


def build_table_in_memory(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Dataset:
    """Build a table from record batches in memory, without a file."""
    sink = pa.BufferOutputStream()
    _write_batches(schema, batches, sink)
    return Dataset.from_buffer(sink.getvalue())


def _write_batches(
    schema: pa.Schema, batches: Iterable[pa.RecordBatch], sink: pa.NativeFile
) -> None:
    with pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
