"""Corpora as recipe components.

The modules that read text are imported inside `build`, so that parsing a recipe stays fast.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any, Literal

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
HeldOut = Annotated[float, Field(gt=0.0, lt=1.0)]

# Largest number of symbols of a generated corpus, which is kept in memory.
MOST_SYMBOLS = 2**30


class ListedFiles:
    """Base of data sets with the keys `files` and `validation`."""

    @staticmethod
    def reads(config: Any) -> tuple[str, ...]:
        return config.files + config.validation


class TextFiles(ListedFiles):
    """Base of corpora in files. A dry run checks the lists of files, and reads no text."""

    @staticmethod
    def preview(config: Any) -> None:
        """Raise an error if a file is listed for both training and validation."""
        from ddiff import find_train_and_validation

        find_train_and_validation(config.files, config.validation)


class Bundled:
    """Jane Austen's six novels, one document per chapter, bundled with the package (4.0 MB).

    Persuasion is held out for validation.
    """

    class Config(ComponentConfig):
        """Empty: this corpus has no keys."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        from ddiff import load_bundled_novels

        return load_bundled_novels()


class Names:
    """91,910 surnames and given names of the United States, bundled with the package (0.2 MB).

    Every name is one row: its letters, then spaces up to `[data] length` symbols. The tokenizer
    must be "alphabet".
    """

    class Config(ComponentConfig):
        held_out: HeldOut = 0.05
        """Fraction of the names for validation, chosen by the hash of the name."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        from ddiff import load_bundled_names

        return load_bundled_names(length=length, held_out=config.held_out)

    @staticmethod
    def preview(config: Config, *, length: int) -> None:
        """Raise ArgumentError if rows of `length` symbols are too short for the longest name."""
        from ddiff import check_name_length

        check_name_length(length)


class DigitRows:
    """1,797 images of handwritten digits as rows of symbols, bundled with the package (0.1 MB).

    Every image is one row of 64 symbols, the grey levels of its pixels row by row. The symbols "0"
    to "9" and "a" to "g" are the levels 0 (background) to 16. The last 450 images, of other
    writers, are for validation. The tokenizer must be "alphabet".
    """

    class Config(ComponentConfig):
        """Empty: this corpus has no keys."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        from ddiff import load_digit_rows

        return load_digit_rows(length=length)

    @staticmethod
    def preview(config: Config, *, length: int) -> None:
        """Raise ArgumentError if `length` is not the number of pixels of an image."""
        from ddiff import check_digit_length

        check_digit_length(length)


class StandardLibrary:
    """Python source of the standard library of the running Python, one document per module.

    Tests and tables of data are left out. The documents differ between versions of Python, so that
    results of different versions are not comparable.
    """

    class Config(ComponentConfig):
        held_out: HeldOut = 0.05
        """Fraction of the modules for validation, chosen by the hash of their text."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        from ddiff import read_standard_library

        return read_standard_library(held_out=config.held_out)


class Text(TextFiles):
    """Corpus of UTF-8 text files."""

    class Config(ComponentConfig):
        files: Paths
        """Paths or globs, local or of any fsspec protocol."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation documents; without them `held_out` selects some."""
        held_out: HeldOut = 0.05
        """Fraction of the documents for validation, chosen by the hash of their text."""
        split: Literal["file", "paragraph", "line"] = "file"
        """Unit that counts as one document; blank lines separate paragraphs."""

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


class JsonLines(TextFiles):
    """Corpus of JSON lines with texts, and optionally with labels and vectors as conditions."""

    class Config(ComponentConfig):
        files: Paths
        """Paths or globs, local or of any fsspec protocol; every line is one JSON object."""
        text: str = "text"
        """Field with the text."""
        labels: tuple[str, ...] = ()
        """Fields with integer labels from 0, or null. Each is a condition of the same name."""
        vectors: tuple[str, ...] = ()
        """Fields with lists of numbers, or null. Each is a condition of the same name."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation documents; without them `held_out` selects some."""
        held_out: HeldOut = 0.05
        """Fraction of the documents for validation, chosen by the hash of their text."""

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


class Symbols(TextFiles):
    """Corpus of symbol strings, such as DNA or proteins; every line of a file is one row.

    Every row must have `[data] length` symbols, or fewer with the key `fill`. The tokenizer must be
    "alphabet".
    """

    class Config(ComponentConfig):
        files: Paths
        """Paths or globs, local or of any fsspec protocol."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation rows; without them `held_out` selects some."""
        held_out: HeldOut = 0.05
        """Fraction of the rows for validation, chosen by hash: equal rows stay together."""
        fill: Annotated[str, Field(min_length=1, max_length=1)] | None = None
        """Symbol that fills up shorter rows; no row may contain it."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        from ddiff import read_symbol_rows

        return read_symbol_rows(
            config.files,
            length=length,
            validation=config.validation,
            held_out=config.held_out,
            fill=config.fill,
            cache=cache,
        )


class TokenizedConfig(ComponentConfig):
    """Keys of large corpora, which are tokenized into shards or, with `streaming`, in training."""

    held_out: HeldOut = 0.005
    """Fraction of the documents for validation, chosen by the hash of their text."""
    workers: Annotated[int, Field(gt=0, le=1024)] = 1
    """Number of tokenizer processes; it does not change the rows."""
    streaming: bool = False
    """Tokenize during training, without writing shards; docs/data.md lists the limits."""
    head: PositiveInt = 20_000
    """If streaming: number of documents at the start of the corpus from which token counts, a
    learned tokenizer and (without `validation`) the validation rows are made."""
    block: PositiveInt = 4096
    """If streaming: number of consecutive rows that are shuffled together."""


class Files(ListedFiles):
    """Large corpus in parquet, JSON lines or text files.

    The corpus is tokenized once, into memory-mapped shards, or during training if
    `streaming = true`.
    """

    class Config(TokenizedConfig):
        files: Paths
        """Paths or globs, local or of any fsspec protocol (s3://, hf://); may be compressed."""
        format: Literal["auto", "parquet", "json", "text"] = "auto"
        """File format; "auto" finds the format from the file endings."""
        column: str = "text"
        """Column or field with the text."""
        split: Literal["file", "paragraph", "line"] = "line"
        """Unit of a text file that counts as one document; blank lines separate paragraphs."""
        validation: tuple[str, ...] = ()
        """Paths or globs of the validation documents; without them `held_out` selects some."""

    @classmethod
    def build(
        cls, config: Config, *, length: int, seed: int, cache: Cache | None
    ) -> SourceCorpus | StreamedCorpus:
        return cls.preview(config)

    @staticmethod
    def preview(config: Config) -> SourceCorpus | StreamedCorpus:
        """Return the corpus without reading texts, for a dry run.

        Raises an error if files are missing or have several formats.
        """
        train = _open_files(config, config.files)
        validation = _open_files(config, config.validation) if config.validation else None
        return _make_corpus(config, train, validation)


def _open_files(config: Files.Config, files: tuple[str, ...]) -> TextSource:
    from ddiff import open_file_source

    # ddiff finds the format from the file endings if it gets None.
    format = None if config.format == "auto" else config.format
    return open_file_source(files, format=format, column=config.column, split=config.split)


class Hub:
    """Dataset of the Hugging Face hub.

    The dataset is downloaded as a stream and tokenized once, into memory-mapped shards, or during
    training if `streaming = true`.
    """

    class Config(TokenizedConfig):
        name: str
        """Name on the hub, or a local folder with the dataset's files."""
        config: str | None = None
        """Configuration of the dataset."""
        split: str = "train"
        """Split of the training documents."""
        column: str = "text"
        """Column with the text."""
        revision: str | None = None
        """Commit on the hub. Without it, existing shards are used even if the hub has changed."""
        validation: str | None = None
        """Split of the validation documents; without it `held_out` selects some documents."""

    @staticmethod
    def build(
        config: Config, *, length: int, seed: int, cache: Cache | None
    ) -> SourceCorpus | StreamedCorpus:
        train = _open_hub(config, config.split)
        validation = None
        if config.validation is not None:
            validation = _open_hub(config, config.validation)
        return _make_corpus(config, train, validation)


def _open_hub(config: Hub.Config, split: str) -> TextSource:
    from ddiff import open_hub_source

    return open_hub_source(
        config.name,
        config=config.config,
        split=split,
        column=config.column,
        revision=config.revision,
    )


def _make_corpus(
    config: Files.Config | Hub.Config, source: TextSource, validation: TextSource | None
) -> SourceCorpus | StreamedCorpus:
    from ddiff import SourceCorpus, StreamedCorpus

    # A stream wraps the corpus that would write shards, whose documents and hashes are the same.
    corpus = SourceCorpus(source, validation, held_out=config.held_out, workers=config.workers)
    if config.streaming:
        return StreamedCorpus(corpus, head=config.head, block=config.block)
    return corpus


class Shards:
    """Token shards written by `ddiff data`, on this machine or on another machine."""

    class Config(ComponentConfig):
        path: str
        """Folder, local or of any fsspec protocol; a remote folder is copied into the cache."""

    @staticmethod
    def build(config: Config, *, length: int, seed: int, cache: Cache | None) -> ShardedCorpus:
        from ddiff import ShardedCorpus

        return ShardedCorpus(config.path, cache)


class Markov:
    """Corpus of rows from a random Markov chain of known entropy, to test models and bounds.

    The expected NELBO of any model is at least the entropy of the chain. The tokenizer must be
    "alphabet". The rows depend on the seed in [data] and not on the seed of the recipe, so that
    runs with different recipe seeds train on the same data.
    """

    class Config(ComponentConfig):
        alphabet: Annotated[int, Field(ge=4, le=16)] = 8
        """Number of symbols."""
        peakedness: Annotated[float, Field(ge=0.0, le=100.0)] = 2.0
        """Predictability of the next symbol; at 0 all symbols are equally likely."""
        rows: PositiveInt = 4096
        """Rows for training."""
        validation: PositiveInt = 512
        """Rows for validation."""
        seed: Seed = 0
        """Seed of the chain and its rows."""

    @classmethod
    def build(cls, config: Config, *, length: int, seed: int, cache: Cache | None) -> Documents:
        cls.preview(config, length=length)
        return cls.source(config).documents(
            rows=config.rows, validation=config.validation, length=length
        )

    @staticmethod
    def preview(config: Config, *, length: int) -> None:
        """Raise ArgumentError if all rows together have too many symbols.

        Each row has `length` symbols. All rows are kept in memory.
        """
        symbols = (config.rows + config.validation) * length
        if symbols > MOST_SYMBOLS:
            raise ArgumentError(
                f"[data] rows and validation must have at most {MOST_SYMBOLS:,} symbols together, "
                f"since all rows are kept in memory; got {config.rows} + {config.validation} rows "
                f"of length {length}, which are {symbols:,} symbols. Use fewer rows."
            )

    @staticmethod
    def source(config: Config) -> MarkovSource:
        """Return the Markov chain, whose `entropy_rate` and `row_entropy` are exact numbers."""
        from ddiff import MarkovSource

        return MarkovSource(config.alphabet, peakedness=config.peakedness, seed=config.seed)
