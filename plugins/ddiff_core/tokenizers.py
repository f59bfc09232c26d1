"""The engine's tokenizers as components of a recipe."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from pydantic import Field

from ddiff import ComponentConfig, DataError

if TYPE_CHECKING:
    from ddiff import AlphabetTokenizer, Cache, Documents, PretrainedTokenizer, Tokenizer

_log = logging.getLogger(__name__)

MOST = 2**24  # tokens: sixteen million, a hundred times what models have


class BytePair:
    """Byte-level byte pairs learned from the training documents; one special token, `<|eos|>`."""

    class Config(ComponentConfig):
        size: Annotated[int, Field(ge=257, le=MOST)] = 2048
        """Tokens at most: 256 bytes, `<|eos|>` and what is learned."""

    @staticmethod
    def build(config: Config, *, documents: Documents, cache: Cache | None) -> Tokenizer:
        from ddiff import BytePairTokenizer, fingerprint_texts, load_tokenizer

        def train() -> Tokenizer:
            return BytePairTokenizer.train(documents.train["text"], config.size)

        def write(place: Path) -> None:
            train().save(str(place / "tokenizer.json"))

        if cache is None:
            tokenizer = train()
        else:
            inputs = {"documents": fingerprint_texts(documents.train), "size": config.size}
            tokenizer = load_tokenizer(
                str(cache.load_or_build("byte_pairs", inputs, write) / "tokenizer.json")
            )
        if tokenizer.num_tokens < config.size:
            given = (tokenizer.num_tokens, config.size)
            _log.warning(
                "The corpus gives only %d tokens of the %d that [tokenizer] size asks for.", *given
            )
        return tokenizer

    @staticmethod
    def preview(config: Config) -> int:
        """Tokens at most."""
        return config.size


class Alphabet:
    """One token per character of fixed-length rows, no special tokens; figures are per symbol."""

    class Config(ComponentConfig):
        symbols: Annotated[str, Field(min_length=1)] = "auto"
        """The characters in id order, such as "ACGT", or "auto": those of the corpus, validation included."""

    @staticmethod
    def build(config: Config, *, documents: Documents, cache: Cache | None) -> AlphabetTokenizer:
        from ddiff import AlphabetTokenizer

        if config.symbols != "auto":
            return AlphabetTokenizer(config.symbols)
        return AlphabetTokenizer.of(
            text for part in (documents.train, documents.validation) for text in part["text"]
        )

    @staticmethod
    def preview(config: Config) -> int | None:
        """Tokens, where the recipe names them."""
        return None if config.symbols == "auto" else len(config.symbols)


class Pretrained:
    """Tokenizer of the transformers library, from a directory or the hub; code of its own is not run."""

    class Config(ComponentConfig):
        path: str
        """A local directory, or a name on the hub."""
        size: Annotated[int, Field(gt=0, le=MOST)] | None = None
        """Its tokens, if you know: a dry run then needs no tokenizer, and another one is refused."""

    @staticmethod
    def build(config: Config, *, documents: Documents, cache: Cache | None) -> PretrainedTokenizer:
        from ddiff import PretrainedTokenizer

        tokenizer = PretrainedTokenizer.from_pretrained(config.path)
        if config.size not in (None, tokenizer.num_tokens):
            raise DataError(
                f"size must be the number of tokens of {config.path!r}, {tokenizer.num_tokens}; got {config.size}. Leave "
                "it out, or name the tokenizer that has so many."
            )
        return tokenizer

    @staticmethod
    def preview(config: Config) -> int | None:
        """Tokens, where the recipe says how many."""
        return config.size


class Saved:
    """A tokenizer that ddiff saved: `tokenizer.json` of a run directory or of a folder of token shards."""

    class Config(ComponentConfig):
        path: str
        """The file, local or of any fsspec protocol."""

    @staticmethod
    def build(config: Config, *, documents: Documents, cache: Cache | None) -> Tokenizer:
        from ddiff import load_tokenizer

        return load_tokenizer(config.path)

    @staticmethod
    def reads(config: Config) -> tuple[str, ...]:
        return (config.path,)
