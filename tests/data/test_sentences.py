"""Short sentences of the bundled novels."""

from __future__ import annotations

import pytest
from ddiff_core.sentences import Sentences
from pydantic import ValidationError

from ddiff.data.sentences import load_sentences, split_sentences
from ddiff.errors import ArgumentError


def test_split_sentences_keeps_abbreviations_and_drops_quotation_marks() -> None:
    text = 'CHAPTER I\n\n"Poor Mr. Weston!" said he. "Is it\nso?" They met\n\nA new day.'
    assert split_sentences(text) == [
        "CHAPTER I",
        "Poor Mr. Weston!",
        "said he.",
        "Is it so?",
        "They met",
        "A new day.",
    ]


def test_load_sentences_has_no_sentence_twice() -> None:
    found = load_sentences(4, 8, 0.1)
    both = found.train + found.validation
    assert len(set(both)) == len(both)
    assert len(found.train) > 5000
    assert len(found.validation) > 300
    assert {len(sentence.split()) for sentence in both} == {4, 5, 6, 7, 8}


def test_load_sentences_parts_depend_on_chapters_only() -> None:
    """Longer sentences are added, and no sentence moves to the other part."""
    few = load_sentences(4, 6, 0.1)
    many = load_sentences(4, 9, 0.1)
    assert set(few.train) < set(many.train)
    assert set(few.validation) < set(many.validation)


def test_load_sentences_refuses_impossible_numbers_of_words() -> None:
    with pytest.raises(ArgumentError, match="shortest must be at least 1"):
        load_sentences(5, 4, 0.1)
    with pytest.raises(ValidationError, match="shortest must be at most longest"):
        Sentences.Config(shortest=5, longest=4)


def test_sentences_component_builds_a_column_of_texts() -> None:
    config = Sentences.Config(longest=6)
    documents = Sentences.build(config, seed=0, cache=None)
    assert documents.shapes == Sentences.preview(config)
    assert documents.train.read_texts("text", [0]).values == load_sentences(4, 6, 0.08).train[:1]
