"""Rows of a text that is tokenised while it is trained on: nothing is stored but where the source had come to.

The stream is cut into rows as everywhere, and the rows into blocks of a fixed number, within which they are shuffled by a
permutation of the block's own. The rows that a step shows are therefore a function of the step, as with shards: going on
reads forward, and another place is found from the newest cursor before it, at worst from the start.
"""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddiff.data.order import row_at
from ddiff.data.rows import Block, PackedRows
from ddiff.data.shards import Chunks
from ddiff.data.tokenising import Encoded, encoded
from ddiff.data.tokenizer import Tokenizer
from ddiff.errors import ArgumentError, DataError

ENDLESS = 2**62
_KEPT = 3  # blocks in memory: a batch may lie in two, and what is read ahead in one more


@final
@dataclass(frozen=True)
class Cursor:
    """Where a block begins, in JSON: after `skip` tokens of the chunk that the source gives next after its cursor `source`,
    whose first document has the number `document`."""

    block: int = 0
    source: Any = None
    skip: int = 0
    document: int = 0


@final
class StreamedRows:
    """Rows `0, 1, ...` without end: the source is read again and again, each block of `block` rows shuffled.

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
        wanted = np.asarray(range(ENDLESS)[numbers] if isinstance(numbers, slice) else numbers, np.int64)
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
        self._rest: list[tuple[NDArray[Any], NDArray[np.int64], Cursor]] = []

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
            tokens, numbers, place = self._rest.pop() if self._rest else next(self._pieces)
            taken = min(size - filled, len(tokens))
            ids[filled : filled + taken], document[filled : filled + taken] = tokens[:taken], numbers[:taken]
            filled += taken
            beyond = Cursor(self._cursor.block + 1, place.source, place.skip + taken, place.document)
            if taken < len(tokens):
                self._rest.append((tokens[taken:], numbers[taken:], beyond))
        self._cursor = beyond
        self._keep(beyond)
        return Block(
            ids.reshape(-1, self.length), document.reshape(-1, self.length), np.full(self._rows, self.length, np.int32)
        )

    def _read(self, start: Cursor) -> Iterator[tuple[NDArray[Any], NDArray[np.int64], Cursor]]:
        """Ids, documents and places of chunks from a cursor on, without end."""
        source, skip, document = start.source, start.skip, start.document
        while True:
            began, found_any = source, False
            for chunk, found in encoded(
                self._chunks(source), self._tokenizer, held_out=self._held_out, workers=self._workers
            ):
                kept = found.of(held_out=False)
                if len(kept.ids) > skip:
                    found_any = True
                    yield kept.ids[skip:], _numbers(kept, document)[skip:], Cursor(0, source, skip, document)
                source, skip, document = chunk.cursor, 0, document + len(kept.sizes)
            if not found_any and began is None:
                raise DataError("The source gave no token to train on. Give texts that are not empty.")
            source = None

    def _nearest(self, number: int) -> Cursor:
        """The newest kept cursor that is not behind a block."""
        best = Cursor()
        if self._cursors is not None and self._cursors.is_file():
            with self._cursors.open(encoding="utf-8") as lines:
                for line in lines:
                    with suppress(ValueError, TypeError):  # a line that a kill has torn
                        cursor = Cursor(**json.loads(line))
                        if best.block < cursor.block <= number:
                            best = cursor
        return best

    def _keep(self, cursor: Cursor) -> None:
        if self._cursors is not None:
            self._cursors.parent.mkdir(parents=True, exist_ok=True)
            with self._cursors.open("a", encoding="utf-8") as lines:
                lines.write("\n" + json.dumps(asdict(cursor)))  # first, so that a torn line spoils no other


def _numbers(found: Encoded, first: int) -> NDArray[np.int64]:
    return np.repeat(np.arange(first, first + len(found.sizes)), found.sizes)
