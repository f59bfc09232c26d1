"""Read and write small files at any fsspec path.

A file is written under a temporary name and then renamed, so that the file is complete or absent.
"""

from __future__ import annotations

import json
from typing import Any

from ddiff.atomic import write_atomic
from ddiff.data.paths import open_file
from ddiff.errors import DataError


def write_json(path: str, content: Any) -> None:
    """Write JSON to a local or fsspec path, creating missing folders."""
    write_atomic(str(path), json.dumps(content, ensure_ascii=False))


def read_bytes(path: str, what: str) -> bytes:
    """Return the content of a file.

    `what` is the beginning of the error message. Raises DataError if the file cannot be read.
    """
    try:
        with open_file(str(path)) as file:
            return file.read()
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def read_json(path: str, what: str) -> Any:
    """Return the parsed content of a JSON file.

    `what` is the beginning of the error message. Raises DataError if the file cannot be read or
    parsed.
    """
    content = read_bytes(path, what)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{what}: {path} is not a complete JSON file ({error}). Write the file again."
        ) from error
