"""Rows of a text that is tokenized while it is trained on: nothing is stored but where the source had come to.

The stream is cut into rows as everywhere, and the rows into blocks of a fixed number, within which they are shuffled by a
permutation of the block's own. The rows that a step shows are therefore a function of the step, as with shards: going on
reads forward, and another place is found from the newest cursor before it, at worst from the start.
"""

from __future__ import annotations

import json
import logging
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, NamedTuple, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddiff.data.packing import Block, PackedRows
from ddiff.data.permutation import row_at
from ddiff.data.shards import Chunks
from ddiff.data.tokenizer import Tokenizer
from ddiff.data.tokenizer_workers import EncodedChunk, encode_chunks
from ddiff.errors import ArgumentError, DataError

ENDLESS = 2**62
_log = logging.getLogger(__name__)
_KEPT = 3  # blocks in memory: a batch may lie in two, and what is read ahead in one more


@final
@dataclass(frozen=True)
class Cursor:
    """Where a block begins, in JSON: after `skip` tokens of the chunks that the source gives after its cursor `source`, the
    first document of which has the number `document`."""

    block: int = 0
    source: Any = None
    skip: int = 0
    document: int = 0


class _Piece(NamedTuple):
    """Some tokens of the stream, the document of each, and the place of the first.

    `period`: tokens and documents after which the source begins again, where the piece is longer than that.
    """

    ids: NDArray[Any]
    document: NDArray[np.int64]
    place: Cursor
    period: tuple[int, int] | None = None

    def after(self, count: int, block: int) -> Cursor:
        """The place after the first `count` tokens, where that block begins."""
        skip, document = self.place.skip + count, self.place.document
        if self.period is not None:
            passes, skip = divmod(skip, self.period[0])
            document += passes * self.period[1]
        return Cursor(block, self.place.source, skip, document)


@final
class StreamedRows:
    """Rows `0, 1, ...` without end: the source is read again and again, each block of `block` rows shuffled.

    A source with fewer tokens than a block is read once and repeated from memory, with a warning.

    `head` are rows of the first documents, packed: what is counted is counted there. `cursors` is a file (JSON lines) that
    keeps where blocks begin, or None. `known_by` tells the rows apart from others.
    """

    def __init__(
        self,
        chunks: Chunks,
        tokenizer: Tokenizer,
        length: int,
        *,
        head: PackedRows,
        known_by: str,
        block: int = 4096,
        held_out: float = 0.0,
        workers: int = 1,
        cursors: Path | None = None,
    ) -> None:
        if block < 1:
            raise ArgumentError(f"block must be at least 1 row; got {block}.")
        self.length, self.head, self.fingerprint = length, head, known_by
        self._chunks, self._tokenizer = chunks, tokenizer
        self._rows, self._held_out, self._workers = block, held_out, workers
        self._cursors = cursors
        self._kept: dict[int, Block] = {}
        self._lock = threading.Lock()  # batches may be read ahead in another thread
        self.restore(Cursor())

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, numbers: ArrayLike | slice) -> Block:
        wanted = np.asarray(
            range(ENDLESS)[numbers] if isinstance(numbers, slice) else numbers, np.int64
        )
        ids = np.empty((len(wanted), self.length), np.int32)
        document = np.empty((len(wanted), self.length), np.int64)
        blocks, places = np.divmod(wanted, self._rows)
        with self._lock:
            for number in np.unique(blocks).tolist():
                here, block = blocks == number, self._block(number)
                ids[here], document[here] = block.ids[places[here]], block.document[places[here]]
        return Block(ids, document, np.full(len(wanted), self.length, np.int32))

    def order(self, seed: int, positions: ArrayLike) -> NDArray[np.int64]:
        places = np.asarray(positions, np.int64)
        return places // self._rows * self._rows + row_at(seed, places, self._rows)

    def token_counts(self) -> NDArray[np.int64]:
        return self.head.token_counts()

    def stream(self, at_most: int | None = None) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return self.head.stream(at_most)

    def state(self) -> dict[str, Any]:
        """In JSON, where the next block begins that has not been read: `restore` goes on there."""
        return asdict(self._cursor)

    def restore(self, state: Cursor | dict[str, Any]) -> None:
        """Read on from a place that `state` gave."""
        self._cursor = state if isinstance(state, Cursor) else Cursor(**state)
        self._pieces = self._read(self._cursor)
        self._rest: list[_Piece] = []

    def _block(self, number: int) -> Block:
        if number not in self._kept:
            if number != self._cursor.block:
                nearest = self._nearest(number)
                if number < self._cursor.block or nearest.block > self._cursor.block:
                    self.restore(nearest)
            while number not in self._kept:
                block = self._cursor.block
                self._kept[block] = self._next_block()
                for old in sorted(self._kept, key=lambda kept: abs(kept - block))[_KEPT:]:
                    del self._kept[old]
        return self._kept[number]

    def _next_block(self) -> Block:
        """Read one block, and keep where the next one begins."""
        size = self._rows * self.length
        ids, document = np.empty(size, np.int32), np.empty(size, np.int64)
        filled = 0
        while filled < size:
            piece = self._rest.pop() if self._rest else next(self._pieces)
            taken = min(size - filled, len(piece.ids))
            ids[filled : filled + taken] = piece.ids[:taken]
            document[filled : filled + taken] = piece.document[:taken]
            filled += taken
            beyond = piece.after(taken, self._cursor.block + 1)
            if taken < len(piece.ids):
                self._rest.append(
                    _Piece(piece.ids[taken:], piece.document[taken:], beyond, piece.period)
                )
        self._cursor = beyond
        self._keep(beyond)
        return Block(
            ids.reshape(-1, self.length),
            document.reshape(-1, self.length),
            np.full(self._rows, self.length, np.int32),
        )

    def _read(self, start: Cursor) -> Iterator[_Piece]:
        """Ids, documents and places of chunks from a cursor on, without end."""
        source, skip, document = start.source, start.skip, start.document
        while True:
            is_whole = source is None
            small: list[EncodedChunk] = []  # a whole pass, while it is smaller than a block
            num_tokens = 0
            for chunk, found in encode_chunks(
                self._chunks(source),
                self._tokenizer,
                held_out=self._held_out,
                workers=self._workers,
            ):
                kept = found.select(held_out=False)
                num_tokens += len(kept.ids)
                if is_whole and num_tokens < self._rows * self.length:
                    small.append(kept)
                if len(kept.ids) > skip:
                    yield _Piece(
                        kept.ids[skip:],
                        _numbers(kept, document)[skip:],
                        Cursor(0, source, skip, document),
                    )
                source, skip, document = (
                    chunk.cursor,
                    max(0, skip - len(kept.ids)),
                    document + len(kept.sizes),
                )
            if is_whole and not num_tokens:
                raise DataError(
                    "The source gave no token to train on. Give texts that are not empty."
                )
            if is_whole and num_tokens < self._rows * self.length:
                yield from self._repeated(small, skip, document)
            source = None

    def _repeated(self, found: list[EncodedChunk], skip: int, document: int) -> Iterator[_Piece]:
        """A source that is smaller than a block, over and over from memory: to read it again for every few rows would take
        thousands of passes before the first step."""
        ids = np.concatenate([chunk.ids for chunk in found])
        sizes = np.concatenate([chunk.sizes for chunk in found])
        numbers = np.repeat(np.arange(len(sizes)), sizes)
        num_tokens, num_documents = len(ids), len(sizes)
        passes = -(-self._rows * self.length // num_tokens)
        _log.warning(
            "The source has %d tokens to train on, fewer than a block of %d rows of %d: each block repeats it about %d "
            "times. Leave streaming out, which shows every row once an epoch, or set block to at most %d.",
            num_tokens,
            self._rows,
            self.length,
            passes,
            max(1, num_tokens // self.length),
        )
        skipped, skip = divmod(skip, num_tokens)
        document += skipped * num_documents
        every = np.tile(ids, passes)
        each = np.tile(numbers, passes) + np.repeat(np.arange(passes) * num_documents, num_tokens)
        period = (num_tokens, num_documents)
        while True:
            yield _Piece(
                every[skip:], each[skip:] + document, Cursor(0, None, skip, document), period
            )
            skip = 0
            document += passes * num_documents

    def _nearest(self, number: int) -> Cursor:
        """The newest kept cursor that is not behind a block."""
        best = Cursor()
        if self._cursors is not None and self._cursors.is_file():
            with self._cursors.open(encoding="utf-8", errors="replace") as lines:
                for line in lines:
                    with suppress(ValueError, TypeError):  # a line that a kill has torn
                        cursor = Cursor(**json.loads(line))
                        if best.block < cursor.block <= number:
                            best = cursor
        return best

    def _keep(self, cursor: Cursor) -> None:
        if self._cursors is None:
            return
        try:
            self._cursors.parent.mkdir(parents=True, exist_ok=True)
            with self._cursors.open("a", encoding="utf-8") as lines:
                lines.write(
                    "\n" + json.dumps(asdict(cursor))
                )  # first, so that a torn line spoils no other
        except OSError as error:  # a full disk or a read-only cache: training needs none of it
            _log.warning(
                "Where blocks of the stream begin can no longer be kept in %s (%s): resuming will read the text from an "
                "earlier place on. Make room there, or set DDIFF_CACHE to a folder that can be written.",
                self._cursors,
                error.strerror or error,
            )
            self._cursors = None


def _numbers(found: EncodedChunk, first: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(first, first + len(found.sizes)), found.sizes)
