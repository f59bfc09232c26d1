"""Small files at any fsspec path, read and written as a whole.

A file is written under another name and then renamed, so that it is complete or absent.
"""

from __future__ import annotations

import json
from typing import Any

from ddiff.atomic import write_atomic
from ddiff.data.paths import open_file
from ddiff.errors import DataError


def write_json(path: str, content: Any) -> None:
    """Write JSON to a local or fsspec path; missing folders are created."""
    write_atomic(str(path), json.dumps(content, ensure_ascii=False))


def read_bytes(path: str, what: str) -> bytes:
    """Return the content of a file; the DataError of an unreadable one begins with `what`."""
    try:
        with open_file(str(path)) as file:
            return file.read()
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def read_json(path: str, what: str) -> Any:
    """Return the JSON in a file; the DataError of a damaged one begins with `what`."""
    content = read_bytes(path, what)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{what}: {path} is not a whole JSON file ({error}). Make it again."
        ) from error
