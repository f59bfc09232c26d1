"""Tokenizers decode exactly, add no tokens, are saved as one file, and refuse unknown text."""

from __future__ import annotations

import json
import unicodedata
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import PreTrainedTokenizerFast

from ddiff.data.tokenizer import (
    EOS,
    AlphabetTokenizer,
    BytePairTokenizer,
    LettersTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    UnknownSymbol,
    UnknownWord,
    WordTokenizer,
    check_round_trip,
    fold_letters,
    load_tokenizer,
)
from ddiff.errors import ArgumentError, DataError

CORPUS = ["the cat sat on the mat", "the dog sat on the cat", "a mat, a cat; a dog!"] * 20
# Bytes that the corpus lacks, combined characters, and the string of the special token.
STRANGE = ["", " ", "\n\tnaïve £20,000", "日本語", "👩‍👩‍👧", f"a {EOS} b", "the" * 50]


@pytest.fixture(scope="module")
def byte_pairs() -> BytePairTokenizer:
    return BytePairTokenizer.train(CORPUS, 270)


@pytest.fixture(scope="module")
def model_folder(byte_pairs: BytePairTokenizer, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a transformers tokenizer with an end mark and one added token."""
    folder = tmp_path_factory.mktemp("pretrained")
    fast = PreTrainedTokenizerFast(tokenizer_object=byte_pairs._tokenizer, eos_token=EOS)
    fast.add_tokens(["[EXTRA]"])
    fast.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module", params=["bytepair", "alphabet", "pretrained"])
def tokenizer(
    request: pytest.FixtureRequest, byte_pairs: BytePairTokenizer, model_folder: Path
) -> Tokenizer:
    if request.param == "bytepair":
        return byte_pairs
    if request.param == "alphabet":
        return AlphabetTokenizer.from_texts(CORPUS)
    return PretrainedTokenizer.from_pretrained(str(model_folder))


def test_tokenizer_round_trip_restores_text(tokenizer: Tokenizer) -> None:
    texts = CORPUS[:3] + ([] if tokenizer.unit == "symbol" else STRANGE)
    assert tokenizer.decode(tokenizer.encode(texts)) == texts


def test_encode_returns_ids_in_range_and_no_special_ids(tokenizer: Tokenizer) -> None:
    texts = CORPUS + ([] if tokenizer.unit == "symbol" else STRANGE)
    ids = {number for row in tokenizer.encode(texts) for number in row}
    assert ids <= set(range(tokenizer.num_tokens))
    assert not ids & set(tokenizer.special_ids)


def test_tokenizer_method_tokens_returns_one_string_per_id(tokenizer: Tokenizer) -> None:
    assert len(set(tokenizer.tokens())) == tokenizer.num_tokens


@pytest.mark.parametrize("place", ["local", "memory"])
def test_saved_tokenizer_is_restored_unchanged(
    tokenizer: Tokenizer, place: str, tmp_path: Path
) -> None:
    path = (
        f"memory://tokenizers{tmp_path}/t.json"
        if place == "memory"
        else str(tmp_path / "deep" / "t.json")
    )
    tokenizer.save(path)
    restored = load_tokenizer(path)
    assert type(restored) is type(tokenizer)
    assert restored.fingerprint == tokenizer.fingerprint
    assert restored.tokens() == tokenizer.tokens()
    assert restored.eos_id == tokenizer.eos_id
    assert restored.special_ids == tokenizer.special_ids
    assert restored.encode(CORPUS) == tokenizer.encode(CORPUS)
    restored.save(path)  # saving over itself changes nothing
    assert load_tokenizer(path).fingerprint == tokenizer.fingerprint


def test_tokenizer_save_writes_exactly_one_file(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "t.json"))
    assert [file.name for file in tmp_path.iterdir()] == ["t.json"]


@pytest.mark.parametrize("wrong", [-1, 10**6])
def test_decode_refuses_ids_out_of_range(tokenizer: Tokenizer, wrong: int) -> None:
    with pytest.raises(ArgumentError, match="row 1"):
        tokenizer.decode([[0], [0, wrong]])


def test_byte_pair_tokenizer_has_one_special_token_with_id_zero(
    byte_pairs: BytePairTokenizer,
) -> None:
    assert byte_pairs.num_tokens == 270
    assert (byte_pairs.eos_id, byte_pairs.special_ids, byte_pairs.tokens()[0]) == (0, (0,), EOS)
    assert byte_pairs.decode([[0]]) == [EOS]
    assert len(byte_pairs.encode(["the cat"])[0]) < 7  # fewer tokens than bytes: pairs were learned


def test_byte_pair_training_is_deterministic(
    byte_pairs: BytePairTokenizer,
) -> None:
    assert BytePairTokenizer.train(CORPUS, 270).fingerprint == byte_pairs.fingerprint
    assert BytePairTokenizer.train(CORPUS, 269).fingerprint != byte_pairs.fingerprint
    assert BytePairTokenizer.train(["xyz xyz"] * 9, 270).fingerprint != byte_pairs.fingerprint


def test_byte_pair_training_refuses_fewer_tokens_than_bytes() -> None:
    with pytest.raises(ArgumentError, match=r"257.*256"):
        BytePairTokenizer.train(CORPUS, 256)


def test_alphabet_tokenizer_ids_follow_the_order_of_the_symbols() -> None:
    tokenizer = AlphabetTokenizer("TGCA")
    assert tokenizer.encode(["ACGT"]) == [[3, 2, 1, 0]]
    assert (tokenizer.eos_id, tokenizer.special_ids, tokenizer.unit) == (None, (), "symbol")
    assert AlphabetTokenizer("ACGT").fingerprint != tokenizer.fingerprint


@pytest.mark.parametrize("symbol", ["N", "\x00", "日"])
def test_alphabet_tokenizer_raises_an_error_that_names_the_unknown_symbol_and_row(
    symbol: str,
) -> None:
    with pytest.raises(UnknownSymbol) as caught:
        AlphabetTokenizer("ACGT").encode(["ACGT", f"AC{symbol}T"])
    assert caught.value.row == 1
    assert repr(symbol) in str(caught.value)
    assert "Row 1" in str(caught.value)


@pytest.mark.parametrize("symbols", ["", "AA", ["A", "CG"]])
def test_alphabet_tokenizer_refuses_empty_repeated_or_long_symbols(symbols: Any) -> None:
    with pytest.raises(ArgumentError, match="symbols"):
        AlphabetTokenizer(symbols)


def fold_by_characters(text: str) -> str:
    """Fold a text one character at a time, as a check of `fold_letters`."""
    folded = ""
    for character in unicodedata.normalize("NFKD", text):
        if unicodedata.combining(character):
            continue
        for letter in character.lower():
            if letter in "abcdefghijklmnopqrstuvwxyz":
                folded += letter
            elif not folded.endswith(" "):
                folded += " "
    return folded


@settings(deadline=None, derandomize=True)
@given(text=st.text(max_size=40) | st.text("aAéÉ'.1 \n\u0301ﬁİß", max_size=40))
def test_fold_letters_equals_folding_by_characters_and_is_idempotent(text: str) -> None:
    folded = fold_letters(text)
    assert set(folded) <= set(" abcdefghijklmnopqrstuvwxyz")
    assert "  " not in folded
    assert folded == fold_by_characters(text)
    assert fold_letters(folded) == folded


@pytest.mark.parametrize(
    ("text", "folded"),
    [
        ("Élan vital, 1907!", "elan vital "),
        ("don't -- ask\n\nme", "don t ask me"),
        ("nai\u0308ve ﬁancé", "naive fiance"),
        ("日本", " "),
        ("", ""),
    ],
)
def test_fold_letters_of_examples(text: str, folded: str) -> None:
    assert fold_letters(text) == folded


@settings(deadline=None, derandomize=True)
@given(texts=st.lists(st.text(max_size=30), max_size=4))
def test_letters_tokenizer_decodes_to_the_folded_text(texts: list[str]) -> None:
    tokenizer = LettersTokenizer()
    folded = [fold_letters(text) for text in texts]
    assert tokenizer.decode(tokenizer.encode(texts)) == folded
    assert tokenizer.encode(folded) == tokenizer.encode(texts)


def test_letters_tokenizer_has_27_tokens_and_no_special_ones(tmp_path: Path) -> None:
    tokenizer = LettersTokenizer()
    assert tokenizer.num_tokens == len(tokenizer.tokens()) == 27
    assert (tokenizer.eos_id, tokenizer.special_ids, tokenizer.fill_id) == (None, (), None)
    assert tokenizer.unit == "token"
    tokenizer.save(str(tmp_path / "t.json"))
    assert load_tokenizer(str(tmp_path / "t.json")).fingerprint == tokenizer.fingerprint
    assert tokenizer.fingerprint != AlphabetTokenizer(tokenizer.tokens()).fingerprint


def test_check_round_trip_warns_that_letters_lose_text(caplog: pytest.LogCaptureFixture) -> None:
    check_round_trip(LettersTokenizer(), ["already folded"])
    assert not caplog.messages
    check_round_trip(LettersTokenizer(), ["Anne Elliot"])
    assert "'Anne Elliot' is decoded as 'anne elliot'" in caplog.text
    assert "bits per byte are not reported" in caplog.text


def test_word_tokenizer_numbers_words_alphabetically_after_the_end_mark(tmp_path: Path) -> None:
    tokenizer = WordTokenizer.from_texts(["red  square\n", "blue square"])
    assert tokenizer.tokens() == [EOS, "blue", "red", "square"]
    assert (tokenizer.eos_id, tokenizer.special_ids, tokenizer.unit) == (0, (0,), "token")
    assert tokenizer.encode(["square red", ""]) == [[3, 2], []]
    assert tokenizer.decode([[3, 2, 0], []]) == [f"square red {EOS}", ""]
    tokenizer.save(str(tmp_path / "t.json"))
    restored = load_tokenizer(str(tmp_path / "t.json"))
    assert restored.fingerprint == tokenizer.fingerprint
    assert restored.tokens() == tokenizer.tokens()
    with pytest.raises(ArgumentError, match="row 1"):
        tokenizer.decode([[0], [4]])


def test_word_tokenizer_raises_an_error_that_names_the_unknown_word_and_row() -> None:
    with pytest.raises(UnknownWord, match=r"Row 1 holds 'cow'.*blue red"):
        WordTokenizer(["blue", "red"]).encode(["red", f"red cow {EOS}"])
    with pytest.raises(UnknownWord, match="eos"):
        WordTokenizer(["blue", "red"]).encode([EOS])


@pytest.mark.parametrize("words", [[], ["a", "a"], ["a b"], [""], [EOS]])
def test_word_tokenizer_refuses_invalid_words(words: list[str]) -> None:
    with pytest.raises(ArgumentError, match="words"):
        WordTokenizer(words)


def test_pretrained_tokenizer_counts_added_tokens(model_folder: Path) -> None:
    tokenizer = PretrainedTokenizer.from_pretrained(str(model_folder))
    assert tokenizer.num_tokens == 271
    assert tokenizer.tokens()[270] == "[EXTRA]"
    assert tokenizer.eos_id == 0


def test_pretrained_fingerprint_is_unchanged_by_encoding(model_folder: Path) -> None:
    tokenizer = PretrainedTokenizer.from_pretrained(str(model_folder))
    tokenizer.encode(["the cat"])
    assert PretrainedTokenizer(tokenizer._tokenizer).fingerprint == tokenizer.fingerprint


def test_from_pretrained_raises_an_error_that_names_a_missing_tokenizer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DataError, match="no readable tokenizer"):
        PretrainedTokenizer.from_pretrained(str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(DataError, match=r"not a local directory.*Without a connection"):
        PretrainedTokenizer.from_pretrained("nobody/no-such-model")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read"),
        ('{"kind": "bytep', "not a complete JSON"),
        ("[1, 2]", "not a tokenizer saved by ddiff"),
        ('{"kind": "pickle"}', "got 'pickle'"),
        ('{"kind": "bytepair", "definition": {"model": 3}}', "damaged"),
        ('{"kind": "alphabet"}', "damaged"),
    ],
)
def test_load_tokenizer_refuses_an_unusable_file(
    tmp_path: Path, content: str | None, message: str
) -> None:
    path = tmp_path / "t.json"
    if content is not None:
        path.write_text(content)
    with pytest.raises(DataError, match=message):
        load_tokenizer(str(path))


def test_saved_tokenizer_is_json_that_names_its_kind(tokenizer: Tokenizer, tmp_path: Path) -> None:
    tokenizer.save(str(tmp_path / "t.json"))
    assert json.loads((tmp_path / "t.json").read_text(encoding="utf-8"))["kind"] in (
        "bytepair",
        "alphabet",
        "pretrained",
    )
