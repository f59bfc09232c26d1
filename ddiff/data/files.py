"""Whole files at any fsspec path: written under another name and renamed, so that none is ever half there."""

from __future__ import annotations

import json
from typing import Any

from ddiff.atomic import write_atomic
from ddiff.data.paths import open_file
from ddiff.errors import DataError


def write_json(path: str, content: Any) -> None:
    """Write JSON to a local path or any that fsspec knows; folders are made."""
    write_atomic(str(path), json.dumps(content, ensure_ascii=False))


def read_bytes(path: str, what: str) -> bytes:
    """The content of a file; DataError, naming it as `what`, when it cannot be read."""
    try:
        with open_file(str(path)) as file:
            return file.read()
    except DataError as error:
        raise DataError(f"{what}: {error}") from error


def read_json(path: str, what: str) -> Any:
    """The JSON in a file; DataError, naming it as `what`, when it is missing or is not whole."""
    content = read_bytes(path, what)
    try:
        return json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{what}: {path} is not a whole JSON file ({error}). Make it again."
        ) from error
