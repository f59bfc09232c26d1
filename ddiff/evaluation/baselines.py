"""What counting alone achieves on the same tokens: the lines that a trained model has to beat."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]


class Baselines(NamedTuple):
    """Nats per token of the unigram and the bigram law of the training text on the validation text."""

    unigram_nats_per_token: float
    bigram_nats_per_token: float


def baselines(
    train: tuple[Ints, Ints],
    validation: tuple[Ints, Ints],
    num_tokens: int,
    counted: NDArray[np.bool_] | slice = slice(None),
) -> Baselines:
    """(ids [n], document [n]) of both parts -> exact scores of every validation token, or of those `counted` [n].

    Unigram: counts plus one. Bigram: Witten-Bell, P(b|a) = (c(a,b) + T(a) P(b)) / (c(a) + T(a)) with T(a) the number of
    distinct followers of a; a document's first token is scored by the unigram.
    """
    unigram = np.bincount(train[0], minlength=num_tokens) + 1.0
    log_unigram = np.log(unigram / unigram.sum())
    ids = validation[0].astype(np.int64)
    flat = log_unigram[ids]
    paired = _bigram(train, validation, num_tokens, np.exp(log_unigram))
    return Baselines(-float(flat[counted].mean()), -float(paired[counted].mean()))


def _bigram(
    train: tuple[Ints, Ints],
    validation: tuple[Ints, Ints],
    num_tokens: int,
    unigram: NDArray[np.float64],
) -> NDArray[np.float64]:
    """[n] log-probability of each validation token given the one before."""
    pairs, _ = _pairs(*train, num_tokens)
    codes, counts = np.unique(pairs, return_counts=True)
    seen = np.bincount(codes // num_tokens, weights=counts, minlength=num_tokens)
    followers = np.bincount(codes // num_tokens, minlength=num_tokens)
    asked, inside = _pairs(*validation, num_tokens)
    place = np.clip(np.searchsorted(codes, asked), 0, max(len(codes) - 1, 0))
    known = (
        np.where(codes[place] == asked, counts[place], 0) if len(codes) else np.zeros(len(asked))
    )
    before, after = asked // num_tokens, asked % num_tokens
    total = seen[before] + followers[before]
    smoothed = (known + followers[before] * unigram[after]) / np.maximum(total, 1)
    log_p = np.log(unigram[validation[0].astype(np.int64)])
    log_p[1:][inside] = np.log(np.where(total > 0, smoothed, unigram[after]))
    return log_p


def _pairs(
    ids: Ints, document: Ints, num_tokens: int
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Codes a*V + b of neighbours within a document, and where (among the n-1 places) they stand."""
    inside = document[1:] == document[:-1]
    wide = ids.astype(np.int64)
    return (wide[:-1] * num_tokens + wide[1:])[inside], inside
