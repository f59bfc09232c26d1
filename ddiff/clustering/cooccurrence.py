"""Word vectors from the corpus itself: which words stand near which."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ddiff.errors import ArgumentError

MAX_CONTEXTS = (
    2048  # the most frequent words tell contexts apart; more would cost memory in V * contexts
)
_PAIRS_AT_ONCE = 1 << 22
_CONTEXT_POWER = 0.75  # flattens the contexts' frequencies, so that rare contexts do not dominate


def compute_cooccurrence_embeddings(
    ids: NDArray[np.int32],
    document: NDArray[np.integer],
    num_tokens: int,
    *,
    width: int = 64,
    window: int = 4,
    seed: int = 0,
) -> NDArray[np.float32]:
    """[V, width] vectors of the words in a stream `ids` [n], whose `document` [n] bounds the windows.

    Counts of the words up to `window` places before and after (apart from each other, weighted 1/distance), as positive
    pointwise mutual information max(0, ln P(word, context) / (P(word) P(context))), cut to the `width` largest singular
    values S: U sqrt(S). A word that never occurs has the zero vector. The same input and seed give the same vectors.
    """
    if width < 1 or window < 1:
        raise ArgumentError(
            f"compute_cooccurrence_embeddings: width and window must be at least 1; got {width} and {window}."
        )
    if len(ids) == 0:
        raise ArgumentError(
            "compute_cooccurrence_embeddings: ids must hold at least one token; got none."
        )
    if ids.min() < 0 or ids.max() >= num_tokens:
        raise ArgumentError(
            f"compute_cooccurrence_embeddings: ids must lie in 0..{num_tokens - 1}; got {ids.min()}..{ids.max()}. "
            "Were the rows made with another tokenizer?"
        )
    counts = np.concatenate(_counts(ids, document, num_tokens, window), axis=1)
    return _leading_vectors(_positive_information(counts), min(width, *counts.shape), width, seed)


def _counts(
    ids: NDArray[np.int32], document: NDArray[np.integer], num_tokens: int, window: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """[V, C] weighted counts of the C most frequent words before and after each word."""
    frequency = np.bincount(ids, minlength=num_tokens)
    contexts = np.argsort(-frequency, kind="stable")[:MAX_CONTEXTS]
    column = np.full(num_tokens, -1)
    column[contexts] = np.arange(len(contexts))
    before, after = (np.zeros((num_tokens, len(contexts)), np.float32) for _ in range(2))
    for distance in range(1, window + 1):
        for start in range(0, len(ids) - distance, _PAIRS_AT_ONCE):
            stop = min(start + _PAIRS_AT_ONCE, len(ids) - distance)
            near = document[start:stop] == document[start + distance : stop + distance]
            first, second = ids[start:stop][near], ids[start + distance : stop + distance][near]
            _add_pairs(before, second, column[first], 1 / distance)
            _add_pairs(after, first, column[second], 1 / distance)
    return before, after


def _add_pairs(
    counts: NDArray[np.float32], rows: NDArray[np.int32], columns: NDArray[np.int64], weight: float
) -> None:
    known = columns >= 0
    cells, times = np.unique(
        rows[known].astype(np.int64) * counts.shape[1] + columns[known], return_counts=True
    )
    counts.ravel()[cells] += (weight * times).astype(np.float32)


def _positive_information(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """max(0, ln n_wc N / (n_w n_c)) with the contexts' frequencies flattened; 0 where nothing was counted."""
    word = counts.sum(1, keepdims=True, dtype=np.float64)
    context = counts.sum(0, keepdims=True, dtype=np.float64) ** _CONTEXT_POWER
    context /= max(context.sum(), np.finfo(float).tiny)
    expected = (word * context).astype(np.float32)
    ratio = np.divide(counts, expected, out=np.ones_like(counts), where=counts > 0)
    return np.log(np.maximum(ratio, 1.0))


def _leading_vectors(
    matrix: NDArray[np.float32], rank: int, width: int, seed: int
) -> NDArray[np.float32]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        _, singular, right = torch.svd_lowrank(
            torch.from_numpy(matrix), q=min(rank + 8, *matrix.shape), niter=4
        )
    # U sqrt(S) as M V / sqrt(S): a word without company then has exactly zero. Directions of rounding noise are left out.
    singular, right = singular[:rank], right[:, :rank]
    real = singular > 1e-5 * singular[0]
    scale = torch.where(real, singular.rsqrt(), torch.zeros_like(singular))
    vectors = (torch.from_numpy(matrix) @ right * scale).numpy()
    return np.pad(vectors, ((0, 0), (0, width - rank))).astype(np.float32)
