"""Unigram and bigram scores of the same tokens: figures that a trained model has to beat."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]
Tokens = tuple[Ints, Ints]
"""Ids [n] and document numbers [n]."""


class Baselines(NamedTuple):
    """Nats per token of the validation text under unigrams and bigrams of the training text."""

    unigram_nats_per_token: float
    bigram_nats_per_token: float


def score_baselines(
    train: Tokens,
    validation: Tokens,
    num_tokens: int,
    counted: NDArray[np.bool_] | slice = slice(None),
) -> Baselines:
    """Score every validation token exactly, by counts of the training tokens.

    Unigram: counts plus one. Bigram: Witten-Bell, P(b|a) = (c(a,b) + T(a) P(b)) / (c(a) + T(a)),
    c the counts and T(a) the number of distinct tokens after a; the first token of a document is
    scored by the unigram.

    Args:
        train: the training tokens.
        validation: the m validation tokens.
        num_tokens: size of the vocabulary.
        counted: [m] bool, tokens of the mean; all by default.
    """
    unigram = np.bincount(train[0], minlength=num_tokens) + 1.0
    log_unigram = np.log(unigram / unigram.sum())
    ids = validation[0].astype(np.int64)
    by_unigram = log_unigram[ids]
    by_bigram = _score_bigrams(train, validation, num_tokens, np.exp(log_unigram))
    return Baselines(
        unigram_nats_per_token=-float(by_unigram[counted].mean()),
        bigram_nats_per_token=-float(by_bigram[counted].mean()),
    )


def _score_bigrams(
    train: Tokens,
    validation: Tokens,
    num_tokens: int,
    unigram: Floats,
) -> Floats:
    """[m] log-probability of each validation token given the one before it."""
    pairs, _ = _encode_pairs(*train, num_tokens)
    codes, counts = np.unique(pairs, return_counts=True)
    seen = np.bincount(codes // num_tokens, weights=counts, minlength=num_tokens)  # c(a)
    followers = np.bincount(codes // num_tokens, minlength=num_tokens)  # T(a)
    wanted, inside = _encode_pairs(*validation, num_tokens)
    known = np.zeros(len(wanted))  # c(a,b)
    if len(codes):
        place = np.searchsorted(codes, wanted)
        place = place.clip(
            0, len(codes) - 1
        )  # a code above all of them has the place after the last
        known = np.where(codes[place] == wanted, counts[place], 0)
    before = wanted // num_tokens
    after = wanted % num_tokens
    total = seen[before] + followers[before]
    mass = known + followers[before] * unigram[after]
    smoothed = mass / np.maximum(total, 1)
    # a token that nothing followed in training has no bigrams: the unigram takes their place
    bigram = np.where(total > 0, smoothed, unigram[after])
    ids = validation[0].astype(np.int64)
    log_p = np.log(unigram[ids])
    log_p[1:][inside] = np.log(bigram)
    return log_p


def _encode_pairs(
    ids: Ints, document: Ints, num_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Codes a * V + b of neighbours within a document, and [n-1] bool where they stand."""
    inside = document[1:] == document[:-1]
    wide = ids.astype(np.int64)  # a code needs more than 32 bits
    codes = wide[:-1] * num_tokens + wide[1:]
    return codes[inside], inside
