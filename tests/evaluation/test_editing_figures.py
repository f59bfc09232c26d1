"""Figures of edits, compared with values that are computed by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from ddiff.errors import ArgumentError
from ddiff.evaluation.editing import (
    attribute_accuracy,
    bleu,
    distinct_n,
    edit_distance,
    monotone_share,
    path_smoothness,
    rouge_l,
    self_bleu,
    silhouette,
    summarize_edits,
    untouched_share,
)


@pytest.mark.parametrize(
    ("first", "second", "expected"),
    [
        ("kitten", "sitting", 3),
        ("", "abc", 3),
        ("abc", "", 3),
        ("flaw", "lawn", 2),
        ("ab", "ab", 0),
    ],
)
def test_edit_distance_equals_known_distances(first: str, second: str, expected: int) -> None:
    assert edit_distance(first, second) == expected
    assert edit_distance(list(map(ord, second)), list(map(ord, first))) == expected


def test_bleu_equals_the_formula_on_a_small_text() -> None:
    """Precisions 5/6, 4/5, 3/4 and 2/3 of 1- to 4-grams, and no brevity penalty."""
    candidate = ["a", "cat", "sat", "on", "the", "mat"]
    reference = ["the", "cat", "sat", "on", "the", "mat"]
    expected = (5 / 6 * 4 / 5 * 3 / 4 * 2 / 3) ** 0.25
    assert bleu([candidate], [[reference]]) == pytest.approx(expected, rel=1e-6)


def test_bleu_is_0_without_a_common_4_gram() -> None:
    candidate = ["the", "cat", "sat", "on", "the", "mat"]
    assert bleu([candidate], [[["the", "cat", "lay", "on", "the", "mat"]]]) == 0.0


def test_bleu_of_a_short_text_has_the_brevity_penalty() -> None:
    assert bleu([[1, 2, 3, 4]], [[[1, 2, 3, 4, 5]]]) == pytest.approx(math.exp(1 - 5 / 4), rel=1e-6)
    assert bleu([["a b", "c", "d", "e"]], [[["a b", "c", "d", "e"]]]) == pytest.approx(1.0)


def test_rouge_l_is_the_f1_score_of_the_longest_common_subsequence() -> None:
    """`police kill the gunman` shares 3 of 4 and 3 of 5 words with the reference in order."""
    reference = ["police", "killed", "the", "old", "gunman"]
    precision, recall = 3 / 4, 3 / 5
    expected = 2 * precision * recall / (precision + recall)
    assert rouge_l(["police", "kill", "the", "gunman"], reference) == pytest.approx(expected)
    assert rouge_l([], reference) == rouge_l([], []) == 0.0
    assert rouge_l("abcd", "dcba") == pytest.approx(0.25)


def test_untouched_share_finds_a_changed_clamped_position() -> None:
    source = [[1, 2, 3, 4], [5, 6]]
    assert untouched_share(source, [[1, 9, 3, 4], [5, 6]], [[1], []]) == 1.0
    assert untouched_share(source, [[1, 9, 3, 4], [5, 7]], [[1], []]) == 4 / 5
    assert untouched_share([[1]], [[2]], [[0]]) == 1.0
    with pytest.raises(ArgumentError, match="equal lengths"):
        untouched_share([[1, 2]], [[1]], [[]])


def test_distinct_n_counts_different_n_grams_of_all_texts() -> None:
    texts = ["abab", "abc", "a"]
    assert distinct_n(texts, 1) == 3 / 8
    assert distinct_n(texts, 2) == 3 / 5  # ab, ba, ab, ab, bc
    assert distinct_n(texts, 9) == 0.0


def test_self_bleu_is_1_for_equal_texts_and_0_for_disjoint_texts() -> None:
    assert self_bleu(["abcde", "abcde"]) == pytest.approx(1.0)
    assert self_bleu(["abcd", "efgh", "ijkl"]) == 0.0
    assert self_bleu(["abcde", "abcde", "vwxyz"]) == pytest.approx(2 / 3)
    with pytest.raises(ArgumentError, match="at least two"):
        self_bleu(["abcde"])


def test_attribute_accuracy_is_the_share_of_texts_in_their_target_class() -> None:
    def classify(texts: object) -> list[int]:
        return [len(text) for text in texts]  # type: ignore[attr-defined]

    assert attribute_accuracy(["a", "bb", "cc", "d"], [1, 2, 2, 2], classify) == 0.75
    with pytest.raises(ArgumentError, match="one target"):
        attribute_accuracy(["a"], [1, 2], classify)


def test_path_smoothness_is_the_mean_cosine_of_consecutive_embeddings() -> None:
    path = [[1.0, 0.0], [2.0, 2.0], [0.0, 5.0], [0.0, -1.0]]
    expected = (math.sqrt(0.5) + math.sqrt(0.5) - 1.0) / 3
    assert path_smoothness(path) == pytest.approx(expected)
    with pytest.raises(ArgumentError, match="at least two points"):
        path_smoothness([[1.0, 0.0]])


def test_monotone_share_is_near_one_half_in_random_order() -> None:
    assert monotone_share([0.1, 0.2, 0.2, 0.1, 0.5]) == 0.75
    assert monotone_share([3.0, 2.0, 1.0]) == 0.0
    values = np.random.default_rng(0).random(4000)
    assert monotone_share(values) == pytest.approx(0.5, abs=0.03)


def test_silhouette_equals_hand_computed_values_on_a_line() -> None:
    """Points 0 and 1 of class a, 5 and 7 of class b, 20 alone in class c."""
    points = [[0.0], [1.0], [5.0], [7.0], [20.0]]
    expected = [(6 - 1) / 6, (5 - 1) / 5, (4.5 - 2) / 4.5, (6.5 - 2) / 6.5, 0.0]
    assert silhouette(points, list("aabbc")) == pytest.approx(np.mean(expected))
    assert silhouette([[0.0], [0.0]] * 2, [0, 1, 0, 1]) == 0.0
    with pytest.raises(ArgumentError, match="two classes"):
        silhouette(points, [1] * 5)


def test_summary_of_edits_has_the_hand_computed_figures() -> None:
    sources = [[1, 2, 3, 4, 5], [1, 2, 3, 4, 6]]
    edits = [
        {"text": "up", "ids": [1, 2, 3, 4, 6], "edited": [4], "nfe": 3},
        {"text": "no", "ids": [1, 2, 3, 4, 6], "edited": [3, 4], "nfe": 5},
    ]
    figures = summarize_edits(
        edits,
        sources,
        seconds=2.0,
        targets=["up", "up"],
        classify=lambda texts: list(texts),
    )
    assert figures["untouched_share"] == 1.0
    assert figures["edited_share"] == 0.3
    assert figures["edit_distance"] == 0.5
    assert figures["rouge_l"] == pytest.approx(0.9)
    assert figures["distinct_1"] == 0.5
    assert figures["nfe"] == 4.0
    assert figures["tokens_per_second"] == 5.0
    assert figures["attribute_accuracy"] == 0.5
    assert figures["self_bleu"] == pytest.approx(1.0)
    assert figures["bleu"] == pytest.approx((9 / 10 * 7 / 8 * 5 / 6 * 3 / 4) ** 0.25, rel=1e-6)
    with pytest.raises(ArgumentError, match="one source per edit"):
        summarize_edits(edits, sources[:1])
