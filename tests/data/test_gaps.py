"""Gaps in sentences of held-out documents."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

import pytest

from ddiff.data.gaps import CONTEXT_TOKENS, GAP_TOKENS, SENTENCE_TOKENS, choose_gaps
from ddiff.data.sentences import find_sentences
from ddiff.data.tokenizer import BytePairTokenizer, WordTokenizer

PLACES = ["garden", "house", "window", "morning", "evening"]
THINGS = ["letter", "friend", "sister", "answer", "walk"]
TEXTS = [
    "\n\n".join(
        f"Her {first} was in the {second}, and he had the {third} with a {fourth} on it. Yes."
        for second in PLACES
        for third in THINGS
    )
    for first, fourth in product(PLACES, THINGS)
]
LENGTH = 64


@pytest.fixture(scope="module")
def tokenizer() -> BytePairTokenizer:
    return BytePairTokenizer.train(TEXTS, 300)


def test_find_sentences_returns_spans_without_closing_quotation_marks() -> None:
    text = '"Poor Mr. Weston!" said he. They met\n\nA new day.'
    found = [text[start:stop] for start, stop in find_sentences(text)]
    assert found == ['"Poor Mr. Weston!', "said he.", "They met", "A new day."]


def test_gaps_have_the_tokens_of_whole_words_of_a_sentence(tokenizer: BytePairTokenizer) -> None:
    gaps = choose_gaps(TEXTS, tokenizer, 12, length=LENGTH)
    assert len(gaps) == 12
    for gap in gaps:
        ids = list(gap.ids)
        assert TEXTS[gap.document][gap.position :].startswith(gap.sentence)
        assert tokenizer.encode([gap.sentence]) == [ids]
        parts = [ids[: gap.start], ids[gap.start : gap.stop], ids[gap.stop :]]
        assert tokenizer.decode(parts) == [gap.before, gap.hidden, gap.after]
        assert re.fullmatch(r"( [a-z]+,?)* [a-z]+", gap.hidden)
        assert gap.before[-1].isalnum() or gap.before[-1] == ","
        assert not gap.after[0].isalnum()
        assert SENTENCE_TOKENS[0] <= len(ids) <= SENTENCE_TOKENS[1]
        assert GAP_TOKENS[0] <= gap.stop - gap.start <= GAP_TOKENS[1]
        assert min(gap.start, len(ids) - gap.stop) >= CONTEXT_TOKENS


def test_chosen_gaps_depend_on_seed_and_texts_only(tokenizer: BytePairTokenizer) -> None:
    first = choose_gaps(TEXTS, tokenizer, 6, length=LENGTH)
    assert choose_gaps(iter(TEXTS), tokenizer, 6, length=LENGTH) == first
    # more gaps begin with the same gaps
    assert choose_gaps(TEXTS, tokenizer, 9, length=LENGTH)[:6] == first
    turned = choose_gaps(TEXTS[::-1], tokenizer, 6, length=LENGTH)
    assert [gap.infill for gap in turned] == [gap.infill for gap in first]
    other = choose_gaps(TEXTS, tokenizer, 6, length=LENGTH, seed=1)
    assert {gap.sentence for gap in other} != {gap.sentence for gap in first}


def test_no_chosen_sentence_occurs_in_the_training_text(tokenizer: BytePairTokenizer) -> None:
    first = choose_gaps(TEXTS, tokenizer, 6, length=LENGTH)
    seen = [gap.sentence for gap in first[::2]]
    # with another line break and next to another sentence
    training = [f"It rained. {sentence.replace(' ', chr(10), 1)} It rained." for sentence in seen]
    left = choose_gaps(TEXTS, tokenizer, 6, length=LENGTH, training=training)
    assert len(left) == 6
    assert not {gap.sentence for gap in left} & set(seen)
    assert left[:3] == first[1::2]


def test_sentences_that_do_not_fit_are_not_chosen(tokenizer: BytePairTokenizer) -> None:
    assert choose_gaps(TEXTS, tokenizer, 6, length=SENTENCE_TOKENS[0] - 1) == []
    (sentence,) = (gap.sentence for gap in choose_gaps(TEXTS, tokenizer, 1, length=LENGTH))
    assert len(choose_gaps([sentence], tokenizer, 6, length=LENGTH)) == 1
    assert choose_gaps([sentence[:-1]], tokenizer, 6, length=LENGTH) == []  # without full stop
    assert choose_gaps([f'"{sentence}'], tokenizer, 6, length=LENGTH) == []
    assert choose_gaps([sentence.replace(" ", " [MASK:1]")], tokenizer, 6, length=LENGTH) == []


def test_gaps_work_for_a_tokenizer_of_words() -> None:
    sentence = "one two three four five six seven eight nine ten eleven twelve thirteen."
    words = WordTokenizer.from_texts([sentence])
    (gap,) = choose_gaps([sentence], words, 4, length=LENGTH)
    assert 3 <= len(gap.hidden.split()) <= 6
    assert list(gap.ids) == words.encode([sentence])[0]


@dataclass
class MarkingTokenizer:
    """Byte-pair tokenizer that puts a mark before each text, as some published tokenizers do."""

    plain: BytePairTokenizer

    def encode(self, texts: Sequence[str]) -> list[list[int]]:
        return [[7, *ids] for ids in self.plain.encode(texts)]


def test_tokenizer_that_changes_parts_of_a_sentence_gives_no_gap(
    tokenizer: BytePairTokenizer,
) -> None:
    marking: object = MarkingTokenizer(tokenizer)
    assert choose_gaps(TEXTS, marking, 6, length=LENGTH) == []  # type: ignore[arg-type]
