"""Unigram and bigram scores of the same tokens: figures that a trained model has to beat."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]


class Baselines(NamedTuple):
    """Nats per token of the validation text under unigrams and bigrams of the training text."""

    unigram_nats_per_token: float
    bigram_nats_per_token: float


def score_baselines(
    train: tuple[Ints, Ints],
    validation: tuple[Ints, Ints],
    num_tokens: int,
    counted: NDArray[np.bool_] | slice = slice(None),
) -> Baselines:
    """Score every validation token exactly, by counts of the training tokens.

    Unigram: counts plus one. Bigram: Witten-Bell, P(b|a) = (c(a,b) + T(a) P(b)) / (c(a) + T(a)),
    c the counts and T(a) the number of distinct tokens after a; the first token of a document is
    scored by the unigram.

    Args:
        train: ids [n] and document numbers [n] of the training tokens.
        validation: ids [m] and document numbers [m] of the validation tokens.
        num_tokens: size of the vocabulary.
        counted: [m] bool, tokens of the mean; all by default.
    """
    unigram = np.bincount(train[0], minlength=num_tokens) + 1.0
    log_unigram = np.log(unigram / unigram.sum())
    ids = validation[0].astype(np.int64)
    by_unigram = log_unigram[ids]
    by_bigram = _score_bigrams(train, validation, num_tokens, np.exp(log_unigram))
    return Baselines(-float(by_unigram[counted].mean()), -float(by_bigram[counted].mean()))


def _score_bigrams(
    train: tuple[Ints, Ints],
    validation: tuple[Ints, Ints],
    num_tokens: int,
    unigram: NDArray[np.float64],
) -> NDArray[np.float64]:
    """[m] log-probability of each validation token given the one before it."""
    pairs, _ = _encode_pairs(*train, num_tokens)
    codes, counts = np.unique(pairs, return_counts=True)
    seen = np.bincount(codes // num_tokens, weights=counts, minlength=num_tokens)  # c(a)
    followers = np.bincount(codes // num_tokens, minlength=num_tokens)  # T(a)
    wanted, inside = _encode_pairs(*validation, num_tokens)
    place = np.clip(np.searchsorted(codes, wanted), 0, max(len(codes) - 1, 0))
    known = np.zeros(len(wanted))  # c(a,b)
    if len(codes):
        known = np.where(codes[place] == wanted, counts[place], 0)
    before = wanted // num_tokens
    after = wanted % num_tokens
    total = seen[before] + followers[before]
    smoothed = (known + followers[before] * unigram[after]) / np.maximum(total, 1)
    log_p = np.log(unigram[validation[0].astype(np.int64)])
    log_p[1:][inside] = np.log(np.where(total > 0, smoothed, unigram[after]))
    return log_p


def _encode_pairs(
    ids: Ints, document: Ints, num_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Codes a * V + b of neighbours within a document, and [n-1] bool where they stand."""
    inside = document[1:] == document[:-1]
    wide = ids.astype(np.int64)  # a code needs more than 32 bits
    codes = wide[:-1] * num_tokens + wide[1:]
    return codes[inside], inside
