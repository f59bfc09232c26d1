"""Tokenizer of a run as files of the transformers library, which `AutoTokenizer` loads."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import singledispatch
from pathlib import Path
from typing import Any

from tokenizers import AddedToken, Regex, decoders, models, normalizers, pre_tokenizers
from tokenizers import Tokenizer as TokenizersTokenizer

from ddiff.data.tokenizer import (
    EOS,
    LETTERS,
    AlphabetTokenizer,
    BytePairTokenizer,
    LettersTokenizer,
    PretrainedTokenizer,
    Tokenizer,
    WordTokenizer,
)
from ddiff.errors import ArgumentError

MASK = "<|mask|>"
"""Spelling of the mask, if its id follows the ids of the tokens."""

TOKENIZER_JSON = "tokenizer.json"
TOKENIZER_CONFIG = "tokenizer_config.json"
CHAT_TEMPLATE = "chat_template.jinja"

CONTENTS = {
    TOKENIZER_JSON: "tokenizer with the same ids and texts",
    TOKENIZER_CONFIG: "special tokens; a flat vocabulary has the mask as `mask_token`",
    CHAT_TEMPLATE: "chat template of a run of conversations, or of a pretrained tokenizer",
}
"""Description of each file, for the documentation."""

CHECKED = 512  # ids of the text that is decoded to compare both tokenizers


def write_tokenizer(tokenizer: Tokenizer, mask_id: int | None, folder: Path) -> None:
    """Write tokenizer.json and tokenizer_config.json to a folder.

    `mask_id`: id of the mask; None without a mask. The mask becomes a token of the files if its id
    is the number of tokens, as it is in a flat vocabulary. Raises ArgumentError if the files of the
    transformers library cannot represent the tokenizer.
    """
    if isinstance(tokenizer, PretrainedTokenizer):
        tokenizer.save_pretrained(str(folder))
    else:
        built = build_backend(tokenizer)
        config: dict[str, Any] = {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            # As in ddiff, the spelling of a special token in a text is ordinary text.
            "split_special_tokens": True,
        }
        if tokenizer.eos_id is not None:
            config["eos_token"] = EOS
        if mask_id == tokenizer.num_tokens:
            built.add_special_tokens([AddedToken(MASK, special=True, normalized=False)])
            config["mask_token"] = MASK
        built.save(str(folder / TOKENIZER_JSON))
        text = json.dumps(config, indent=2) + "\n"
        (folder / TOKENIZER_CONFIG).write_text(text, encoding="utf-8")
    _check_decoding(tokenizer, folder)


@singledispatch
def build_backend(tokenizer: Tokenizer) -> TokenizersTokenizer:
    """Build the tokenizer of the tokenizers library that has the same ids and texts."""
    raise ArgumentError(
        f"save_pretrained: {type(tokenizer).__name__} has no form in the transformers library. Use "
        "a tokenizer of ddiff or of the transformers library, or export only the weights: "
        "ddiff export RUN weights.safetensors."
    )


@build_backend.register
def _(tokenizer: BytePairTokenizer) -> TokenizersTokenizer:
    return TokenizersTokenizer.from_str(tokenizer.definition)


@build_backend.register
def _(tokenizer: AlphabetTokenizer) -> TokenizersTokenizer:
    return _build_alphabet(tokenizer.tokens())


@build_backend.register
def _(tokenizer: LettersTokenizer) -> TokenizersTokenizer:
    built = _build_alphabet(list(LETTERS))
    # The steps of `fold_letters`.
    built.normalizer = normalizers.Sequence(
        [
            normalizers.NFKD(),
            normalizers.StripAccents(),
            normalizers.Lowercase(),
            normalizers.Replace(Regex("[^a-z]+"), " "),
        ]
    )
    return built


@build_backend.register
def _(tokenizer: WordTokenizer) -> TokenizersTokenizer:
    built = _build_word_level(tokenizer.tokens())
    built.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # Without a decoder, the library joins tokens by one space.
    return built


def _build_alphabet(symbols: Sequence[str]) -> TokenizersTokenizer:
    built = _build_word_level(symbols)
    built.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    built.decoder = decoders.Fuse()
    return built


def _build_word_level(tokens: Sequence[str]) -> TokenizersTokenizer:
    ids = {token: number for number, token in enumerate(tokens)}
    # Without an unknown token, the library raises an error for other texts, as ddiff does.
    return TokenizersTokenizer(models.WordLevel(ids))


def _check_decoding(tokenizer: Tokenizer, folder: Path) -> None:
    """Raise ArgumentError unless the written tokenizer decodes the first ids as the given one."""
    written = load_tokenizer_files(folder)
    ids = list(range(min(tokenizer.num_tokens, CHECKED)))
    texts = []
    for row in (ids, ids[::-1]):
        known = [number for number in row if number not in tokenizer.special_ids]
        texts.append((tokenizer.decode([known])[0], decode(written, known)))
    if any(own != other for own, other in texts):
        raise ArgumentError(
            f"save_pretrained: the files of {type(tokenizer).__name__} decode ids to another text "
            "than the tokenizer of the run. Please report this tokenizer, and export only the "
            "weights: ddiff export RUN weights.safetensors."
        )


def load_tokenizer_files(folder: Path) -> Any:
    """Load the tokenizer in a folder with the transformers library, without custom code."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(str(folder), trust_remote_code=False)


def decode(tokenizer: Any, ids: Sequence[int]) -> str:
    """Decode ids with a tokenizer of the transformers library."""
    text: str = tokenizer.decode(list(ids), skip_special_tokens=False)
    return text
