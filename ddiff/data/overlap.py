"""Detect validation documents in the training text, and duplicates within a part.

The check is made when the token shards are written. It compares documents by their tokens, so that
every kind of corpus is checked in the same way. All tokens are read once, at a few hundred million
tokens per second. The numbers of repeated documents are stored in the manifest.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import NamedTuple, final

import numpy as np
from numpy.typing import NDArray

from ddiff.data.token_stream import Shard, TokenStream
from ddiff.data.tokenizer_workers import Chunk, hash_to_unit
from ddiff.errors import DataError

_AT_ONCE = 2**13  # tokens or documents per step, so that the arrays of a step fit into the cache
_MANY = 0.05  # fraction of repeated documents in a part above which a warning is logged
_ODD = np.uint64(0x9E3779B97F4A7C15)  # the constants of splitmix64
_OTHER_ODD = np.uint64(0xBF58476D1CE4E5B9)
_log = logging.getLogger(__name__)
_Hashes = NDArray[np.uint64]


class DocumentCount(NamedTuple):
    """Number of repeated documents (`documents`) among all documents of a part (`of`)."""

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
    """Count validation documents that occur in the training text, and repetitions in each part.

    Each value of the result is a list [affected documents, all documents], as stored in the
    manifest. The keys are:

    - validation_in_train: validation documents that occur in the training text.
    - train_repeated, validation_repeated: documents that repeat an earlier document of their part.

    The 64-bit hashes of the training documents are sorted in a temporary file in `folder`, not in
    memory.
    """
    held_out = np.concatenate([np.empty(0, np.uint64), *map(document_hashes, validation.shards)])
    with TemporaryFile(dir=folder) as file:
        for shard in train.shards:
            file.write(document_hashes(shard).tobytes())
        file.flush()
        size = file.tell() // 8
        trained = np.empty(0, np.uint64)
        if size:  # an empty file cannot be memory-mapped
            trained = np.memmap(file, np.uint64, "r+", shape=(size,))
        trained.sort()
        return {
            "validation_in_train": [_count_seen(held_out, trained), len(held_out)],
            "train_repeated": [_count_repeated(trained), size],
            "validation_repeated": [_count_repeated(np.sort(held_out)), len(held_out)],
        }


def check_overlap(found: dict[str, list[int]], source: object) -> None:
    """Raise DataError if all validation documents also occur in the training text.

    `found` is the result of `find_overlap`, and `source` names the corpus in messages. A warning is
    logged if only some validation documents occur in the training text, or if the training or the
    validation part contains many documents twice.
    """
    seen = DocumentCount(*found["validation_in_train"])
    if seen.documents and seen.documents == seen.of:
        raise DataError(
            f"{source}: all {seen.of:,} validation documents are in the training text too, so that "
            "the evaluation would measure memorization. Name other validation text, or leave "
            "validation out, so that a fraction of the documents is held out."
        )
    if seen.documents:
        _log.warning(
            "%s: %s for validation (%.2g %%) are in the training text too: on these documents the "
            "evaluation measures memorization. Remove them from one of the two parts.",
            source,
            seen,
            100 * seen.share,
        )
    effects = {
        "train": "is trained on more often",
        "validation": "makes the confidence interval too narrow",
    }
    for part, effect in effects.items():
        repeated = DocumentCount(*found[f"{part}_repeated"])
        if repeated.share > _MANY:
            _log.warning(
                "%s: %s of the part %s repeat an earlier document. A repeated document %s. Remove "
                "the repetitions unless they are intended.",
                source,
                repeated,
                part,
                effect,
            )


@final
class OverlapMonitor:
    """Monitor that warns once if a validation document occurs in a stream of training text.

    Args:
        validation: function without arguments that returns the validation texts.
        source: name of the corpus in the warning.
    """

    def __init__(self, validation: Callable[[], Iterable[str]], source: object) -> None:
        self._validation = validation
        self._source = source
        self._has_warned = False

    def watch(self, chunks: Iterable[Chunk]) -> Iterator[Chunk]:
        """Yield `chunks` unchanged. Warn once if a validation document occurs in them."""
        for chunk in chunks:
            if not self._has_warned:
                self._check(chunk)
            yield chunk

    @cached_property
    def _hashes(self) -> set[float]:
        return {hash_to_unit(text.encode()) for text in self._validation()}

    def _check(self, chunk: Chunk) -> None:
        for text in chunk.texts:
            if hash_to_unit(text.encode()) in self._hashes:
                self._has_warned = True
                _log.warning(
                    "%s: the training document %r is in the validation text too. The run trains on "
                    "this document. Further such documents are not reported. Remove them from one "
                    "of the two parts.",
                    self._source,
                    text if len(text) <= 60 else f"{text[:60]} ...",
                )
                return


def document_hashes(shard: Shard) -> _Hashes:
    """Return the 64-bit hashes [k] of the k documents in a shard.

    The hash of a document is a sum over its tokens, each mixed with its position in the document.
    """
    ends = shard.ends
    begins = np.concatenate([np.zeros(1, np.int64), ends[:-1]])
    hashes = np.zeros(len(ends), np.uint64)
    # Empty documents keep the hash 0: np.add.reduceat cannot sum an empty stretch.
    filled = np.flatnonzero(ends > begins)
    begins = begins[filled]
    ends = ends[filled]
    sums = np.zeros(len(filled), np.uint64)
    for start in range(0, len(shard.tokens), _AT_ONCE):
        stop = min(start + _AT_ONCE, len(shard.tokens))
        first, last = np.searchsorted(ends, (start, stop - 1), side="right")
        here = slice(first, last + 1)  # the documents of this step
        firsts = np.maximum(begins[here], start)
        lasts = np.minimum(ends[here], stop)
        # Positions count from 1: token 0 at position 0 would mix to 0.
        document_starts = np.repeat(begins[here], lasts - firsts)
        positions = np.arange(start, stop) - document_starts + 1
        # Token ids have at most 32 bits, so the position fits above them.
        high_bits = positions.astype(np.uint64) << np.uint64(32)
        mixed = shard.tokens[start:stop].astype(np.uint64) | high_bits
        # The hash is a sum, so that a document may continue in the next step.
        sums[here] += np.add.reduceat(_mix_in_place(mixed), firsts - start)
    hashes[filled] = sums
    return hashes


def _mix_in_place(values: _Hashes) -> _Hashes:
    values *= _ODD
    values ^= values >> np.uint64(32)
    values *= _OTHER_ODD
    values ^= values >> np.uint64(29)
    return values


def _count_seen(held_out: _Hashes, trained: _Hashes) -> int:
    """Count the entries of `held_out` that occur in the sorted hashes `trained`."""
    if not len(trained):
        return 0
    places = np.searchsorted(trained, held_out)
    nearest = trained[np.minimum(places, len(trained) - 1)]
    return int((nearest == held_out).sum())


def _count_repeated(hashes: _Hashes) -> int:
    """Count the entries of the sorted `hashes` that equal the previous entry."""
    count = 0
    for start in range(0, len(hashes), _AT_ONCE):
        # One more entry than a step has, so that neighbors across two steps are compared too.
        window = hashes[start : start + _AT_ONCE + 1]
        count += int((np.diff(window) == 0).sum())
    return count
