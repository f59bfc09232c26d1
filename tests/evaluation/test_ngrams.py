"""Entropy, distinct n-grams, repetition and self-BLEU against values that were computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddiff.errors import ArgumentError
from ddiff.evaluation.ngrams import (
    distinct_ngrams,
    pooled_entropy,
    repetition,
    sample_entropies,
    self_bleu,
)


def test_sample_entropy_is_zero_for_equal_and_log_length_for_different_tokens() -> None:
    found = sample_entropies([[7, 7, 7], [1, 2, 3, 4], [1, 1, 2, 3], []])
    by_hand = 0.5 * math.log(2) + 0.5 * math.log(4)
    # only rounding of sums of at most four terms
    assert found[:3] == pytest.approx([0.0, math.log(4), by_hand], abs=1e-15)
    assert math.isnan(found[3])


def test_pooled_entropy_counts_all_samples_together() -> None:
    # each sample has the entropy 0, and both together have one nat of ln 2
    assert pooled_entropy([[1, 1], [2, 2]]) == pytest.approx(math.log(2))


def test_distinct_ngrams_divides_different_by_all_ngrams() -> None:
    samples = [list("abab"), list("ab")]
    assert distinct_ngrams(samples, 1) == pytest.approx(2 / 6)
    assert distinct_ngrams(samples, 2) == pytest.approx(2 / 4)  # ab, ba, ab and ab
    assert math.isnan(distinct_ngrams(samples, 5))


def test_repetition_is_the_share_of_ngrams_that_occurred_before() -> None:
    samples = [list("ababa"), list("abc"), ["a"]]
    assert repetition(samples, 1)[:2] == pytest.approx([3 / 5, 0.0])
    assert repetition(samples, 2)[:2] == pytest.approx([2 / 4, 0.0])
    assert math.isnan(repetition(samples, 2)[2])


def test_self_bleu_is_one_for_equal_and_zero_for_disjoint_samples() -> None:
    same = list("abcde")
    assert self_bleu([same, same]) == pytest.approx([1.0, 1.0])
    assert self_bleu([same, list("vwxyz")]) == pytest.approx([0.0, 0.0])


def test_self_bleu_equals_hand_computed_precisions_and_brevity_penalty() -> None:
    samples = [list("abcd"), list("abcdef")]
    short, long = self_bleu(samples)
    # All n-grams of the short sample occur in the long one; r = 6 and c = 4.
    assert short == pytest.approx(math.exp(1 - 6 / 4))
    # n-grams of the long sample that occur in the short one: 4 of 6, 3 of 5, 2 of 4, 1 of 3.
    assert long == pytest.approx((4 / 6 * 3 / 5 * 2 / 4 * 1 / 3) ** 0.25)


def test_self_bleu_counts_a_repeated_ngram_as_often_as_one_other_sample_does() -> None:
    samples = [list("aaaa"), list("aabb"), list("accc")]
    # Unigrams: "a" occurs 4 times, and at most 2 times in one other sample. With n-grams up to 1
    # the precision is 2/4, and lengths are equal.
    assert self_bleu(samples, most=1)[0] == pytest.approx(2 / 4)
    # the other samples have the larger count 4 of the first sample as reference
    assert self_bleu(samples, most=1)[1] == pytest.approx(2 / 4)


def naive_bleu(samples: list[list[str]], number: int) -> float:
    """BLEU-4 of a sample against the others, straight from its definition."""
    own = samples[number]
    others = samples[:number] + samples[number + 1 :]
    logs = []
    for n in range(1, 5):
        grams = [tuple(own[i : i + n]) for i in range(len(own) - n + 1)]
        hits = 0
        for gram in set(grams):
            counts = [
                sum(tuple(other[i : i + n]) == gram for i in range(len(other) - n + 1))
                for other in others
            ]
            hits += min(grams.count(gram), max(counts))
        if hits == 0:
            return 0.0
        logs.append(math.log(hits / len(grams)))
    closest = min((len(other) for other in others), key=lambda size: (abs(size - len(own)), size))
    return math.exp(sum(logs) / 4 + min(0.0, 1 - closest / len(own)))


def test_self_bleu_equals_the_definition_on_random_samples() -> None:
    rng = np.random.default_rng(0)
    samples = [list(rng.choice(list("abc"), size)) for size in (9, 12, 5, 9, 20)]
    expected = [naive_bleu(samples, number) for number in range(len(samples))]
    assert self_bleu(samples) == pytest.approx(expected)


def test_self_bleu_refuses_a_single_sample() -> None:
    with pytest.raises(ArgumentError, match="at least two"):
        self_bleu([["a"]])
