"""Co-occurrence embeddings: tokens with similar contexts get similar embeddings."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from ddiff.clustering import cooccurrence
from ddiff.clustering.cooccurrence import compute_cooccurrence_embeddings
from ddiff.errors import ArgumentError


def cosine(vectors: NDArray[np.float32]) -> NDArray[np.float32]:
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    return unit @ unit.T


def two_topics(length: int = 6000) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Return token ids [length] and the document number of each id.

    A document has ten tokens of the same topic: all ids in 0..4, or all ids in 5..9.
    """
    rng = np.random.default_rng(0)
    document = np.arange(length) // 10
    ids = rng.integers(0, 5, length) + 5 * (document % 2)
    return ids.astype(np.int32), document.astype(np.int32)


def reference_counts(
    ids: NDArray[np.int32], document: NDArray[np.int32], num_tokens: int, window: int
) -> NDArray[np.float64]:
    """Count the neighbours before and after each token in a loop over pairs of positions.

    Neighbours are at most `window` positions apart, in the same document, and count 1 / distance.
    """
    counts = np.zeros((2, num_tokens, num_tokens))
    for i in range(len(ids)):
        for distance in range(1, window + 1):
            j = i + distance
            if j < len(ids) and document[i] == document[j]:
                counts[0, ids[j], ids[i]] += 1 / distance
                counts[1, ids[i], ids[j]] += 1 / distance
    return counts


@pytest.mark.parametrize("pairs_at_once", [7, 1 << 22])
def test_cooccurrence_counts_equal_those_of_a_loop_over_pairs(
    pairs_at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cooccurrence, "_PAIRS_AT_ONCE", pairs_at_once)
    rng = np.random.default_rng(1)
    ids, document = rng.integers(0, 6, 60).astype(np.int32), (np.arange(60) // 9).astype(np.int32)
    by_frequency = np.argsort(-np.bincount(ids, minlength=7), kind="stable")
    found = cooccurrence._count_contexts(ids, document, 7, 3)
    expected = reference_counts(ids, document, 7, 3)[:, :, by_frequency]
    assert np.stack(found) == pytest.approx(expected, abs=1e-5)  # float32 sums of thirds


def test_cooccurrence_embeddings_of_tokens_of_one_topic_are_similar() -> None:
    # Each document has one topic, so a window across two documents would mix topics.
    ids, document = two_topics()
    similarity = cosine(compute_cooccurrence_embeddings(ids, document, 10, width=4))
    within = min(similarity[:5, :5].min(), similarity[5:, 5:].min())
    assert within > similarity[:5, 5:].max() + 0.5


def test_cooccurrence_embeddings_of_absent_tokens_are_zero() -> None:
    ids, document = two_topics(500)
    vectors = compute_cooccurrence_embeddings(ids, document, 30, width=64)
    assert (vectors.shape, vectors.dtype) == ((30, 64), np.float32)
    assert (vectors[10:] == 0).all()
    assert np.isfinite(vectors).all()


def test_cooccurrence_embeddings_do_not_use_the_global_random_generator() -> None:
    ids, document = two_topics(500)
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = compute_cooccurrence_embeddings(ids, document, 10, width=4)
    assert torch.rand(1) == expected
    assert np.array_equal(first, compute_cooccurrence_embeddings(ids, document, 10, width=4))


def test_cooccurrence_contexts_are_the_most_frequent_tokens(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(cooccurrence, "MAX_CONTEXTS", 3)
    ids, document = two_topics(500)
    before, after = cooccurrence._count_contexts(ids, document, 10, 2)
    assert before.shape == after.shape == (10, 3)


def test_cooccurrence_embeddings_without_contexts_are_zero() -> None:
    vectors = compute_cooccurrence_embeddings(
        np.array([0, 1, 2], np.int32), np.array([0, 1, 2], np.int32), 3, width=2
    )
    assert (vectors == 0).all()


@pytest.mark.parametrize(
    ("ids", "settings", "message"),
    [
        ([], {}, "at least one token"),
        ([0, 9], {}, r"0\.\.4; got 0\.\.9"),
        ([0], {"width": 0}, "width"),
        ([0], {"window": 0}, "window"),
    ],
)
def test_cooccurrence_embeddings_refuse_impossible_arguments(
    ids: list[int], settings: dict[str, int], message: str
) -> None:
    with pytest.raises(ArgumentError, match=message):
        compute_cooccurrence_embeddings(
            np.array(ids, np.int32), np.zeros(len(ids), np.int32), 5, **settings
        )  # type: ignore[arg-type]
