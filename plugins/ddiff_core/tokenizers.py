"""Tokenizers as recipe components."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ddiff import ComponentConfig, DataError

if TYPE_CHECKING:
    from ddiff import (
        AlphabetTokenizer,
        Cache,
        Documents,
        LettersTokenizer,
        PretrainedTokenizer,
        Tokenizer,
        WordTokenizer,
    )

_log = logging.getLogger(__name__)

# A limit that detects typing errors: a hundred times the vocabulary of large models.
MOST_TOKENS = 2**24


class BytePair:
    """Byte-level BPE tokenizer, learned from the training documents.

    `<|eos|>` is its only special token.
    """

    class Config(ComponentConfig):
        size: Annotated[int, Field(ge=257, le=MOST_TOKENS)] = 2048
        """Largest number of tokens: 256 bytes, `<|eos|>` and learned merges."""

    @staticmethod
    def build(config: Config, *, documents: Documents, cache: Cache | None) -> Tokenizer:
        from ddiff import BytePairTokenizer, fingerprint_texts, load_tokenizer

        # The key is a hash of the texts, so that changed documents train a new tokenizer.
        def train() -> Tokenizer:
            return BytePairTokenizer.train(documents.train["text"], config.size)

        def write(place: Path) -> None:
            train().save(str(place / "tokenizer.json"))

        if cache is None:
            tokenizer = train()
        else:
            inputs = {"documents": fingerprint_texts(documents.train), "size": config.size}
            entry = cache.load_or_build("byte_pairs", inputs, write)
            tokenizer = load_tokenizer(str(entry / "tokenizer.json"))
        if tokenizer.num_tokens < config.size:
            _log.warning(
                "The corpus yields only %d tokens of the %d that [tokenizer] size allows.",
                tokenizer.num_tokens,
                config.size,
            )
        return tokenizer

    @staticmethod
    def preview(config: Config) -> int:
        """Return the largest possible number of tokens, which a dry run uses."""
        return config.size


class Alphabet:
    """Tokenizer with one token per character, without special tokens.

    It is for corpora whose rows all have the same length. Metrics are per symbol (character). If
    the corpus fills up shorter rows, the fill symbol must be one of the characters.
    """

    class Config(ComponentConfig):
        symbols: Annotated[str, Field(min_length=1)] = "auto"
        """Characters in the order of their ids, such as "ACGT"; "auto": those of the corpus."""

    @staticmethod
    def build(config: Config, *, documents: Documents, cache: Cache | None) -> AlphabetTokenizer:
        from ddiff import AlphabetTokenizer, Documents

        # A corpus of shards has rows without a fill symbol.
        fill = documents.fill if isinstance(documents, Documents) else None
        if config.symbols != "auto":
            return AlphabetTokenizer(config.symbols, fill)
        # Validation rows count too: a symbol that is missing in training must have an id.
        parts = (documents.train, documents.validation)
        return AlphabetTokenizer.from_texts((text for part in parts for text in part["text"]), fill)

    @staticmethod
    def preview(config: Config) -> int | None:
        """Return the number of tokens if the recipe lists the symbols, else None."""
        return None if config.symbols == "auto" else len(config.symbols)


class Letters:
    """Tokenizer with one token per character for any text: 27 characters, a to z and the space.

    Text loses case, accents, digits and punctuation, so bits per byte are not reported for texts
    that have these.
    """

    class Config(ComponentConfig):
        """Empty: this tokenizer has no keys."""

    @staticmethod
    def build(config: Config, *, documents: Documents, cache: Cache | None) -> LettersTokenizer:
        from ddiff import LettersTokenizer

        return LettersTokenizer()

    @staticmethod
    def preview(config: Config) -> int:
        """Return the number of tokens."""
        return 27


class Words:
    """Tokenizer with one token per word of the training texts, for captions of few words.

    White space separates words. Words that do not occur in training are refused. `<|eos|>` is the
    only special token.
    """

    class Config(ComponentConfig):
        """Empty: this tokenizer has no keys."""

    @staticmethod
    def build(config: Config, *, documents: Documents, cache: Cache | None) -> WordTokenizer:
        from ddiff import WordTokenizer

        return WordTokenizer.from_texts(documents.train["text"])


class Pretrained:
    """Tokenizer of the transformers library, from a directory or the hub.

    Code in the repository of the tokenizer is never run.
    """

    class Config(ComponentConfig):
        path: str
        """Local directory, or a name on the hub."""
        size: Annotated[int, Field(gt=0, le=MOST_TOKENS)] | None = None
        """Expected number of tokens; with this key a dry run does not load the tokenizer."""
        num_tokens: Annotated[int, Field(gt=0, le=MOST_TOKENS)] | None = None
        """Number of tokens of the model, if the tokenizer has another number. Special tokens with
        higher ids are left out, such as a mask that was added last; missing ids are unused."""

    @staticmethod
    def build(config: Config, *, documents: Documents, cache: Cache | None) -> PretrainedTokenizer:
        from ddiff import PretrainedTokenizer

        tokenizer = PretrainedTokenizer.from_pretrained(config.path, num_tokens=config.num_tokens)
        if config.size not in (None, tokenizer.num_tokens):
            raise DataError(
                f"[tokenizer] size must be the number of tokens of {config.path!r}, "
                f"{tokenizer.num_tokens}; got {config.size}. "
                f"Leave size out, or set path to a tokenizer with {config.size} tokens."
            )
        return tokenizer

    @staticmethod
    def preview(config: Config) -> int | None:
        """Return the number of tokens if the recipe has it, else None."""
        return config.num_tokens or config.size


class Saved:
    """Tokenizer saved by ddiff, as `tokenizer.json` in a run directory or next to token shards."""

    class Config(ComponentConfig):
        path: str
        """File, local or of any fsspec protocol."""

    @staticmethod
    def build(config: Config, *, documents: Documents, cache: Cache | None) -> Tokenizer:
        from ddiff import load_tokenizer

        return load_tokenizer(config.path)

    @staticmethod
    def reads(config: Config) -> tuple[str, ...]:
        return (config.path,)
