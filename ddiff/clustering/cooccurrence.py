"""Token embeddings from co-occurrence counts of the corpus."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ddiff.errors import ArgumentError

# Only the most frequent tokens are contexts, because the counts need memory for V * MAX_CONTEXTS
# numbers (V is the number of tokens).
MAX_CONTEXTS = 2048
_PAIRS_AT_ONCE = 1 << 22
_CONTEXT_POWER = 0.75  # exponent of the contexts' counts; below 1, rare contexts do not dominate
_SMALLEST_DIRECTION = 1e-5  # smaller singular values, relative to the largest, are rounding errors


def compute_cooccurrence_embeddings(
    ids: NDArray[np.int32],
    document: NDArray[np.integer],
    num_tokens: int,
    *,
    width: int = 64,
    window: int = 4,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Compute token embeddings [V, width] from the token stream `ids` [n].

    V is `num_tokens`. The contexts of a token are the tokens up to `window` positions before and
    after the token in the same document. `document` [n] is the document number of each position.
    Contexts before and after are counted separately, with weight 1/distance.

    The counts are converted to the matrix of positive pointwise mutual information, max(0,
    ln(P(token, context) / (P(token) P(context)))). Let U S W^T be the singular value decomposition
    of this matrix, truncated to the `width` largest singular values. The embeddings are U sqrt(S).
    A token that does not occur has the zero vector. The same input and seed give the same
    embeddings.
    """
    if width < 1 or window < 1:
        raise ArgumentError(
            "compute_cooccurrence_embeddings: width and window must be at least 1; got "
            f"{width} and {window}."
        )
    if len(ids) == 0:
        raise ArgumentError(
            "compute_cooccurrence_embeddings: ids must hold at least one token; got none."
        )
    if ids.min() < 0 or ids.max() >= num_tokens:
        raise ArgumentError(
            f"compute_cooccurrence_embeddings: ids must lie in 0..{num_tokens - 1}; got "
            f"{ids.min()}..{ids.max()}. Use the tokenizer that made the ids."
        )
    before, after = _count_contexts(ids, document, num_tokens, window)
    information = _positive_information(np.concatenate([before, after], axis=1))
    return _leading_directions(information, width, seed)


def _count_contexts(
    ids: NDArray[np.int32], document: NDArray[np.integer], num_tokens: int, window: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Count how often the C most frequent tokens occur before and after each of V tokens.

    Only occurrences in the same document (`document` holds the document number of each position)
    at a distance of at most `window` are counted, with the weight 1/distance. V is `num_tokens`.
    Returns two arrays [V, C], one for the positions before and one for the positions after a token.
    """
    frequency = np.bincount(ids, minlength=num_tokens)
    # A stable sort, so that tokens of equal frequency are always taken in the same order.
    by_frequency = np.argsort(-frequency, kind="stable")
    contexts = by_frequency[:MAX_CONTEXTS]
    column = np.full(num_tokens, -1)  # column of each token in the counts; -1: not a context
    column[contexts] = np.arange(len(contexts))
    shape = (num_tokens, len(contexts))
    before = np.zeros(shape, np.float32)
    after = np.zeros(shape, np.float32)
    for distance in range(1, window + 1):
        num_pairs = len(ids) - distance
        for start in range(0, num_pairs, _PAIRS_AT_ONCE):
            stop = min(start + _PAIRS_AT_ONCE, num_pairs)
            here = slice(start, stop)
            there = slice(start + distance, stop + distance)
            is_same_document = document[here] == document[there]
            first = ids[here][is_same_document]
            second = ids[there][is_same_document]
            _add_pairs(before, second, column[first], 1 / distance)
            _add_pairs(after, first, column[second], 1 / distance)
    return before, after


def _add_pairs(
    counts: NDArray[np.float32], rows: NDArray[np.int32], columns: NDArray[np.int64], weight: float
) -> None:
    """Add `weight` to the cell (row, column) of `counts` for each pair, in place."""
    is_context = columns >= 0
    rows = rows[is_context]
    columns = columns[is_context]
    # 64 bits, because V * C may exceed 32 bits.
    flat = rows.astype(np.int64) * counts.shape[1] + columns
    # `np.unique` merges repeated cells first, because indexed addition adds to each cell only once.
    cells, times = np.unique(flat, return_counts=True)
    counts.ravel()[cells] += (weight * times).astype(np.float32)


def _positive_information(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return the positive pointwise mutual information max(0, ln(n_wc N / (n_w n_c))), [V,C].

    `counts` [V,C] holds the count n_wc of token w with context c. n_w is the sum of n_wc over
    contexts, n_c its sum over tokens raised to the power 0.75, and N the sum of the n_c. Pairs that
    do not occur get 0.
    """
    # Sums in float64: float32 loses single counts in sums of many millions.
    token = counts.sum(1, keepdims=True, dtype=np.float64)
    context = counts.sum(0, keepdims=True, dtype=np.float64)
    context = context**_CONTEXT_POWER
    total = max(context.sum(), np.finfo(float).tiny)
    context /= total
    expected = (token * context).astype(np.float32)
    # For pairs that do not occur, the ratio stays 1, so that its logarithm is 0.
    ratio = np.divide(counts, expected, out=np.ones_like(counts), where=counts > 0)
    return np.log(np.maximum(ratio, 1.0))


def _leading_directions(matrix: NDArray[np.float32], width: int, seed: int) -> NDArray[np.float32]:
    """Return U sqrt(S) of the truncated singular value decomposition U S W^T of a matrix.

    The result has `width` columns; columns beyond the rank of the matrix are zero.
    """
    rank = min(width, *matrix.shape)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # Eight more directions than needed make the randomized decomposition accurate.
        num_directions = min(rank + 8, *matrix.shape)
        _, singular, right = torch.svd_lowrank(torch.from_numpy(matrix), q=num_directions, niter=4)
    singular = singular[:rank]
    right = right[:, :rank]
    is_reliable = singular > _SMALLEST_DIRECTION * singular[0]
    scale = torch.where(is_reliable, singular.rsqrt(), torch.zeros_like(singular))
    # U sqrt(S) = M W / sqrt(S), which is exactly zero for a token without any context.
    projected = torch.from_numpy(matrix) @ right
    embeddings = (projected * scale).numpy()
    padding = ((0, 0), (0, width - rank))
    return np.pad(embeddings, padding).astype(np.float32)
