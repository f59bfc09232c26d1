"""Unigram and bigram baselines against explicit sums over tokens."""

from __future__ import annotations

import math
from itertools import pairwise

import numpy as np
import pytest

from ddiff.evaluation.baselines import score_baselines


def by_hand(
    train: list[list[int]], validation: list[list[int]], num_tokens: int
) -> tuple[float, float]:
    """Return the mean nats per validation token of (unigram model, Witten-Bell bigram model)."""
    words = [word for document in train for word in document]
    unigram = [(words.count(word) + 1) / (len(words) + num_tokens) for word in range(num_tokens)]
    pairs = [pair for document in train for pair in pairwise(document)]
    flat, bigram = [], []
    for document in validation:
        for place, word in enumerate(document):
            flat.append(-math.log(unigram[word]))
            probability = unigram[word]
            if place and (after := [b for a, b in pairs if a == document[place - 1]]):
                kinds = len(set(after))
                probability = (after.count(word) + kinds * unigram[word]) / (len(after) + kinds)
            bigram.append(-math.log(probability))
    return float(np.mean(flat)), float(np.mean(bigram))


def stream(documents: list[list[int]]) -> tuple[np.ndarray, np.ndarray]:
    ids = [word for document in documents for word in document]
    return np.array(ids, np.int32), np.repeat(np.arange(len(documents)), list(map(len, documents)))


@pytest.mark.parametrize("seed", range(5))
def test_unigram_and_bigram_baselines_equal_explicit_sums_over_tokens(seed: int) -> None:
    draw = np.random.default_rng(seed)
    train, validation = (
        [draw.integers(0, 6, size).tolist() for size in draw.integers(1, 12, documents)]
        for documents in (5, 4)
    )
    assert score_baselines(stream(train), stream(validation), 6) == pytest.approx(
        by_hand(train, validation, 6), abs=1e-12
    )


def test_unigram_and_bigram_baselines_are_exact_for_unseen_tokens() -> None:
    train, validation = [[0], [1]], [[2], [2, 0], [0, 1]]
    assert score_baselines(stream(train), stream(validation), 4) == pytest.approx(
        by_hand(train, validation, 4), abs=1e-12
    )


def test_bigram_distribution_sums_to_one() -> None:
    train = [[0, 1, 2, 0, 1, 1, 0]]
    for before in range(4):
        # Each text is `before` and a word; twice the mean is -ln P(before) - ln P(word | before).
        scores = [score_baselines(stream(train), stream([[before, word]]), 4) for word in range(4)]
        first = math.exp(
            -score_baselines(stream(train), stream([[before]]), 4).unigram_nats_per_token
        )
        total = sum(math.exp(-2 * score.bigram_nats_per_token) / first for score in scores)
        assert total == pytest.approx(1.0, abs=1e-12)
