"""Tokenizers of saved models give the same ids and texts as those of the run."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as TokenizersTokenizer
from tokenizers import models
from transformers import PreTrainedTokenizerFast

from ddiff import ArgumentError
from ddiff.data.tokenizer import (
    AlphabetTokenizer,
    BytePairTokenizer,
    LettersTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    WordTokenizer,
)
from ddiff.runs.hub import tokenizer_files
from ddiff.runs.hub.tokenizer_files import decode, load_tokenizer_files, write_tokenizer


def make_pretrained() -> PretrainedTokenizer:
    backend = TokenizersTokenizer(models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    return PretrainedTokenizer(PreTrainedTokenizerFast(tokenizer_object=backend, unk_token="a"))


CASES: dict[str, tuple[Tokenizer, str]] = {
    "bytepair": (
        BytePairTokenizer.train(["the old cat sat on the mat"], 270),
        "the <|eos|> old <|mask|>\n\n caf\u00e9  \U0001f600",
    ),
    "alphabet": (AlphabetTokenizer("ACGT\n \u00e9"), "AC GT\n\u00e9A"),
    "letters": (LettersTokenizer(), "Hello, W\u00f6rld! \u00bd \u0130stanbul x2\n"),
    "words": (WordTokenizer.from_texts(["a cat sat on it"]), " cat  sat\non "),
    "pretrained": (make_pretrained(), "b"),
}


@pytest.mark.parametrize("name", CASES)
def test_written_tokenizer_encodes_and_decodes_equally(name: str, tmp_path: Path) -> None:
    tokenizer, text = CASES[name]
    write_tokenizer(tokenizer, tokenizer.num_tokens, tmp_path)
    written = load_tokenizer_files(tmp_path)
    (ids,) = tokenizer.encode([text])
    assert ids
    assert written(text, add_special_tokens=False)["input_ids"] == ids
    assert decode(written, ids) == tokenizer.decode([ids])[0]


def test_mask_and_end_mark_are_special_tokens(tmp_path: Path) -> None:
    tokenizer, _ = CASES["bytepair"]
    write_tokenizer(tokenizer, tokenizer.num_tokens, tmp_path)
    written = load_tokenizer_files(tmp_path)
    assert written.mask_token_id == tokenizer.num_tokens
    assert written.eos_token_id == 0
    assert decode(written, [0, tokenizer.num_tokens]) == "<|eos|><|mask|>"


def test_mask_above_a_tree_is_no_token(tmp_path: Path) -> None:
    tokenizer, _ = CASES["bytepair"]
    write_tokenizer(tokenizer, tokenizer.num_tokens + 8, tmp_path)
    assert load_tokenizer_files(tmp_path).mask_token_id is None


def test_unknown_characters_are_errors_as_in_the_run(tmp_path: Path) -> None:
    tokenizer, _ = CASES["alphabet"]
    write_tokenizer(tokenizer, None, tmp_path)
    with pytest.raises(Exception, match="UNK"):
        load_tokenizer_files(tmp_path)("ACX")


def test_tokenizer_that_decodes_to_another_text_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokenizer, _ = CASES["words"]
    wrong = tokenizer_files.build_backend(AlphabetTokenizer("abcdef"))
    monkeypatch.setattr(tokenizer_files, "build_backend", lambda _: wrong)
    with pytest.raises(ArgumentError, match="decode ids to another text"):
        write_tokenizer(tokenizer, None, tmp_path)
