"""Documents that occur more than once: validation documents in the training text, and repetitions within a part.

Documents are compared by their tokens, so that every kind of corpus is checked in the same way and at the same place: when
its token shards are written, in one pass of some hundred million tokens a second. The numbers stand in the manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import TYPE_CHECKING, NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from ddiff.data.tokenizer_workers import Chunk, hash_to_unit
from ddiff.errors import DataError

if TYPE_CHECKING:
    from ddiff.data.shards import Shard, TokenStream

_AT_ONCE = 2**13  # tokens, or documents: what is worked on fits a cache
_MANY = 0.05  # share of the documents of a part above which repetitions are worth a warning
_ODD = np.uint64(0x9E3779B97F4A7C15)  # the constants of splitmix64
_OTHER_ODD = np.uint64(0xBF58476D1CE4E5B9)
_log = logging.getLogger(__name__)
_Hashes = NDArray[np.uint64]


class Found(NamedTuple):
    """So many documents of all documents of a part."""

    documents: int
    of: int

    @property
    def share(self) -> float:
        return self.documents / max(1, self.of)

    def __str__(self) -> str:
        return f"{self.documents:,} of the {self.of:,} documents"


def find_overlap(
    train: TokenStream, validation: TokenStream, folder: Path | None = None
) -> dict[str, list[int]]:
    """Count, in JSON, validation documents that are in the training text, and repetitions within each part.

    64 bits of each training document are sorted in a temporary file in `folder`, and not in memory.
    """
    held_out = np.concatenate([np.empty(0, np.uint64), *map(document_hashes, validation.shards)])
    with TemporaryFile(dir=folder) as file:
        for shard in train.shards:
            file.write(document_hashes(shard).tobytes())
        file.flush()
        size = file.tell() // 8
        trained = (
            np.memmap(file, np.uint64, "r+", shape=(size,)) if size else np.empty(0, np.uint64)
        )
        trained.sort()
        return {
            "validation_in_train": [_count_seen(held_out, trained), len(held_out)],
            "train_repeated": [_count_repeated(trained), size],
            "validation_repeated": [_count_repeated(np.sort(held_out)), len(held_out)],
        }


def check_overlap(found: dict[str, list[int]], source: object) -> None:
    """Raise DataError if every validation document was trained on; warn of some, and of many repetitions in a part."""
    seen = Found(*found["validation_in_train"])
    if seen.documents and seen.documents == seen.of:
        raise DataError(
            f"{source}: all {seen.of:,} validation documents are in the training text too, so that the evaluation would "
            "measure what was learned by heart. Name other validation text, or none: then a share of the documents is "
            "held out by the hash of their text."
        )
    if seen.documents:
        _log.warning(
            "%s: %s for validation (%.2g %%) are in the training text too: on them the evaluation measures what was "
            "learned by heart. Drop them from one of the two.",
            source,
            seen,
            100 * seen.share,
        )
    for part, effect in (
        ("train", "is trained on more often"),
        ("validation", "makes the interval too narrow"),
    ):
        repeated = Found(*found[f"{part}_repeated"])
        if repeated.share > _MANY:
            _log.warning(
                "%s: %s of the part %s repeat an earlier one. What is repeated %s; drop it unless that is meant.",
                source,
                repeated,
                part,
                effect,
            )


@final
class Watch:
    """Looks for validation documents in a stream of training text, and warns of the first one."""

    def __init__(self, validation: Callable[[], Iterable[str]], source: object) -> None:
        self._validation = validation
        self._source = source
        self._told = False

    def chunks(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """The same chunks, looked at as they pass."""
        for chunk in chunks:
            if not self._told:
                self._look(chunk)
            yield chunk

    @cached_property
    def _places(self) -> set[float]:
        return {hash_to_unit(text.encode()) for text in self._validation()}

    def _look(self, chunk: Chunk) -> None:
        for text in chunk.texts:
            if hash_to_unit(text.encode()) in self._places:
                self._told = True
                _log.warning(
                    "%s: the document %r is in the validation text too, and is trained on all the same. Others are not "
                    "reported. Drop them from one of the two.",
                    self._source,
                    text if len(text) <= 60 else f"{text[:60]} ...",
                )
                return


def document_hashes(shard: Shard) -> _Hashes:
    """[k] 64 bits of each document: the sum of its tokens, each mixed with its place in the document."""
    ends = shard.ends
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    hashes = np.zeros(len(ends), np.uint64)
    filled = np.flatnonzero(ends > begins)  # np.add.reduceat knows no empty stretch
    begins = begins[filled]
    ends = ends[filled]
    sums = np.zeros(len(filled), np.uint64)
    for start in range(0, len(shard.tokens), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(shard.tokens))
        first, last = np.searchsorted(ends, (start, stop - 1), side="right")
        here = slice(first, last + 1)
        firsts = np.maximum(begins[here], start)
        sizes = np.minimum(ends[here], stop) - firsts
        places = (
            np.arange(start, stop) - np.repeat(begins[here], sizes) + 1
        )  # from 1: token 0 at place 0 would mix to 0
        mixed = shard.tokens[start:stop].astype(np.uint64) | (
            places.astype(np.uint64) << np.uint64(32)
        )
        sums[here] += np.add.reduceat(_mix(mixed), firsts - start)
    hashes[filled] = sums
    return hashes


def _mix(values: _Hashes) -> _Hashes:
    """In place."""
    values *= _ODD
    values ^= values >> np.uint64(32)
    values *= _OTHER_ODD
    values ^= values >> np.uint64(29)
    return values


def _count_seen(held_out: _Hashes, trained: _Hashes) -> int:
    """How many of the hashes are among sorted ones."""
    if not len(trained):
        return 0
    places = np.searchsorted(trained, held_out)
    return int((trained[np.minimum(places, len(trained) - 1)] == held_out).sum())


def _count_repeated(hashes: _Hashes) -> int:
    """How many of some sorted hashes are equal to the one before."""
    starts = range(0, len(hashes), _AT_ONCE)
    return sum(int((np.diff(hashes[start : start + _AT_ONCE + 1]) == 0).sum()) for start in starts)
