"""Tables written once as an Arrow stream and read as a memory-mapped `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset


def write_table(schema: pa.Schema, batches: Iterable[pa.RecordBatch], path: Path) -> None:
    """Stream record batches to a local file."""
    with pa.OSFile(str(path), "wb") as sink, pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)


def read_table(path: Path) -> Dataset:
    """The memory-mapped table of an Arrow stream file."""
    return Dataset.from_file(str(path))


def table_in_memory(schema: pa.Schema, batches: Iterable[pa.RecordBatch]) -> Dataset:
    """The same table without a file."""
    sink = pa.BufferOutputStream()
    with pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
    return Dataset.from_buffer(sink.getvalue())
