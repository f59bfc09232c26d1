"""Bytes of an evaluated text, by which bits per byte divide."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np

from ddiff.data.packing import PackedRows
from ddiff.data.tokenizer import Tokenizer
from ddiff.errors import DataError
from ddiff.evaluation.likelihood import Evaluation

_TEXTS_AT_ONCE = 1024
COUNTED = "UTF-8 bytes of the documents, all of which the tokens decode to"
"""Rule by which the bytes of an evaluation are counted."""
RECORDED = "UTF-8 bytes of the documents, as recorded by their token shards"
"""Rule if only tokens are stored, so that the text cannot be counted again."""


def describe_bytes(evaluation: Evaluation, *, has_texts: bool = True) -> dict[str, Any] | None:
    """Return the number of bytes of an evaluation for its record; None without bits per byte.

    `has_texts`: whether the documents were read, not only their tokens.
    """
    if evaluation.bits_per_byte is None:
        return None
    return {"number": evaluation.num_bytes, "counted": COUNTED if has_texts else RECORDED}


def count_changed_texts(texts: Iterable[str], rows: PackedRows, tokenizer: Tokenizer) -> int:
    """Return the number of texts that differ from the decoded tokens of their rows.

    If a tokenizer replaces or drops characters, its tokens are not those of all bytes of the text,
    and bits per byte would be too small.

    Args:
        texts: the documents from which the rows were packed, in order.
        rows: rows of the documents.
        tokenizer: tokenizer of the rows.

    Raises DataError unless the tokens claim the number of bytes of the texts.
    """
    ends = [0, *(int(end) for part in rows.tokens.document_ends() for end in part)]
    num_bytes = 0
    changed = 0
    first = 0
    for part in _divide(texts):
        num_bytes += sum(len(text.encode()) for text in part)
        last = first + len(part)
        if last < len(ends):
            decoded = _decode(rows, tokenizer, ends[first : last + 1])
            changed += sum(text != again for text, again in zip(part, decoded, strict=True))
        first = last
    check_num_bytes(rows, num_bytes)
    return changed


def check_num_bytes(rows: PackedRows, expected: int) -> None:
    """Raise DataError unless the number of bytes of the rows is `expected`."""
    found = rows.tokens.num_bytes
    if found != expected:
        raise DataError(
            f"The tokens claim {found} bytes, but the text has {expected} bytes of UTF-8. Bits per "
            "byte would be wrong. The cached tokens belong to another text: delete the cache."
        )


def _divide(texts: Iterable[str]) -> Iterator[list[str]]:
    """Divide texts into lists of up to 1024."""
    remaining = iter(texts)
    while part := list(islice(remaining, _TEXTS_AT_ONCE)):
        yield part


def _decode(rows: PackedRows, tokenizer: Tokenizer, ends: Sequence[int]) -> list[str]:
    """Return the decoded tokens between each two neighbours of `ends`, without end marks."""
    ids, _ = rows.tokens.read(ends[0], ends[-1])
    borders = np.asarray(ends[1:-1]) - ends[0]
    documents = []
    for document in np.split(ids, borders):
        found = document.tolist()
        if found and found[-1] == tokenizer.eos_id:
            found.pop()
        documents.append(found)
    return tokenizer.decode(documents)
