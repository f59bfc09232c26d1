"""Byte-pair training cuts very long words; on other text it gives the standard tokenizer."""

from __future__ import annotations

import json
import random
import time

import pytest
from tokenizers import Tokenizer
from tokenizers.decoders import ByteLevel as ByteLevelDecoder
from tokenizers.models import BPE
from tokenizers.pre_tokenizers import ByteLevel
from tokenizers.trainers import BpeTrainer

from ddiff import progress
from ddiff.data.tokenizer import _CUT, EOS, LONGEST_WORD, BytePairTokenizer

ORDINARY = [
    "the cat sat on the mat, it's 1,000 miles'; we'll \t\n\n  go   ",
    "naïve Größe 日本語の文章 ١٢٣ ____ ====  -- a" + " " * 50 + "b",
    "don't can't'''re " + "x" * (LONGEST_WORD - 1) + " " + "y" * LONGEST_WORD,
    "a\x1c\x85\u2003b\u00a0c\u200bd" * 9,
] * 5


def letters(count: int, alphabet: str = "ACGT", seed: int = 0) -> str:
    return "".join(random.Random(seed).choices(alphabet, k=count))


def plain(texts: list[str], size: int) -> str:
    """Train a tokenizer of `size` tokens with the tokenizers library alone; return its JSON."""
    tokenizer = Tokenizer(BPE())
    tokenizer.pre_tokenizer = ByteLevel(add_prefix_space=False)
    tokenizer.decoder = ByteLevelDecoder()
    trainer = BpeTrainer(
        vocab_size=size,
        min_frequency=2,
        special_tokens=[EOS],
        initial_alphabet=sorted(ByteLevel.alphabet()),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer.to_str()


def test_text_without_long_words_gives_the_standard_bpe_tokenizer() -> None:
    found = BytePairTokenizer.train(ORDINARY, 320)
    assert json.loads(found._definition) == json.loads(plain(ORDINARY, 320))


@pytest.mark.parametrize("seed", range(20))
def test_short_words_are_split_as_by_the_byte_level_pre_tokenizer(seed: int) -> None:
    text = letters(3000, "ab1'srtlve \t\n\u00a0é日.,-_", seed)
    theirs = [place for _, place in ByteLevel(add_prefix_space=False).pre_tokenize_str(text)]
    assert [place for _, place in _CUT.pre_tokenize_str(text)] == theirs


def test_byte_pair_training_time_is_linear_in_word_length() -> None:
    """Without cutting, training on a word of two million letters would take hours."""
    seconds = []
    for count in (250_000, 500_000):
        began = time.process_time()
        BytePairTokenizer.train([letters(count)], 300)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 3 * seconds[0] + 0.2
    assert seconds[1] < 10


@pytest.mark.parametrize(
    "word",
    [
        letters(4321),
        letters(3210, "0123456789"),
        letters(3000, "+/=_"),
        " " * 3000,
        "\n" * 2500,
        "é日" * 1200,
    ],
    ids=["letters", "digits", "marks", "blanks", "newlines", "beyond ascii"],
)
def test_long_word_is_learned_in_pieces_and_decoded_exactly(word: str) -> None:
    texts = [f"a {word} b", "a short text", word]
    tokenizer = BytePairTokenizer.train(texts, 300)
    assert tokenizer.decode(tokenizer.encode(texts)) == texts
    pieces = tokenizer._tokenizer.pre_tokenizer.pre_tokenize_str(word)
    assert max(stop - start for _, (start, stop) in pieces) <= LONGEST_WORD + 1
    restored = BytePairTokenizer.restore(
        {"kind": "bytepair", "definition": json.loads(tokenizer._definition)}, "t.json"
    )
    assert restored.encode(texts) == tokenizer.encode(texts)
    assert restored.fingerprint == tokenizer.fingerprint


def test_encoding_time_is_linear_in_word_length() -> None:
    """The tokenizer was trained on short words, so that it does not cut words when it encodes."""
    tokenizer = BytePairTokenizer.train([letters(20, seed=seed) for seed in range(500)], 300)
    seconds = []
    for count in (200_000, 800_000):
        began = time.process_time()
        tokenizer.encode([letters(count)])
        seconds.append(time.process_time() - began)
    assert seconds[1] < 9 * seconds[0] + 0.3


def test_byte_pair_training_prints_its_progress(
    monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(progress, "LINE_EVERY_SECONDS", 0.02)
    BytePairTokenizer.train([letters(200_000)], 300)
    lines = capfd.readouterr().err.splitlines()
    assert lines
    assert all(line.startswith("learning byte pairs (at most 300): 0:00:0") for line in lines)
