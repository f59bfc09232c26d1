"""Whole files at any fsspec path: written under another name and renamed, so that none is ever half there."""

from __future__ import annotations

import json
import uuid
from contextlib import suppress
from typing import Any

import fsspec

from ddiff.data.paths import open_file
from ddiff.errors import DataError


def write_json(path: str, content: Any) -> None:
    """Write JSON to a local path or any that fsspec knows; folders are made."""
    system, place = fsspec.url_to_fs(str(path))
    partial = f"{place}.partial-{uuid.uuid4().hex[:8]}"
    if "/" in place:
        system.makedirs(place.rsplit("/", 1)[0], exist_ok=True)
    try:
        with system.open(partial, "w", encoding="utf-8") as file:
            json.dump(content, file, ensure_ascii=False)
        system.mv(partial, place)
    except BaseException as error:
        with suppress(Exception):  # what went wrong is told, and not that this did too
            system.rm(partial)
        if isinstance(error, OSError) and error.filename is None:
            error.filename = str(path)
        raise


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
