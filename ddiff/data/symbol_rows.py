"""Rows of symbols: text files with one row per line, and the bundled names.

All rows of a corpus have the same number of symbols. The fill symbol of a corpus follows the end of
its shorter texts, up to the end of the row.
"""

from __future__ import annotations

import lzma
from collections.abc import Sequence
from importlib.resources import files

from datasets import Dataset

from ddiff.data.cache import Cache
from ddiff.data.documents import Documents, documents_from_texts, read_text_files
from ddiff.data.tokenizer import Tokenizer
from ddiff.data.tokenizer_workers import hash_to_unit
from ddiff.errors import ArgumentError, DataError

FILL_OF_NAMES = " "
LONGEST_NAME = 13
"""Number of letters of the longest bundled name."""


def read_symbol_rows(
    train: Sequence[str],
    *,
    length: int,
    validation: Sequence[str] = (),
    held_out: float = 0.05,
    fill: str | None = None,
    cache: Cache | None = None,
) -> Documents:
    """Read text files with one row of symbols per line, for example aligned DNA.

    All rows have `length` symbols. With `fill`, a shorter line is filled up with this symbol, which
    must not occur in the line itself. Blank lines are left out. Raises DataError for any other
    line; the message names the file and the line. `read_text_files` describes the other arguments.
    """
    documents = read_text_files(
        train, validation=validation, held_out=held_out, split="line", cache=cache
    )
    if fill is not None:
        return Documents(
            _fill_part(documents.train, length, fill),
            _fill_part(documents.validation, length, fill),
            fill=fill,
        )
    for part in (documents.train, documents.validation):
        for row in part:
            if len(row["text"]) != length:
                raise DataError(
                    f"read_symbol_rows: {row['name']} has {len(row['text'])} symbols, but every "
                    f"row must have length = {length}. Fix the file, set [data] length to the "
                    "length of the rows, or set [data] fill to a symbol that fills up shorter rows."
                )
    return documents


def load_bundled_names(*, length: int, held_out: float = 0.05) -> Documents:
    """Load the bundled names, one per row, filled up with spaces to `length` symbols.

    A fraction `held_out` of the names, chosen by the hash of the name, is the validation part.
    Raises ArgumentError if the rows are too short for the longest name.
    """
    check_name_length(length)
    packed = files("ddiff.data").joinpath("names", "names.txt.xz").read_bytes()
    names = lzma.decompress(packed).decode().split()
    train: list[str] = []
    validation: list[str] = []
    for name in names:
        # The hash is that of the name without fill, so that the parts do not depend on `length`.
        part = validation if hash_to_unit(name.encode()) < held_out else train
        part.append(name)
    return Documents(
        _fill_texts(train, train, length, FILL_OF_NAMES),
        _fill_texts(validation, validation, length, FILL_OF_NAMES),
        fill=FILL_OF_NAMES,
    )


def fill_rows(texts: Sequence[str], tokenizer: Tokenizer, length: int) -> list[str]:
    """Return the texts, filled up to `length` symbols if the tokenizer has a fill symbol.

    A row of a run with a fill symbol is a text and its fill. A likelihood of a text is therefore
    that of the whole row. Longer texts and rows are returned as they are.
    """
    if tokenizer.fill_id is None:
        return list(texts)
    fill = tokenizer.decode([[tokenizer.fill_id]])[0]
    return [text.ljust(length, fill) for text in texts]


def check_name_length(length: int) -> None:
    """Raise ArgumentError if rows of `length` symbols are too short for a bundled name."""
    if length < LONGEST_NAME:
        raise ArgumentError(
            f"[data] length must be at least {LONGEST_NAME}, the number of letters of the longest "
            f"bundled name; got {length}. Use length = 16, for instance."
        )


def _fill_part(part: Dataset, length: int, fill: str) -> Dataset:
    return _fill_texts(part["text"][:], part["name"][:], length, fill)


def _fill_texts(texts: Sequence[str], names: Sequence[str], length: int, fill: str) -> Dataset:
    """Fill up every text to `length` symbols, and return the rows as documents called `names`.

    Raises DataError for a text that has more than `length` symbols or contains `fill`.
    """
    rows = []
    for text, name in zip(texts, names, strict=True):
        if fill in text:
            raise DataError(
                f"{name} holds {fill!r}, the symbol that fills up shorter rows: {text!r}. Choose "
                "another fill symbol, or remove this symbol from the row."
            )
        if len(text) > length:
            raise DataError(
                f"{name} has {len(text)} symbols, but a row has length = {length}: {text!r}. Set "
                "[data] length to the length of the longest row, or remove the row."
            )
        rows.append(text.ljust(length, fill))
    return documents_from_texts(rows, names)
