"""Pack documents into rows of one length, so that each token is in exactly one row.

For training, documents are concatenated, each followed by its end mark, and the token stream is cut
into rows. A row keeps the document number of each position, so that attention can separate
documents. For evaluation, each document starts a new row. Padding occurs only in the last row of
the token stream (training) or of each document (evaluation). The token stream is stored, and rows
are cut from the stream when they are read.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from typing import Protocol, final

import numpy as np
import torch
from datasets import Dataset
from numpy.typing import ArrayLike, NDArray

from ddiff.data.batch import Batch
from ddiff.data.cache import fingerprint
from ddiff.data.conditions import Conditions
from ddiff.data.documents import documents_from_texts
from ddiff.data.permutation import row_at
from ddiff.data.shards import encode_in_memory, stream_from_ids
from ddiff.data.token_stream import TokenStream
from ddiff.data.tokenizer import Tokenizer
from ddiff.data.tokenizer_workers import DOCUMENTS_AT_ONCE, TRAIN, Chunk
from ddiff.errors import ArgumentError, DataError

_ROWS_AT_ONCE = 4096
_READ_WHOLE = 2**26  # tokens; the fingerprint of longer streams uses the checksums of their shards
_Ints = NDArray[np.int32]

GIVEN, ANSWER, FILLER = 0, 1, 2
"""Marks of tokens: never scored; scored; scored, but not counted as a token of the text."""


@final
@dataclass(frozen=True)
class Block:
    """Block of k rows of `length` tokens.

    ids: [k, length] int32.
    document: [k, length] int64, number of the document at each position.
    num_valid: [k] int32, number of tokens before the padding of each row.
    marks: [k, length] uint8, the mark of each token; None: every token is scored and counted.
    """

    ids: _Ints
    document: NDArray[np.int64]
    num_valid: _Ints
    marks: NDArray[np.uint8] | None = None


@final
@dataclass(frozen=True)
class RowMarks:
    """Rows of a token stream in which only some tokens are scored.

    marks: [n] uint8, the mark of each token of the stream: GIVEN, ANSWER or FILLER.
    borders: [R+1] int64, start of each of R rows in the stream, and the end of the last row.
    sources: [D] int64, for each document of the stream, the number of the document of the data set
        from which it was made.
    """

    marks: NDArray[np.uint8]
    borders: NDArray[np.int64]
    sources: NDArray[np.int64]


class Rows(Protocol):
    """Rows of `length` tokens, which are read by their row numbers.

    Padding is at the end of a row. Padded positions have the id of the end mark (or id 0 if the
    tokenizer has no end mark) and the document number of the last token in the row.
    """

    length: int

    def __len__(self) -> int:
        """Return the number of rows (2**62 for an endless stream)."""
        ...

    def __getitem__(self, numbers: ArrayLike | slice) -> Block:
        """Return the rows with the indices `numbers` [k], in the order of `numbers`."""
        ...

    def order(self, seed: int, positions: ArrayLike) -> NDArray[np.int64]:
        """Map global sample numbers `positions` to row numbers, in an order shuffled by `seed`.

        Sample numbers count from 0 over all epochs.
        """
        ...

    def token_counts(self) -> NDArray[np.int64]:
        """Return the counts [V]: how often each of the V tokens is scored in the rows."""
        ...

    def stream(self, at_most: int | None = None) -> tuple[_Ints, NDArray[np.int64]]:
        """Return the first n token ids and their document numbers, two arrays [n] without padding.

        n is the number of tokens in the rows, or `at_most` if it is smaller.
        """
        ...

    @property
    def fingerprint(self) -> str:
        """Identifier of the rows, 32 hexadecimal digits."""
        ...


@final
class PackedRows:
    """Rows that are cut from a token stream.

    With `separate`, each document starts a new row. `marks`: borders of the rows, and the tokens
    that are scored; None: all tokens are scored.
    """

    def __init__(
        self,
        stream: TokenStream,
        length: int,
        *,
        filler: int,
        separate: bool = False,
        marks: RowMarks | None = None,
    ) -> None:
        self.tokens = stream
        self.length = length
        self.marks = marks
        self._filler = filler
        self._ends: NDArray[np.int64] | None = None  # [D] end of each document in the stream
        self._last_rows: NDArray[np.int64] | None = None  # [D] row after the document's last row
        if separate:
            ends = np.concatenate([np.empty(0, np.int64), *stream.document_ends()])
            sizes = np.diff(ends, prepend=0)
            rows_of_document = -(-sizes // length)  # rounded up: the last row may be partly filled
            self._ends = ends
            self._last_rows = np.cumsum(rows_of_document)

    def __len__(self) -> int:
        if self.marks is not None:
            return len(self.marks.borders) - 1
        if self._last_rows is None:
            return -(-self.tokens.num_tokens // self.length)
        return int(self._last_rows[-1]) if len(self._last_rows) else 0

    def __getitem__(self, numbers: ArrayLike | slice) -> Block:
        if isinstance(numbers, slice):
            wanted = np.arange(len(self))[numbers]
        else:
            wanted = np.asarray(numbers, np.int64)
        is_outside = wanted.size and (wanted.min() < 0 or wanted.max() >= len(self))
        if wanted.ndim != 1 or is_outside:
            raise ArgumentError(
                f"PackedRows: row numbers must be a one-dimensional list of integers in "
                f"0..{len(self) - 1}; got {numbers!r}."
            )
        starts, stops = self._spans(wanted)
        shape = (len(wanted), self.length)
        ids = np.full(shape, self._filler, np.int32)
        document = np.empty(shape, np.int64)
        marks = None if self.marks is None else np.zeros(shape, np.uint8)
        # Row by row, because the rows of a batch are not adjacent in the stream.
        spans = zip(starts.tolist(), stops.tolist())
        for row, (start, stop) in enumerate(spans):
            size = stop - start
            ids[row, :size], document[row, :size] = self.tokens.read(start, stop)
            # Padding keeps the number of the last document, so that a padded position still has
            # a position to attend to.
            document[row, size:] = document[row, size - 1]
            if self.marks is not None and marks is not None:
                marks[row, :size] = self.marks.marks[start:stop]
        num_valid = (stops - starts).astype(np.int32)
        return Block(ids, document, num_valid, marks)

    def order(self, seed: int, positions: ArrayLike) -> NDArray[np.int64]:
        return row_at(seed, positions, len(self))

    def token_counts(self) -> NDArray[np.int64]:
        counts = self.tokens.counts()
        if self.marks is None:
            return counts
        ids, _ = self.tokens.read(0, self.tokens.num_tokens)
        return np.bincount(ids[self.marks.marks != GIVEN], minlength=len(counts))

    def stream(self, at_most: int | None = None) -> tuple[_Ints, NDArray[np.int64]]:
        size = self.tokens.num_tokens
        if at_most is not None:
            size = min(at_most, size)
        return self.tokens.read(0, size)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the ids, documents and lengths of all rows, 32 hexadecimal digits.

        For more than 2**26 tokens, the checksums of the shards are hashed instead of the rows.
        """
        if self.tokens.num_tokens > _READ_WHOLE and self.marks is None:
            is_separate = self._ends is not None
            return fingerprint([self.tokens.fingerprint, self.length, is_separate, self._filler])
        digest = hashlib.sha256(str((len(self), self.length)).encode())
        # Ids, documents and lengths are hashed in three passes. In one pass, the digest would
        # depend on the block size.
        for block in self._blocks():
            digest.update(block.ids.astype("<i4").tobytes())
        for block in self._blocks():
            digest.update(block.document.astype("<i4").tobytes())
        for block in self._blocks():
            digest.update(block.num_valid.astype("<i4").tobytes())
        if self.marks is not None:
            digest.update(self.marks.marks.tobytes())
        return digest.hexdigest()[:32]

    def first_documents(self) -> NDArray[np.int64]:
        """Return an array [R]: the number of the first document in each of the R rows.

        With `marks`, it is the number of the document of the data set.
        """
        if self.marks is not None:
            starts = self.marks.borders[:-1]
            ends = np.concatenate([np.empty(0, np.int64), *self.tokens.document_ends()])
            return self.marks.sources[np.searchsorted(ends, starts, side="right")]
        if self._last_rows is not None:
            rows_of_document = np.diff(self._last_rows, prepend=0)
            return np.repeat(np.arange(len(self._last_rows)), rows_of_document)
        return np.concatenate([block.document[:, 0] for block in self._blocks()])

    def tokens_in_rows(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """Return a bool [n] that marks the counted tokens of the rows with indices `numbers`.

        n is the number of tokens of the stream.
        """
        starts, stops = self._spans(numbers)
        # +1 at the start and -1 at the end of a row: the running sum counts the rows with a token.
        border = np.zeros(self.tokens.num_tokens + 1, np.int64)
        np.add.at(border, starts, 1)
        np.add.at(border, stops, -1)
        is_inside = border.cumsum()[:-1] > 0
        return is_inside if self.marks is None else is_inside & (self.marks.marks == ANSWER)

    def _spans(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Return the start and stop positions in the stream of the rows with indices `numbers`."""
        if self.marks is not None:
            return self.marks.borders[numbers], self.marks.borders[numbers + 1]
        if self._ends is None or self._last_rows is None:
            starts = numbers * self.length
            stops = np.minimum(starts + self.length, self.tokens.num_tokens)
            return starts, stops
        document = np.searchsorted(self._last_rows, numbers, side="right")
        is_first = document == 0
        # Document 0 has the index -1 and reads the last entry, which `where` then replaces by 0.
        rows_before = np.where(is_first, 0, self._last_rows[document - 1])
        tokens_before = np.where(is_first, 0, self._ends[document - 1])
        row_in_document = numbers - rows_before
        starts = tokens_before + row_in_document * self.length
        stops = np.minimum(starts + self.length, self._ends[document])
        return starts, stops

    def _blocks(self) -> Iterator[Block]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            if self._ends is not None or self.marks is not None:
                yield self[start : start + _ROWS_AT_ONCE]
            else:
                yield self._read_joined(start)

    def _read_joined(self, first: int) -> Block:
        """Read up to 4096 rows of a concatenated stream, from row `first`, in one read."""
        size = min(_ROWS_AT_ONCE, len(self) - first)
        start = first * self.length
        end_of_rows = start + size * self.length
        stop = min(end_of_rows, self.tokens.num_tokens)
        missing = end_of_rows - stop  # positive only in the last block
        ids, document = self.tokens.read(start, stop)
        num_valid = np.full(size, self.length, np.int32)
        num_valid[-1] -= missing
        padding = (0, missing)
        ids = np.pad(ids, padding, constant_values=self._filler)
        document = np.pad(document, padding, "edge")
        shape = (size, self.length)
        return Block(ids.reshape(shape), document.reshape(shape), num_valid)


def pack(
    documents: Dataset, tokenizer: Tokenizer, length: int, *, separate: bool = False
) -> PackedRows:
    """Pack documents into rows of `length` ids in memory.

    Documents are numbered in the order of `documents`. With `separate`, each document starts a new
    row, as for evaluation. If the unit of the tokenizer is "symbol", each document must have
    `length` symbols and becomes one row. Raises DataError if the documents have no token.
    """
    stream = encode_in_memory(chunks_of(documents), tokenizer)
    return pack_stream(stream, tokenizer, length, separate=separate)


def pack_stream(
    stream: TokenStream, tokenizer: Tokenizer, length: int, *, separate: bool = False
) -> PackedRows:
    """Pack a token stream of training or validation text into rows of `length` tokens.

    With `separate`, each document starts a new row. Raises DataError if the stream has no token. If
    the unit of the tokenizer is "symbol", all documents must have `length` symbols, and DataError
    is raised for a document of another length.
    """
    if length < 1:
        raise ArgumentError(f"pack: length must be at least 1; got {length}.")
    if not stream.num_tokens:
        raise DataError(
            "pack: expected texts with at least one token; got "
            f"{stream.num_documents} document(s), none of which has a token. Give texts that are "
            "not empty."
        )
    if tokenizer.unit == "symbol" and (wrong := stream.find_wrong_size(length)) is not None:
        raise DataError(
            f"pack: row {wrong[0]} has {wrong[1]} symbols, but every row of symbols must have "
            f"length = {length}. Fix the row, or set [data] length to the length of the rows."
        )
    filler = 0 if tokenizer.eos_id is None else tokenizer.eos_id
    # Documents of symbols have the length of a row, so cutting the stream already separates them.
    separate = separate and tokenizer.unit != "symbol"
    return PackedRows(stream, length, filler=filler, separate=separate)


def pack_ids(ids: NDArray[np.integer], num_tokens: int) -> PackedRows:
    """Pack an array `ids` [R,L] of token ids into R rows. Each row is a document of L tokens.

    `num_tokens`: number of tokens of the vocabulary.
    """
    return PackedRows(stream_from_ids(ids, num_tokens), ids.shape[1], filler=0)


def pack_texts(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> PackedRows:
    """Pack texts into rows of `length` tokens in memory. Each text starts a new row."""
    return pack(documents_from_texts(texts), tokenizer, length, separate=True)


def batch_rows(
    rows: Rows,
    indices: ArrayLike,
    *,
    index: ArrayLike | None = None,
    conditions: Conditions | None = None,
) -> Batch:
    """Read the rows with the given `indices` as a batch.

    `index` [B] is the value of `Batch.index`, by default `indices`. `conditions` are the conditions
    of the documents from which the rows were packed.
    """
    numbers = np.asarray(indices, dtype=np.int64)
    block = rows[numbers]
    ids = torch.from_numpy(block.ids.astype(np.int64))
    document = torch.from_numpy(block.document)
    num_valid = torch.from_numpy(block.num_valid.astype(np.int64))
    valid = torch.arange(ids.shape[1]) < num_valid[:, None]
    slots = torch.from_numpy(np.array(numbers if index is None else index, dtype=np.int64))
    # Document numbers never decrease within a row, so comparing the first and the last is enough.
    packed = bool((document[:, :1] != document[:, -1:]).any())
    scored = valid.clone()
    counted = None
    if block.marks is not None:
        marks = torch.from_numpy(block.marks)
        scored &= marks != GIVEN
        counted = valid & (marks == ANSWER)
    return Batch(
        ids=ids,
        valid=valid,
        scored=scored,
        counted=counted,
        document=document,
        index=slots,
        packed=packed,
        conditions=conditions.select(document, packed) if conditions else {},
    )


def chunks_of(documents: Dataset, part: str = TRAIN) -> Iterator[Chunk]:
    """Divide a data set in memory into chunks of consecutive documents.

    `part` is the part of every chunk: "train" or "validation". The chunks have no cursor, so
    reading cannot resume between two chunks.
    """
    for batch in documents.iter(DOCUMENTS_AT_ONCE):
        yield Chunk(batch["text"], None, part, batch.get("name", []))
