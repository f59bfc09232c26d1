"""Counts of n-grams in samples: distinct n-grams, repetition, self-BLEU and entropy.

A sample is a sequence of pieces: token ids, or words. An n-gram is a tuple of n consecutive pieces.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddiff.errors import ArgumentError

Pieces = Sequence[Any]
"""Token ids or words of one sample."""
Floats = NDArray[np.float64]

MOST_GRAMS = 4  # BLEU counts n-grams of 1 to 4 words


def list_ngrams(pieces: Pieces, n: int) -> Iterator[tuple[Any, ...]]:
    """Iterate over the n-grams of a sample, in order."""
    return zip(*(pieces[start:] for start in range(n)), strict=False)


def unigram_entropy(pieces: Pieces) -> float:
    """Return the entropy of the relative frequencies of the pieces, in nats.

    The entropy of a sample of L pieces is at most ln L. It is NaN for an empty sample.
    """
    if len(pieces) == 0:
        return math.nan
    counts = np.array(list(Counter(pieces).values()), np.float64)
    share = counts / counts.sum()
    # 0.0 is added, because the entropy of equal pieces would be -0.0
    return float(-(share * np.log(share)).sum()) + 0.0


def sample_entropies(samples: Sequence[Pieces]) -> Floats:
    """Return the unigram entropy of each sample [N] in nats; NaN for empty samples."""
    return np.array([unigram_entropy(pieces) for pieces in samples], np.float64)


def pooled_entropy(samples: Sequence[Pieces]) -> float:
    """Return the unigram entropy in nats of all samples together."""
    return unigram_entropy(list(chain.from_iterable(samples)))


def distinct_ngrams(samples: Sequence[Pieces], n: int) -> float:
    """Return the number of different n-grams in all samples, divided by the number of n-grams.

    The value is NaN if no sample has n pieces. It falls with the number of samples, so only equally
    many samples of equal length can be compared.
    """
    counts: Counter[tuple[Any, ...]] = Counter()
    for pieces in samples:
        counts.update(list_ngrams(pieces, n))
    total = counts.total()
    return len(counts) / total if total else math.nan


def repetition(samples: Sequence[Pieces], n: int) -> Floats:
    """Return the share of n-grams of each sample [N] that occur earlier in the same sample.

    The value is 1 - (different n-grams) / (n-grams), and NaN for a sample of fewer than n pieces.
    """
    shares = np.full(len(samples), np.nan)
    for number, pieces in enumerate(samples):
        total = len(pieces) - n + 1
        if total >= 1:
            shares[number] = 1.0 - len(set(list_ngrams(pieces, n))) / total
    return shares


def self_bleu(samples: Sequence[Pieces], most: int = MOST_GRAMS) -> Floats:
    """Return the BLEU of each sample [N] against all other samples, in [0, 1].

    BLEU is min(1, exp(1 - r/c)) (p_1 ... p_most)^(1/most), where c is the number of pieces of the
    sample and r the length of the other sample whose length is closest to c (the shorter one of
    two). p_n is the share of n-grams of the sample that occur in another sample; an n-gram counts
    at most as often as in the one other sample where it is most frequent. There is no smoothing:
    BLEU is 0 if some p_n is 0. It is NaN for a sample of fewer than `most` pieces. A large value
    means that the samples are alike.

    Raises ArgumentError for fewer than two samples.
    """
    if len(samples) < 2:
        raise ArgumentError(
            f"self_bleu: samples must be at least two, because each is compared with the others; "
            f"got {len(samples)}."
        )
    log_precision = np.zeros(len(samples))
    for n in range(1, most + 1):
        log_precision += _log_precisions(samples, n) / most
    lengths = np.array([len(pieces) for pieces in samples])
    return np.exp(log_precision + _log_brevities(lengths))


def _log_precisions(samples: Sequence[Pieces], n: int) -> Floats:
    """Return ln p_n of each sample [N], where the references are all other samples."""
    counted = [Counter(list_ngrams(pieces, n)) for pieces in samples]
    # The largest count of an n-gram in the other samples is the largest count of all, or the second
    # largest in the sample that has the largest. Both and their owner suffice for all samples.
    largest: dict[tuple[Any, ...], tuple[int, int, int]] = {}
    for number, counts in enumerate(counted):
        for gram, count in counts.items():
            first, second, owner = largest.get(gram, (0, 0, -1))
            if count > first:
                largest[gram] = (count, first, number)
            elif count > second:
                largest[gram] = (first, count, owner)
    logs = np.full(len(samples), np.nan)
    for number, counts in enumerate(counted):
        if not counts:
            continue
        hits = 0
        for gram, count in counts.items():
            first, second, owner = largest[gram]
            hits += min(count, second if owner == number else first)
        logs[number] = math.log(hits / counts.total()) if hits else -math.inf
    return logs


def _log_brevities(lengths: NDArray[np.int64]) -> Floats:
    """Return ln of the brevity penalty of each sample [N]: min(0, 1 - r/c)."""
    logs = np.zeros(len(lengths))
    distinct, counts = np.unique(lengths, return_counts=True)
    for number, length in enumerate(lengths):
        # the own length counts only if another sample has it too
        others = distinct[(distinct != length) | (counts > 1)]
        closest = others[np.argmin(np.abs(others - length))]
        if length:
            logs[number] = min(0.0, 1.0 - closest / length)
    return logs
