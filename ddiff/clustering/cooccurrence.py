"""Token embeddings from co-occurrence counts of the corpus."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray

from ddiff.errors import ArgumentError

# The most frequent tokens serve as contexts; more would cost memory of V * contexts.
MAX_CONTEXTS = 2048
_PAIRS_AT_ONCE = 1 << 22
_CONTEXT_POWER = 0.75  # flattens the contexts' frequencies, so that rare contexts do not dominate
_SMALLEST_DIRECTION = 1e-5  # singular values below this share of the largest are rounding errors


def compute_cooccurrence_embeddings(
    ids: NDArray[np.int32],
    document: NDArray[np.integer],
    num_tokens: int,
    *,
    width: int = 64,
    window: int = 4,
    seed: int = 0,
) -> NDArray[np.float32]:
    """Compute embeddings [V, width] of the tokens in a stream `ids` [n].

    Tokens up to `window` positions before and after each token, in the same `document` [n], are
    counted separately with weight 1/distance. The counts become positive pointwise mutual
    information, max(0, ln P(token, context) / (P(token) P(context))), of which the `width` largest
    singular values S are kept: the result is U sqrt(S). A token that never occurs has the zero
    vector. The same input and seed give the same embeddings.
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
            f"{ids.min()}..{ids.max()}. Were the rows made with another tokenizer?"
        )
    before, after = _count_contexts(ids, document, num_tokens, window)
    information = _positive_information(np.concatenate([before, after], axis=1))
    return _leading_directions(information, width, seed)


def _count_contexts(
    ids: NDArray[np.int32], document: NDArray[np.integer], num_tokens: int, window: int
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Count the C most frequent tokens before and after each token, [V, C] each."""
    frequency = np.bincount(ids, minlength=num_tokens)
    # A stable sort, so that tokens of equal frequency are always taken in the same order.
    by_frequency = np.argsort(-frequency, kind="stable")
    contexts = by_frequency[:MAX_CONTEXTS]
    column = np.full(num_tokens, -1)  # of a token in the counts; -1 if it is not a context
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
    """Add `weight` to the cell (row, column) of each pair, in place."""
    is_context = columns >= 0
    rows = rows[is_context]
    columns = columns[is_context]
    # 64 bits, because V * C may exceed 32 bits.
    flat = rows.astype(np.int64) * counts.shape[1] + columns
    # Cells are made unique first, because indexed addition counts a repeated cell only once.
    cells, times = np.unique(flat, return_counts=True)
    counts.ravel()[cells] += (weight * times).astype(np.float32)


def _positive_information(counts: NDArray[np.float32]) -> NDArray[np.float32]:
    """Return max(0, ln n_wc N / (n_w n_c)), 0 for pairs that never occur.

    n_wc are the counts of token w with context c, n_w and n_c their sums, N the total. The n_c are
    raised to the power 0.75.
    """
    # Sums in float64: float32 loses single counts in sums of many millions.
    token = counts.sum(1, keepdims=True, dtype=np.float64)
    context = counts.sum(0, keepdims=True, dtype=np.float64)
    context = context**_CONTEXT_POWER
    total = max(context.sum(), np.finfo(float).tiny)
    context /= total
    expected = (token * context).astype(np.float32)
    # A ratio of 1 has the logarithm 0, and stays where nothing was counted.
    ratio = np.divide(counts, expected, out=np.ones_like(counts), where=counts > 0)
    return np.log(np.maximum(ratio, 1.0))


def _leading_directions(matrix: NDArray[np.float32], width: int, seed: int) -> NDArray[np.float32]:
    """Return U sqrt(S) of the largest singular values, padded with zeros to `width` columns."""
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
    # U sqrt(S) as M V / sqrt(S), which is exactly zero for a token without any context.
    projected = torch.from_numpy(matrix) @ right
    embeddings = (projected * scale).numpy()
    padding = ((0, 0), (0, width - rank))
    return np.pad(embeddings, padding).astype(np.float32)
