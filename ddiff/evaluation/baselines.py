"""Unigram and bigram baselines for the likelihood of a text."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]
Tokens = tuple[Ints, Ints]
"""Text of n tokens: an array [n] of token ids, and an array [n] of their document numbers."""


class Baselines(NamedTuple):
    """Nats per validation token under a unigram and a bigram model of the training text."""

    unigram_nats_per_token: float
    bigram_nats_per_token: float


def score_baselines(
    train: Tokens,
    validation: Tokens,
    num_tokens: int,
    counted: NDArray[np.bool_] | slice = slice(None),
) -> Baselines:
    """Compute the cross-entropy of validation tokens under a unigram and a bigram model.

    In the unigram model, P(b) is proportional to the training count of token b plus one. The bigram
    model uses Witten-Bell smoothing: P(b|a) = (c(a,b) + T(a) P(b)) / (c(a) + T(a)). Here c(a,b) is
    the number of times that token b follows token a in the training text, c(a) is the sum of c(a,b)
    over b, and T(a) is the number of distinct tokens that follow a. The first token b of a document
    has probability P(b).

    Args:
        train: token ids and document numbers of the training text.
        validation: token ids [m] and document numbers [m] of the validation text.
        num_tokens: size of the vocabulary.
        counted: array [m] bool, True for validation tokens that the mean includes; all by default.
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
    """Return log P(b|a) for each validation token b with the preceding token a, as an array [m].

    P is the bigram model of the tokens `train` (see `score_baselines`). The first token b of a
    document has log P(b). `unigram` contains P(b) for each token of the vocabulary.
    """
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
        )  # searchsorted returns len(codes) for a code above the largest code
        known = np.where(codes[place] == wanted, counts[place], 0)
    before = wanted // num_tokens
    after = wanted % num_tokens
    total = seen[before] + followers[before]
    mass = known + followers[before] * unigram[after]
    smoothed = mass / np.maximum(total, 1)
    # a token without a successor in the training text has no bigrams: use the unigram
    bigram = np.where(total > 0, smoothed, unigram[after])
    ids = validation[0].astype(np.int64)
    log_p = np.log(unigram[ids])
    log_p[1:][inside] = np.log(bigram)
    return log_p


def _encode_pairs(
    ids: Ints, document: Ints, num_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Encode pairs (a, b) of adjacent tokens of one document as integers a * num_tokens + b.

    `ids` and `document` contain the token and the document number of n positions.

    Returns:
        - the codes of the pairs,
        - an array [n-1] bool, True if a token and its successor are in the same document.
    """
    inside = document[1:] == document[:-1]
    wide = ids.astype(np.int64)  # a code needs more than 32 bits
    codes = wide[:-1] * num_tokens + wide[1:]
    return codes[inside], inside
