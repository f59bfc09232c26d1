"""Tables written once as an Arrow stream and read as a memory-mapped `datasets.Dataset`."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
from datasets import Dataset


def write_table(schema: pa.Schema, batches: Iterable[pa.RecordBatch], path: Path | None = None) -> Dataset | None:
    """Stream record batches to `path`, or, without a path, into memory as the Dataset that is returned."""
    sink = pa.BufferOutputStream() if path is None else pa.OSFile(str(path), "wb")
    with sink, pa.ipc.new_stream(sink, schema) as stream:
        for batch in batches:
            stream.write_batch(batch)
        if path is None:
            stream.close()
            return Dataset.from_buffer(sink.getvalue())
    return None


def read_table(path: Path) -> Dataset:
    """The memory-mapped table of an Arrow stream file."""
    return Dataset.from_file(str(path))
