"""Figures of samples, and the perplexity that cannot be had without an entropy."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from ddiff.errors import ArgumentError
from ddiff.evaluation.generation import (
    GenerativePerplexity,
    MeanFigure,
    SampleFigures,
    split_words,
)

ENTROPY = MeanFigure(1.0, None, 1)


def test_split_words_drops_punctuation_and_case() -> None:
    found = split_words('"The Cat\'s hat," she said -- twice.')
    assert found == ["the", "cat's", "hat", "she", "said", "twice"]


def test_sample_figures_have_hand_computed_values() -> None:
    texts = ["The cat sat.", "the dog ran"]
    ids = [[1, 1, 2, 2], [3, 3]]
    found = SampleFigures.of(texts, ids, reference=["The cat ran away."])
    assert found.lengths == (2, 3.0, 4)
    assert found.entropy.value == pytest.approx(math.log(2) / 2)
    assert found.pooled_entropy == pytest.approx(math.log(3))
    assert found.distinct[1] == pytest.approx(5 / 6)
    assert found.repetition[1].value == 0.0
    assert 4 not in found.distinct  # no text has four words
    assert found.known_words is not None
    assert found.known_words.value == pytest.approx(2 / 3)  # the cat (sat), the (dog) ran


def test_sample_figures_of_symbols_count_ngrams_of_ids() -> None:
    found = SampleFigures.of(["abab"], [[0, 1, 0, 1]], reference=["abab"], unit="symbol")
    assert found.distinct[2] == pytest.approx(2 / 3)
    assert found.known_words is None
    assert found.self_bleu is None  # there is no other sample


def test_sample_figures_refuse_empty_samples() -> None:
    with pytest.raises(ArgumentError, match="at least one sample with a token"):
        SampleFigures.of([""], [[]])


def test_sample_figures_are_valid_json_without_nan() -> None:
    found = SampleFigures.of(["a", ""], [[1], []]).to_dict()
    json.dumps(found, allow_nan=False)


def test_corpus_perplexity_weights_tokens_and_mean_of_samples_weights_samples() -> None:
    nats = np.array([2.0, 9.0, 0.0])
    tokens = np.array([2, 3, 0])
    found = GenerativePerplexity.of(nats, tokens, ENTROPY)
    assert found.corpus == pytest.approx(math.exp(11 / 5))
    assert found.per_sample.value == pytest.approx((math.exp(1) + math.exp(3)) / 2)
    assert found.tokens == 5
    assert found.unscored == 1
    assert found.per_sample.count == 2


def test_perplexity_cannot_be_built_without_entropy() -> None:
    with pytest.raises(TypeError, match="entropy"):
        GenerativePerplexity.of(np.ones(2), np.ones(2, int))  # type: ignore[call-arg]
    for entropy in (None, MeanFigure(math.nan, None, 1)):
        with pytest.raises(ArgumentError, match="entropy must be"):
            GenerativePerplexity.of(np.ones(2), np.ones(2, int), entropy)  # type: ignore[arg-type]


def test_perplexity_refuses_samples_without_scored_tokens_and_infinite_nats() -> None:
    with pytest.raises(ArgumentError, match="0 scored tokens"):
        GenerativePerplexity.of(np.zeros(2), np.zeros(2, int), ENTROPY)
    with pytest.raises(ArgumentError, match="infinite"):
        GenerativePerplexity.of(np.array([1.0, np.inf]), np.ones(2, int), ENTROPY)


def test_perplexity_of_very_different_samples_is_valid_json() -> None:
    # the interval of two samples reaches far above the largest float
    found = GenerativePerplexity.of(np.array([1.0, 800.0]), np.array([1, 1]), ENTROPY)
    json.dumps(found.to_dict(), allow_nan=False)
