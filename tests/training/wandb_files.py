"""Reader of the files that wandb writes in offline mode."""

from __future__ import annotations

import json
import struct
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from wandb.proto import wandb_internal_pb2

HEADER = 7  # bytes at the start of a file
BLOCK = 2**15  # bytes; no header of a chunk crosses the end of a block
FULL, LAST = 1, 4  # kinds of the chunk that ends a record


def read_records(file: Path) -> list[Any]:
    """Return the records of the file of a finished run.

    `Run.finish` returns before the process of wandb has written the last records, so this function
    waits for the record of the exit.
    """
    deadline = time.monotonic() + 30
    while True:
        records = list(_parse(file.read_bytes()))
        if any(record.WhichOneof("record_type") == "exit" for record in records):
            return records
        assert time.monotonic() < deadline, f"{file} has no record of the exit"
        time.sleep(0.05)


def _parse(data: bytes) -> Iterator[Any]:
    """Yield the records of a file with the format of the log of LevelDB."""
    place, parts = HEADER, b""
    while place + HEADER <= len(data):
        left = BLOCK - place % BLOCK
        if left < HEADER:
            place += left
            continue
        _, size, kind = struct.unpack("<IHB", data[place : place + HEADER])
        place += HEADER
        parts += data[place : place + size]
        place += size
        if kind in (FULL, LAST):
            record = wandb_internal_pb2.Record()
            record.ParseFromString(parts)
            yield record
            parts = b""


def read_rows(file: Path) -> list[dict[str, Any]]:
    """Return what each call of `run.log` logged. Keys of nested values are joined by "."."""
    rows = []
    for record in read_records(file):
        if record.WhichOneof("record_type") == "history":
            items = record.history.item
            rows.append({_name(item): json.loads(item.value_json) for item in items})
    return rows


def read_run(file: Path) -> tuple[str, dict[str, Any]]:
    """Return the id and the config of the run of a file."""
    for record in read_records(file):
        if record.WhichOneof("record_type") == "run":
            items = record.run.config.update
            return record.run.run_id, {_name(item): json.loads(item.value_json) for item in items}
    raise AssertionError(f"{file} has no run")


def _name(item: Any) -> str:
    return item.key or ".".join(item.nested_key)
