"""Rows of a corpus that is tokenized during training.

The token stream is not stored. It is cut into rows, and the rows are grouped into blocks of a fixed
number of rows. Each block is shuffled by a separate permutation. The rows of a training step are
therefore a function of the step, as with token shards.

For each block, a cursor is stored: the position in the stream at which the block begins. A resumed
run continues from the cursor in its checkpoint. To read any other block, the stream is read from
the nearest stored cursor before the block, or from the start.
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

ENDLESS = 2**62  # number of rows of a stream without end
_log = logging.getLogger(__name__)
_BLOCKS = 3  # blocks in memory: a batch may need two, and a prefetched batch a third


@final
@dataclass(frozen=True)
class Cursor:
    """Position in the stream at which a block begins.

    Attributes:
        block: number of the block.
        source: position in the source from which the block is read, as a JSON value; None is the
            start of the source. The position is at or before the start of the block.
        skip: number of tokens between the position `source` and the start of the block.
        document: number of the first document after the position `source`.
    """

    block: int = 0
    source: Any = None
    skip: int = 0
    document: int = 0


class _Piece(NamedTuple):
    """Consecutive tokens of the token stream, with the position of the first of them.

    Attributes:
        ids: [n] token ids.
        document: [n] number of the document of each token.
        start: position of the first token in the stream. The field `block` of this cursor is not
            used.
        pass_size: (number of tokens, number of documents) of the source, if the piece repeats a
            small source from memory; otherwise None. `after` needs these numbers to keep `skip`
            smaller than one pass over the source.
    """

    ids: NDArray[Any]
    document: NDArray[np.int64]
    start: Cursor
    pass_size: tuple[int, int] | None = None

    def after(self, count: int, block: int) -> Cursor:
        """Return the cursor of block `block`, which begins after `count` tokens of this piece."""
        skip = self.start.skip + count
        document = self.start.document
        if self.pass_size is not None:
            tokens_per_pass, documents_per_pass = self.pass_size
            passes, skip = divmod(skip, tokens_per_pass)
            document += passes * documents_per_pass
        return Cursor(block, self.start.source, skip, document)


@final
class StreamedRows:
    """Endless rows of a source that is tokenized while the rows are read.

    The source is read repeatedly, and each block of rows is shuffled. A source with fewer tokens
    than a block is read once and repeated from memory, with a warning.

    Args:
        chunks: function that yields the chunks of text after a cursor (position in the source).
        head: packed rows of the first documents. `token_counts` and `stream` use only these rows.
        fingerprint: identifier of the rows.
        block: number of rows of a block.
        held_out: fraction of the documents that are left out for validation.
        workers: number of tokenizer processes.
        cursors: file (JSON lines) that stores the positions at which blocks begin, or None.
    """

    def __init__(
        self,
        chunks: Chunks,
        tokenizer: Tokenizer,
        length: int,
        *,
        head: PackedRows,
        fingerprint: str,
        block: int = 4096,
        held_out: float = 0.0,
        workers: int = 1,
        cursors: Path | None = None,
    ) -> None:
        if block < 1:
            raise ArgumentError(
                f"StreamedRows: block, a number of rows, must be at least 1; got {block}."
            )
        self.length = length
        self.head = head
        self.fingerprint = fingerprint
        self._chunks = chunks
        self._tokenizer = tokenizer
        self._rows = block
        self._held_out = held_out
        self._workers = workers
        self._cursors = cursors
        self._blocks: dict[int, Block] = {}
        self._lock = threading.Lock()  # because several threads may prefetch batches
        self.restore(Cursor())

    def __len__(self) -> int:
        return ENDLESS

    def __getitem__(self, numbers: ArrayLike | slice) -> Block:
        if isinstance(numbers, slice):
            numbers = list(range(ENDLESS)[numbers])
        wanted = np.asarray(numbers, np.int64)
        shape = (len(wanted), self.length)
        ids = np.empty(shape, np.int32)
        document = np.empty(shape, np.int64)
        blocks, places = np.divmod(wanted, self._rows)
        with self._lock:
            for number in np.unique(blocks).tolist():
                block = self._block(number)
                here = blocks == number
                ids[here] = block.ids[places[here]]
                document[here] = block.document[places[here]]
        # Rows of an endless stream are always full.
        num_valid = np.full(len(wanted), self.length, np.int32)
        return Block(ids, document, num_valid)

    def order(self, seed: int, positions: ArrayLike) -> NDArray[np.int64]:
        places = np.asarray(positions, np.int64)
        first_of_block = places // self._rows * self._rows
        # The block is the epoch of `row_at`, so that each block has its own permutation.
        return first_of_block + row_at(seed, places, self._rows)

    def token_counts(self) -> NDArray[np.int64]:
        return self.head.token_counts()

    def stream(self, at_most: int | None = None) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        return self.head.stream(at_most)

    def state(self) -> dict[str, Any]:
        """Return the position of the next unread block as JSON, for `restore`."""
        return asdict(self._cursor)

    def restore(self, state: Cursor | dict[str, Any]) -> None:
        """Set the position at which reading continues: a cursor, or a result of `state()`."""
        self._cursor = state if isinstance(state, Cursor) else Cursor(**state)
        self._pieces = self._read(self._cursor)
        self._rest: _Piece | None = None  # part of the last piece after the end of the block

    def _block(self, number: int) -> Block:
        if number not in self._blocks and number != self._cursor.block:
            nearest = self._nearest_cursor(number)
            # Reading forward is fastest, unless the block lies before the current position, or a
            # stored cursor is closer to the block.
            if number < self._cursor.block or nearest.block > self._cursor.block:
                self.restore(nearest)
        while number not in self._blocks:
            block = self._cursor.block
            self._blocks[block] = self._next_block()
            by_distance = sorted(self._blocks, key=lambda other: abs(other - block))
            for distant in by_distance[_BLOCKS:]:
                del self._blocks[distant]
        return self._blocks[number]

    def _next_block(self) -> Block:
        """Read one block, and store the position at which the next block begins."""
        size = self._rows * self.length
        ids = np.empty(size, np.int32)
        document = np.empty(size, np.int64)
        filled = 0
        while filled < size:
            piece = self._rest or next(self._pieces)
            self._rest = None
            taken = min(size - filled, len(piece.ids))
            ids[filled : filled + taken] = piece.ids[:taken]
            document[filled : filled + taken] = piece.document[:taken]
            filled += taken
            after = piece.after(taken, self._cursor.block + 1)
            if taken < len(piece.ids):
                rest_ids = piece.ids[taken:]
                self._rest = _Piece(rest_ids, piece.document[taken:], after, piece.pass_size)
        self._cursor = after
        self._store_cursor(after)
        return Block(
            ids=ids.reshape(-1, self.length),
            document=document.reshape(-1, self.length),
            num_valid=np.full(self._rows, self.length, np.int32),
        )

    def _read(self, start: Cursor) -> Iterator[_Piece]:
        """Yield the token stream in pieces, from the position `start`, without end."""
        source = start.source
        skip = start.skip
        document = start.document
        while True:
            is_whole_pass = source is None
            small: list[EncodedChunk] = []  # chunks of this pass, while smaller than a block
            num_tokens = 0
            encoded = encode_chunks(
                self._chunks(source),
                self._tokenizer,
                held_out=self._held_out,
                workers=self._workers,
            )
            for chunk, found in encoded:
                train = found.select(held_out=False)
                num_tokens += len(train.ids)
                if is_whole_pass and self._is_small(num_tokens):
                    small.append(train)
                if len(train.ids) > skip:
                    first_token = Cursor(0, source, skip, document)
                    numbers = _document_numbers(train, document)
                    yield _Piece(train.ids[skip:], numbers[skip:], first_token)
                source = chunk.cursor
                skip = max(0, skip - len(train.ids))
                document += len(train.sizes)
            # The size of the source is known only after a pass that began at the start of the
            # source.
            if is_whole_pass and not num_tokens:
                raise DataError(
                    "The source gave no token to train on. Give texts that are not empty."
                )
            if is_whole_pass and self._is_small(num_tokens):
                yield from self._repeat(small, skip, document)
            source = None

    def _is_small(self, num_tokens: int) -> bool:
        return num_tokens < self._rows * self.length

    def _repeat(self, found: list[EncodedChunk], skip: int, document: int) -> Iterator[_Piece]:
        """Yield the endless repetition of a source smaller than a block, from memory.

        To fill a block, such a source would have to be read from disk many times.

        Args:
            found: all training documents of the source.
            skip: number of tokens to skip at the beginning.
            document: number of the first document.
        """
        ids = np.concatenate([chunk.ids for chunk in found])
        sizes = np.concatenate([chunk.sizes for chunk in found])
        numbers = np.repeat(np.arange(len(sizes)), sizes)
        num_tokens = len(ids)
        num_documents = len(sizes)
        passes = -(-self._rows * self.length // num_tokens)
        _log.warning(
            "The source has %d training tokens, fewer than a block of %d rows of length %d: each "
            "block repeats the source about %d times. Remove streaming, so that every row is read "
            "once per epoch, or set block to at most %d.",
            num_tokens,
            self._rows,
            self.length,
            passes,
            max(1, num_tokens // self.length),
        )
        skipped_passes, skip = divmod(skip, num_tokens)
        document += skipped_passes * num_documents
        # A piece has at least as many tokens as a block, so that a block needs at most two pieces.
        all_ids = np.tile(ids, passes)
        first_documents = np.repeat(np.arange(passes) * num_documents, num_tokens)
        all_numbers = np.tile(numbers, passes) + first_documents
        pass_size = (num_tokens, num_documents)
        while True:
            first_token = Cursor(0, None, skip, document)
            yield _Piece(all_ids[skip:], all_numbers[skip:] + document, first_token, pass_size)
            skip = 0
            document += passes * num_documents

    def _nearest_cursor(self, number: int) -> Cursor:
        """Return the stored cursor of block `number`, or of the nearest earlier block."""
        best = Cursor()
        if self._cursors is None or not self._cursors.is_file():
            return best
        with self._cursors.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                with suppress(ValueError, TypeError):  # a line that a kill left incomplete
                    cursor = Cursor(**json.loads(line))
                    if best.block < cursor.block <= number:
                        best = cursor
        return best

    def _store_cursor(self, cursor: Cursor) -> None:
        if self._cursors is None:
            return
        try:
            self._cursors.parent.mkdir(parents=True, exist_ok=True)
            with self._cursors.open("a", encoding="utf-8") as lines:
                # The line break comes first, so that an incomplete line does not damage the next.
                lines.write("\n" + json.dumps(asdict(cursor)))
        except OSError as error:  # a full disk or a read-only cache: training can continue
            _log.warning(
                "The start positions of blocks of the stream can no longer be written to %s (%s): "
                "a resumed run will read the text from an earlier position. Free space on that "
                "disk, or set DDIFF_CACHE to a writable folder.",
                self._cursors,
                error.strerror or error,
            )
            self._cursors = None


def _document_numbers(found: EncodedChunk, first: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(first, first + len(found.sizes)), found.sizes)
