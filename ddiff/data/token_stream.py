"""Token stream: one sequence of token ids, stored in shards."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import final

import numpy as np
from numpy.typing import NDArray

from ddiff.data.cache import fingerprint


@final
@dataclass(frozen=True)
class ShardRecord:
    """Manifest entry of a shard, with its sizes and the SHA-256 of its two files.

    The two files contain the tokens and the ends of documents. `shortest` and `longest` are the
    numbers of tokens of the shortest and of the longest document.
    """

    name: str
    documents: int
    tokens: int
    bytes: int
    shortest: int
    longest: int
    tokens_sha256: str
    ends_sha256: str


@final
@dataclass(frozen=True)
class Shard:
    """Shard of n tokens in k consecutive documents.

    tokens: array [n] of token ids.
    ends: array [k], the position after the last token of each document.
    record: manifest entry of the shard.
    """

    tokens: NDArray[np.unsignedinteger]
    ends: NDArray[np.int64]
    record: ShardRecord

    def read(self, start: int, stop: int) -> tuple[NDArray[np.unsignedinteger], NDArray[np.int64]]:
        """Return the ids and the document numbers of the positions start..stop-1.

        Both arrays are [stop - start]. Document numbers count from the first document of the shard.
        """
        # The document number at a position is the number of ends at or before the position. Only
        # the ends within the range are searched for each position.
        first, last = np.searchsorted(self.ends, (start, stop - 1), side="right")
        ends = self.ends[first:last]
        positions = np.arange(start, stop)
        inside = np.searchsorted(ends, positions, side="right")
        return self.tokens[start:stop], first + inside


@final
class TokenStream:
    """Token stream of consecutive shards, read from disk on demand."""

    def __init__(self, shards: Sequence[Shard], counts: Callable[[], NDArray[np.int64]]) -> None:
        """Concatenate `shards` to one stream.

        `counts()` returns an array [V]: how often each of the V tokens occurs.
        """
        self.shards = shards
        self.counts = counts
        # Arrays [number of shards + 1]: tokens and documents before each shard, then the totals.
        self._starts = _cumulative_sums(shard.record.tokens for shard in shards)
        self._documents = _cumulative_sums(shard.record.documents for shard in shards)

    @property
    def num_tokens(self) -> int:
        return int(self._starts[-1])

    @property
    def num_documents(self) -> int:
        return int(self._documents[-1])

    @property
    def num_bytes(self) -> int:
        """Number of UTF-8 bytes of the original text of all documents."""
        return sum(shard.record.bytes for shard in self.shards)

    def read(self, start: int, stop: int) -> tuple[NDArray[np.int32], NDArray[np.int64]]:
        """Return the ids and the document numbers of the positions start..stop-1.

        Both arrays are [stop - start]. Document numbers count from the first document of the
        stream.
        """
        ids = np.empty(stop - start, np.int32)
        document = np.empty(stop - start, np.int64)
        # Number of the shard that contains `start`. side="right" skips empty shards before this
        # shard.
        number = int(np.searchsorted(self._starts, start, side="right")) - 1
        at = start
        while at < stop:
            base = int(self._starts[number])
            end = min(stop, int(self._starts[number + 1]))
            if at < end:  # a shard may be empty
                here = slice(at - start, end - start)
                ids[here], document_in_shard = self.shards[number].read(at - base, end - base)
                document[here] = self._documents[number] + document_in_shard
            at = end
            number += 1
        return ids, document

    def document_ends(self) -> Iterator[NDArray[np.int64]]:
        """Yield one array per shard: the end positions of the shard's documents in the stream."""
        for start, shard in zip(self._starts, self.shards):
            yield start + shard.ends

    def find_wrong_size(self, size: int) -> tuple[int, int] | None:
        """Find the first document that does not have `size` tokens.

        Return (index of the document, number of its tokens), or None if all sizes are right.
        """
        for first, shard in zip(self._documents, self.shards):
            record = shard.record
            if record.documents and not record.shortest == record.longest == size:
                # Only here the ends are read from disk. For most shards the record is sufficient.
                sizes = np.diff(shard.ends, prepend=0)
                wrong = int(np.argmax(sizes != size))
                return int(first) + wrong, int(sizes[wrong])
        return None

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the checksums of all shards, 32 hexadecimal digits."""
        records = [shard.record for shard in self.shards]
        return fingerprint([[record.tokens_sha256, record.ends_sha256] for record in records])


def _cumulative_sums(sizes: Iterable[int]) -> NDArray[np.int64]:
    return np.cumsum([0, *sizes], dtype=np.int64)
