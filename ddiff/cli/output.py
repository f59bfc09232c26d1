"""Output of the command line: tables, characters that cannot be encoded, and closed pipes."""

from __future__ import annotations

import codecs
import io
import os
import sys

import typer


def print_columns(titles: list[str], rows: list[list[str]]) -> None:
    """Print a table of plain text with aligned columns.

    Lines are not wrapped at the width of the terminal.
    """
    widths = [max(map(len, column)) for column in zip(titles, *rows)]
    for line in (titles, *rows):
        cells = [f"{cell:{width}}" for cell, width in zip(line, widths)]
        typer.echo("  ".join(cells).rstrip())


def escape_unencodable_output() -> None:
    """Escape the characters of the output that its encoding cannot represent.

    They are printed as `\\uXXXX`, as in TOML and JSON.
    """
    codecs.register_error("ddiff", escape)
    for stream in (sys.stdout, sys.stderr):
        # a test or a notebook may have put another kind of stream there
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="ddiff")


def escape(error: UnicodeError) -> tuple[str, int]:
    """Return the escapes of the characters that cannot be encoded, and the end of these characters.

    A character is escaped as \\uXXXX, or as \\UXXXXXXXX above 65535. This function is an error
    handler of `codecs`.
    """
    if not isinstance(error, UnicodeEncodeError):
        raise error
    escapes = ""
    for character in error.object[error.start : error.end]:
        code = ord(character)
        escapes += f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"
    return escapes, error.end


def discard_output() -> None:
    """Discard buffered output that cannot be written, so that Python does not fail at exit."""
    with open(os.devnull, "w") as nowhere:
        for stream in (sys.stdout, sys.stderr):
            try:
                stream.flush()
            except (OSError, ValueError, AttributeError):
                try:
                    os.dup2(nowhere.fileno(), stream.fileno())
                except (OSError, ValueError, AttributeError):  # no file behind the stream
                    continue
