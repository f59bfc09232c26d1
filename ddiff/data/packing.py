"""Rows of one length from documents of any: every token exactly once.

Training joins documents, each closed by its end mark, and cuts the stream into rows; a row keeps the number of the
document at each position, so that attention can hold them apart. Evaluation gives each document rows of its own. Only the
last row of the stream, or of a document, is padded. Rows are cut when they are read: what is stored is the stream.
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
from ddiff.data.shards import TokenStream, gathered, stream_of_ids
from ddiff.data.tokenizer import Tokenizer
from ddiff.data.tokenizer_workers import DOCUMENTS_AT_ONCE, TRAIN, Chunk
from ddiff.errors import ArgumentError, DataError

_ROWS_AT_ONCE = 4096
_READ_WHOLE = (
    2**26
)  # tokens up to which rows are known by what they hold, and beyond which by their shards' checksums
_Ints = NDArray[np.int32]


@final
@dataclass(frozen=True)
class Block:
    """Some rows: `ids` [k, length] int32, `document` [k, length] int64, `num_valid` [k] int32."""

    ids: _Ints
    document: NDArray[np.int64]
    num_valid: _Ints


class Rows(Protocol):
    """Rows of `length` tokens, read by number.

    Padding stands last in a row, is the end mark (0 without one) and carries the number of the document before it.
    """

    length: int

    def __len__(self) -> int:
        """How many; 2**62 where there is no end."""
        ...

    def __getitem__(self, numbers: ArrayLike | slice) -> Block:
        """The rows with these numbers [k], in this order."""
        ...

    def order(self, seed: int, positions: ArrayLike) -> NDArray[np.int64]:
        """The numbers of the rows that the global sample numbers `positions` show."""
        ...

    def token_counts(self) -> NDArray[np.int64]:
        """How often each token occurs, [V]."""
        ...

    def stream(self, at_most: int | None = None) -> tuple[_Ints, NDArray[np.int64]]:
        """The first ids in order [n] and the document of each [n], padding left out."""
        ...

    @property
    def fingerprint(self) -> str:
        """32 hexadecimal digits that tell rows apart."""
        ...


@final
class PackedRows:
    """Rows cut from a stream of tokens: joined, or starting anew with every document (`separate`)."""

    def __init__(
        self, stream: TokenStream, length: int, *, filler: int, separate: bool = False
    ) -> None:
        self.tokens, self.length, self._filler = stream, length, filler
        self._ends = (
            np.concatenate([np.empty(0, np.int64), *stream.document_ends()]) if separate else None
        )
        self._last_rows = (
            None if self._ends is None else np.cumsum(-(-np.diff(self._ends, prepend=0) // length))
        )

    def __len__(self) -> int:
        if self._last_rows is None:
            return -(-self.tokens.num_tokens // self.length)
        return int(self._last_rows[-1]) if len(self._last_rows) else 0

    def __getitem__(self, numbers: ArrayLike | slice) -> Block:
        wanted = (
            np.arange(len(self))[numbers]
            if isinstance(numbers, slice)
            else np.asarray(numbers, np.int64)
        )
        if wanted.ndim != 1 or (wanted.size and (wanted.min() < 0 or wanted.max() >= len(self))):
            raise ArgumentError(
                f"rows: numbers must be a list of numbers in 0..{len(self) - 1}; got {numbers!r}."
            )
        starts, stops = self._spans(wanted)
        ids = np.full((len(wanted), self.length), self._filler, np.int32)
        document = np.empty((len(wanted), self.length), np.int64)
        for row, (start, stop) in enumerate(zip(starts.tolist(), stops.tolist())):
            size = stop - start
            ids[row, :size], document[row, :size] = self.tokens.read(start, stop)
            # Padding keeps the last document's number, so that a padded position still has something to attend to.
            document[row, size:] = document[row, size - 1]
        return Block(ids, document, (stops - starts).astype(np.int32))

    def order(self, seed: int, positions: ArrayLike) -> NDArray[np.int64]:
        return row_at(seed, positions, len(self))

    def token_counts(self) -> NDArray[np.int64]:
        return self.tokens.counts()

    def stream(self, at_most: int | None = None) -> tuple[_Ints, NDArray[np.int64]]:
        held = self.tokens.num_tokens
        return self.tokens.read(0, held if at_most is None else min(at_most, held))

    @cached_property
    def fingerprint(self) -> str:
        """By ids, documents and lengths of all rows; beyond 2**26 tokens, which take long to read, by the checksums of the
        shards."""
        if self.tokens.num_tokens > _READ_WHOLE:
            return fingerprint(
                [self.tokens.fingerprint, self.length, self._ends is not None, self._filler]
            )
        digest = hashlib.sha256(str((len(self), self.length)).encode())
        for name in ("ids", "document", "num_valid"):
            for block in self._blocks():
                digest.update(getattr(block, name).astype("<i4").tobytes())
        return digest.hexdigest()[:32]

    def documents(self) -> NDArray[np.int64]:
        """[R] the document that each row begins with."""
        if self._last_rows is not None:
            return np.repeat(np.arange(len(self._last_rows)), np.diff(self._last_rows, prepend=0))
        return np.concatenate([block.document[:, 0] for block in self._blocks()])

    def tokens_in_rows(self, numbers: NDArray[np.int64]) -> NDArray[np.bool_]:
        """[n] which tokens of the stream stand in the rows with these numbers."""
        starts, stops = self._spans(numbers)
        border = np.zeros(self.tokens.num_tokens + 1, np.int64)
        np.add.at(border, starts, 1)
        np.add.at(border, stops, -1)
        return border.cumsum()[:-1] > 0

    def _spans(self, numbers: NDArray[np.int64]) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
        """Where rows start and stop in the stream."""
        if self._ends is None or self._last_rows is None:
            starts = numbers * self.length
            return starts, np.minimum(starts + self.length, self.tokens.num_tokens)
        document = np.searchsorted(self._last_rows, numbers, side="right")
        before = np.where(document > 0, self._last_rows[document - 1], 0)
        starts = (
            np.where(document > 0, self._ends[document - 1], 0) + (numbers - before) * self.length
        )
        return starts, np.minimum(starts + self.length, self._ends[document])

    def _blocks(self) -> Iterator[Block]:
        for start in range(0, len(self), _ROWS_AT_ONCE):
            yield (
                self[start : start + _ROWS_AT_ONCE]
                if self._ends is not None
                else self._joined(start)
            )

    def _joined(self, first: int) -> Block:
        """The next rows of the stream, read at once."""
        size = min(_ROWS_AT_ONCE, len(self) - first)
        start, stop = first * self.length, min((first + size) * self.length, self.tokens.num_tokens)
        missing = size * self.length - (stop - start)
        ids, document = self.tokens.read(start, stop)
        num_valid = np.full(size, self.length, np.int32)
        num_valid[-1] -= missing
        ids, document = (
            np.pad(ids, (0, missing), constant_values=self._filler),
            np.pad(document, (0, missing), "edge"),
        )
        return Block(ids.reshape(size, -1), document.reshape(size, -1), num_valid)


def pack(
    documents: Dataset, tokenizer: Tokenizer, length: int, *, separate: bool = False
) -> PackedRows:
    """Rows of `length` ids, in memory, of documents numbered as they stand in `documents`.

    `separate` starts a row with every document (evaluation). A tokenizer whose unit is the symbol gives one row per
    document and wants each to have `length` symbols. DataError when there is no token at all.
    """
    return pack_stream(
        gathered(chunks_of(documents), tokenizer), tokenizer, length, separate=separate
    )


def pack_stream(
    stream: TokenStream, tokenizer: Tokenizer, length: int, *, separate: bool = False
) -> PackedRows:
    """The rows of a tokenised part; DataError where it has no token, or where rows of symbols have another length."""
    if length < 1:
        raise ArgumentError(f"pack: length must be at least 1; got {length}.")
    if not stream.num_tokens:
        raise DataError(
            f"pack: {stream.num_documents} document(s) gave no token. Give texts that are not empty."
        )
    if tokenizer.unit == "symbol" and (wrong := stream.wrong_size(length)) is not None:
        raise DataError(
            f"pack: row {wrong[0]} has {wrong[1]} symbols, but an alphabet's rows must all have length = {length}. "
            "Mend the row, or set [data] length to the length of the rows."
        )
    # rows of symbols are documents of one length: joined, they are cut where documents meet
    filler = 0 if tokenizer.eos_id is None else tokenizer.eos_id
    return PackedRows(
        stream, length, filler=filler, separate=separate and tokenizer.unit != "symbol"
    )


def pack_ids(ids: NDArray[np.integer], num_tokens: int) -> PackedRows:
    """Ids [R,L] at hand as rows, each a document of its own."""
    return PackedRows(stream_of_ids(ids, num_tokens), ids.shape[1], filler=0)


def pack_texts(texts: Iterable[str], tokenizer: Tokenizer, length: int) -> PackedRows:
    """Rows of some texts held in memory, each text a document of its own."""
    return pack(documents_from_texts(texts), tokenizer, length, separate=True)


def batch_rows(
    rows: Rows,
    indices: ArrayLike,
    *,
    index: ArrayLike | None = None,
    conditions: Conditions | None = None,
) -> Batch:
    """The rows with these numbers; `index` [B] is their slot in the global batch, else the numbers themselves.

    `conditions` are those of the documents that the rows were packed from.
    """
    numbers = np.asarray(indices, dtype=np.int64)
    block = rows[numbers]
    ids, document = torch.from_numpy(block.ids.astype(np.int64)), torch.from_numpy(block.document)
    valid = torch.arange(ids.shape[1]) < torch.from_numpy(block.num_valid.astype(np.int64))[:, None]
    slots = torch.from_numpy(np.array(numbers if index is None else index, dtype=np.int64))
    packed = bool((document[:, :1] != document[:, -1:]).any())  # numbers never fall within a row
    told = conditions.of(document, packed) if conditions else {}
    return Batch(ids, valid, valid.clone(), document, slots, packed, told)


def chunks_of(documents: Dataset, part: str = TRAIN) -> Iterator[Chunk]:
    """Documents at hand as chunks of a part; there is no cursor among them."""
    for some in documents.iter(DOCUMENTS_AT_ONCE):
        yield Chunk(some["text"], None, part, some.get("name", []))
