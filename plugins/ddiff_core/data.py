"""The engine's corpora as components of a recipe. What reads text is imported when a corpus is, not when a recipe is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import Field

from ddiff import ArgumentError, ComponentConfig, PositiveInt, Seed

if TYPE_CHECKING:
    from ddiff import (
        Cache,
        Documents,
        MarkovSource,
        ShardedCorpus,
        SourceCorpus,
        StreamedCorpus,
        TextSource,
    )

Paths = Annotated[tuple[str, ...], Field(min_length=1)]
MOST_SYMBOLS = 2**30  # of a generated corpus
HeldOut = Annotated[float, Field(gt=0.0, lt=1.0)]


class Bundled:
    """Jane Austen's six novels by chapter, Persuasion held out for validation; 4.0 MB, nothing to fetch."""

    class Config(ComponentConfig):
        """No keys."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        from ddiff import load_bundled_novels

        return load_bundled_novels()


class Text:
    """UTF-8 text files."""

    class Config(ComponentConfig):
        files: Paths
        """Paths or globs, local or of any fsspec protocol."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation documents; without them a share is held out."""
        held_out: HeldOut = 0.05
        """The share of the documents for validation, chosen by the hash of their text."""
        split: Literal["file", "paragraph", "line"] = "file"
        """What a document is; blank lines divide paragraphs."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        from ddiff import read_text_files

        return read_text_files(
            config.files,
            validation=config.validation,
            held_out=config.held_out,
            split=config.split,
            cache=cache,
        )

    @staticmethod
    def preview(config: Config) -> None:
        """Refuses a file that is named for training and for validation."""
        _check_files(config)

    @staticmethod
    def reads(config: Config) -> tuple[str, ...]:
        return config.files + config.validation


class JsonLines:
    """Files of JSON lines: texts, and labels and vectors for [denoiser] conditions."""

    class Config(ComponentConfig):
        files: Paths
        """Paths or globs, local or of any fsspec protocol; every line is one object."""
        text: str = "text"
        """The field that holds the text."""
        labels: tuple[str, ...] = ()
        """Fields with whole numbers from 0; null is no label. Conditions have the names of their fields."""
        vectors: tuple[str, ...] = ()
        """Fields with lists of numbers; null is no vector."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation documents; without them a share is held out."""
        held_out: HeldOut = 0.05
        """The share of the documents for validation, chosen by the hash of their text."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        from ddiff import read_json_lines

        return read_json_lines(
            config.files,
            text=config.text,
            labels=config.labels,
            vectors=config.vectors,
            validation=config.validation,
            held_out=config.held_out,
            cache=cache,
        )

    @staticmethod
    def preview(config: Config) -> None:
        """Refuses a file that is named for training and for validation."""
        _check_files(config)

    @staticmethod
    def reads(config: Config) -> tuple[str, ...]:
        return config.files + config.validation


class Symbols:
    """Rows of symbols, one per line, each of [data] length: DNA, proteins and the like. For tokenizer "alphabet"."""

    class Config(ComponentConfig):
        files: Paths
        """Paths or globs, local or of any fsspec protocol."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation rows; without them a share is held out."""
        held_out: HeldOut = 0.05
        """The share of the rows for validation, chosen by their hash: equal rows fall on one side."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        from ddiff import read_symbol_rows

        return read_symbol_rows(
            config.files,
            length=length,
            validation=config.validation,
            held_out=config.held_out,
            cache=cache,
        )

    @staticmethod
    def preview(config: Config) -> None:
        """Refuses a file that is named for training and for validation."""
        _check_files(config)

    @staticmethod
    def reads(config: Config) -> tuple[str, ...]:
        return config.files + config.validation


def _check_files(config: Text.Config | JsonLines.Config | Symbols.Config) -> None:
    from ddiff import find_train_and_validation

    find_train_and_validation(config.files, config.validation)


class TokenisedConfig(ComponentConfig):
    """Keys of every corpus that is tokenised into shards, or while it is trained on."""

    held_out: HeldOut = 0.005
    """The share of the documents for validation, chosen by the hash of their text."""
    workers: Annotated[int, Field(gt=0, le=1024)] = 1
    """Processes that tokenise; rows are the same whatever their number."""
    streaming: bool = False
    """Tokenise while training, and keep no shards; docs/data.md has the limits."""
    head: PositiveInt = 20_000
    """Streaming: documents read first; those held out are evaluated on, the others counted and learned from."""
    block: PositiveInt = 4096
    """Streaming: rows that are shuffled together."""


class Files:
    """A large corpus in files of parquet, JSON lines or text: tokenised once into memory-mapped shards."""

    class Config(TokenisedConfig):
        files: Paths
        """Paths or globs, local or of any fsspec protocol (s3://, gs://, hf://); compressed or not."""
        format: Literal["auto", "parquet", "json", "text"] = "auto"
        """"auto": by the endings of the files."""
        column: str = "text"
        """The column or field of the text."""
        split: Literal["file", "paragraph", "line"] = "line"
        """What a document of a text file is."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation documents; without them a share is held out."""

    @classmethod
    def build(
        cls, config: Config, *, length: int, seed: int, cache: Cache | None
    ) -> SourceCorpus | StreamedCorpus:
        return cls.preview(config)

    @staticmethod
    def preview(config: Config) -> SourceCorpus | StreamedCorpus:
        """The corpus, of which no file is read yet: files that are missing or of several formats are refused."""
        from ddiff import open_file_source

        def texts(files: tuple[str, ...]) -> TextSource:
            format = None if config.format == "auto" else config.format
            return open_file_source(files, format=format, column=config.column, split=config.split)

        validation = texts(config.validation) if config.validation else None
        return _corpus(config, texts(config.files), validation)

    @staticmethod
    def reads(config: Config) -> tuple[str, ...]:
        return config.files + config.validation


class Hub:
    """A data set of the Hugging Face hub, streamed and tokenised once into memory-mapped shards."""

    class Config(TokenisedConfig):
        name: str
        """Its name on the hub, or a local folder of its files."""
        config: str | None = None
        """Which of its configurations."""
        split: str = "train"
        column: str = "text"
        """The column of the text."""
        revision: str | None = None
        """A commit of the hub: without one the shards stay what was tokenised first."""
        validation: str | None = None
        """The split of the validation documents; without it a share is held out."""

    @staticmethod
    def build(
        config: Config, *, length: int, seed: int, cache: Cache | None
    ) -> SourceCorpus | StreamedCorpus:
        from ddiff import open_hub_source

        def texts(split: str) -> TextSource:
            return open_hub_source(
                config.name,
                config=config.config,
                split=split,
                column=config.column,
                revision=config.revision,
            )

        validation = None if config.validation is None else texts(config.validation)
        return _corpus(config, texts(config.split), validation)


def _corpus(
    config: Files.Config | Hub.Config, source: TextSource, validation: TextSource | None
) -> SourceCorpus | StreamedCorpus:
    from ddiff import SourceCorpus, StreamedCorpus

    corpus = SourceCorpus(source, validation, held_out=config.held_out, workers=config.workers)
    return (
        StreamedCorpus(corpus, head=config.head, block=config.block) if config.streaming else corpus
    )


class Shards:
    """Token shards that `ddiff data` made, on this machine or another."""

    class Config(ComponentConfig):
        path: str
        """The folder, local or of any fsspec protocol (then it is fetched into the cache)."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> ShardedCorpus:
        from ddiff import ShardedCorpus

        return ShardedCorpus(config.path, cache)


class Markov:
    """Rows of a generated Markov chain of known entropy: no honest bound is below it. For tokenizer "alphabet".

    The rows depend on this table alone, not on the recipe's seed: other seeds train on the same data.
    """

    class Config(ComponentConfig):
        alphabet: Annotated[int, Field(ge=4, le=16)] = 8
        peakedness: Annotated[float, Field(ge=0.0, le=100.0)] = 2.0
        """0: all symbols equally likely; larger: more predictable."""
        rows: PositiveInt = 4096
        validation: PositiveInt = 512
        """Rows for validation."""
        seed: Seed = 0
        """Of the chain and its rows."""

    @classmethod
    def build(cls, config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        cls.preview(config, length=length)
        return cls.source(config).documents(
            rows=config.rows, validation=config.validation, length=length
        )

    @staticmethod
    def preview(config: Config, *, length: int) -> None:
        """Raises ArgumentError where the rows would have more symbols than can be held."""
        symbols = (config.rows + config.validation) * length
        if symbols > MOST_SYMBOLS:
            raise ArgumentError(
                f"rows and validation must have at most {MOST_SYMBOLS:,} symbols together, since they are held in memory; "
                f"got {config.rows} + {config.validation} rows of length {length}, {symbols:,}. Take fewer rows."
            )

    @staticmethod
    def source(config: Config) -> MarkovSource:
        """The chain itself, with its exact `entropy_rate` and `row_entropy(length)` in nats per symbol."""
        from ddiff import MarkovSource

        return MarkovSource(config.alphabet, peakedness=config.peakedness, seed=config.seed)
