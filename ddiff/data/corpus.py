"""A corpus too large to hold: read once, while it is tokenized into shards, and known by its shards afterwards."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, final

import fsspec
from datasets import Dataset

from ddiff.atomic import copy_atomic
from ddiff.data.cache import Cache, fingerprint
from ddiff.data.documents import Documents
from ddiff.data.overlap import OverlapMonitor, check_overlap
from ddiff.data.packing import PackedRows, Rows, chunks_of, pack_stream
from ddiff.data.paths import check_disjoint
from ddiff.data.shards import MANIFEST, PARTS, Shards, file_sha256, read_shards, write_shards
from ddiff.data.sources import TextSource
from ddiff.data.streaming import StreamedRows
from ddiff.data.tokenizer import Tokenizer
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION, Chunk, hash_to_unit
from ddiff.errors import DISK_FULL, ArgumentError, DataError


class Corpus(Protocol):
    """What a dataset component may give instead of `Documents`: texts that are read in order, and shards of their tokens.

    `train["text"]` and `validation["text"]` iterate over texts, for tokenizers that are learned.
    """

    train: Any
    validation: Any
    entropy_rate: float | None

    def shards(self, tokenizer: Tokenizer, cache: Cache) -> Shards:
        """Both parts tokenized, now or earlier."""
        ...


def build_train_rows(
    documents: Documents | Corpus, tokenizer: Tokenizer, length: int, cache: Cache
) -> Rows:
    """Rows of joined documents, to train on."""
    if isinstance(documents, StreamedCorpus):
        return documents.train_rows(tokenizer, length, cache)
    return pack_stream(
        load_or_build_shards(documents, tokenizer, cache).stream(TRAIN), tokenizer, length
    )


def build_validation_rows(
    documents: Documents | Corpus, tokenizer: Tokenizer, length: int, cache: Cache
) -> PackedRows:
    """Rows that begin anew with every document, to evaluate on."""
    return pack_stream(
        load_or_build_shards(documents, tokenizer, cache).stream(VALIDATION),
        tokenizer,
        length,
        separate=True,
    )


def check_repetitions(documents: Documents | Corpus, made: Shards) -> None:
    """Raise DataError if all validation documents are in the training text; warn of some, and of many that occur twice.

    Rows of a generated source, whose entropy is known, may repeat each other by chance, and are not looked at.
    """
    if documents.entropy_rate is None:
        check_overlap(
            made.overlap, documents if isinstance(documents, SourceCorpus) else "The corpus"
        )


def load_or_build_shards(
    documents: Documents | Corpus, tokenizer: Tokenizer, cache: Cache
) -> Shards:
    """Both parts tokenized, now or earlier."""
    if not isinstance(documents, Documents):
        return documents.shards(tokenizer, cache)
    parts = {TRAIN: documents.train, VALIDATION: documents.validation}
    source = dict(zip(parts, documents.part_fingerprints))

    def build(folder: Path) -> None:
        total = len(documents.train) + len(documents.validation)
        write_shards(
            folder, lambda _: _chunks_of_parts(parts), tokenizer, source=source, total=total
        )

    return read_shards(
        cache.load_or_build("tokens", {**source, "tokenizer": tokenizer.fingerprint}, build)
    )


def copy_shards(made: Shards, path: str) -> None:
    """Copy a folder of shards to any fsspec path, the manifest last; DataError when other shards stand there."""
    system, place = fsspec.url_to_fs(path.rstrip("/"))
    manifest = (made.folder / MANIFEST).read_bytes()
    if system.exists(f"{place}/{MANIFEST}"):
        if system.cat_file(f"{place}/{MANIFEST}") == manifest:
            return
        raise DataError(f"{path} holds other shards. Name another folder, or delete that one.")
    files = made.files()
    for name in files:
        # of a copy that was cut short, files are whole: each is renamed when it is
        if (
            system.exists(f"{place}/{name}")
            and system.size(f"{place}/{name}") != (made.folder / name).stat().st_size
        ):
            raise DataError(
                f"{path} holds a file {name} of another kind, which would be written over. Name another folder, or move "
                "that file away."
            )
    system.makedirs(place, exist_ok=True)
    for name in (*files, MANIFEST):
        copy_atomic(made.folder / name, f"{place}/{name}", system)


def _chunks_of_parts(parts: Mapping[str, Dataset]) -> Iterator[Chunk]:
    for part, documents in parts.items():
        yield from chunks_of(documents, part)


@final
@dataclass(frozen=True)
class SourceCorpus:
    """Texts of a source, those of another one (or a share `held_out` of them by hash) for validation."""

    source: TextSource
    validation_source: TextSource | None = None
    held_out: float = 0.005
    workers: int = 1
    entropy_rate: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.validation_source is None and not 0 < self.held_out < 1:
            raise ArgumentError(
                f"held_out must lie in (0, 1); got {self.held_out}. Or name validation texts."
            )
        if self.validation_source is not None:
            check_disjoint(self.source.paths, self.validation_source.paths)
            if self.source.identity == self.validation_source.identity:
                raise DataError(
                    f"{self.source} is named for training and for validation: the model would be evaluated on text that it "
                    "was trained on. Name another split or other files, or no validation texts: then a share is held out."
                )

    def __str__(self) -> str:
        return str(self.source)

    @property
    def train(self) -> TextsOf:
        return TextsOf(self, TRAIN)

    @property
    def validation(self) -> TextsOf:
        return TextsOf(self, VALIDATION)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What the texts are read from, and which of them are held out."""
        if self.validation_source is None:
            return {"source": self.source.identity, "held_out": self.held_out}
        return {"source": self.source.identity, "validation": self.validation_source.identity}

    def shards(self, tokenizer: Tokenizer, cache: Cache) -> Shards:
        identity = {"source": self.identity, "tokenizer": tokenizer.fingerprint}
        made = self.write_shards(tokenizer, cache.root / "shards" / fingerprint(identity))
        made.check_touched()
        return made

    def write_shards(self, tokenizer: Tokenizer, folder: Path) -> Shards:
        """Both parts tokenized into a folder, going on with what stands there; DataError when one has no text."""
        made = write_shards(
            folder,
            self.chunks,
            tokenizer,
            source=self.identity,
            held_out=self.held_out,
            workers=self.workers,
        )
        self.check_parts(made)
        return made

    def check_parts(self, made: Shards) -> None:
        """DataError when a part has no text."""
        for part in (TRAIN, VALIDATION):
            if not made.records(part):
                raise DataError(
                    f"{self.source} gave no text for {part} (held_out = {self.held_out}). Take another share, or name "
                    "validation texts."
                )

    def train_chunks(self, cursor: Any = None) -> Iterator[Chunk]:
        """The chunks of the source to train on; where no other is for validation, with what is held out."""
        return self.source.chunks(cursor, part=None if self.validation_source is None else TRAIN)

    def sources(self) -> list[Iterator[Chunk]]:
        """The chunks of each source, from its start."""
        if self.validation_source is None:
            return [self.train_chunks()]
        return [self.train_chunks(), self.validation_source.chunks(part=VALIDATION)]

    def chunks(self, cursor: Any = None) -> Iterator[Chunk]:
        """All texts in order: those to train on, then those of the validation source; or undecided, where there is none."""
        if self.validation_source is None:
            yield from self.source.chunks(cursor, part=None)
            return
        part, within = cursor or (TRAIN, None)
        if part == TRAIN:
            for chunk in self.source.chunks(within, part=TRAIN):
                yield Chunk(chunk.texts, [TRAIN, chunk.cursor], TRAIN)
        for chunk in self.validation_source.chunks(
            within if part == VALIDATION else None, part=VALIDATION
        ):
            yield Chunk(chunk.texts, [VALIDATION, chunk.cursor], VALIDATION)

    def texts(self, part: str) -> Iterator[str]:
        """The texts of a part, read anew."""
        return self.texts_of(self.chunks(), part)

    def texts_of(self, chunks: Iterable[Chunk], part: str) -> Iterator[str]:
        """Those texts of some chunks that belong to a part."""
        for chunk in chunks:
            for text in chunk.texts:
                decided = chunk.part or (
                    VALIDATION if hash_to_unit(text.encode()) < self.held_out else TRAIN
                )
                if decided == part:
                    yield text


@final
class StreamedCorpus:
    """A corpus that is tokenized while it is trained on.

    Only its `head` is kept, the first so many documents (of the validation source too, if there is one): what is held out
    of them is evaluated on, and counts, clusters and learned tokenizers come from the others. `block` rows at a time are
    shuffled.
    """

    entropy_rate: float | None = None

    def __init__(self, corpus: SourceCorpus, *, head: int = 20_000, block: int = 4096) -> None:
        if head < 1:
            raise ArgumentError(f"head must be at least 1 document; got {head}.")
        self._corpus, self._head, self._block_rows = corpus, head, block
        self._monitor = OverlapMonitor(lambda: self.texts(VALIDATION), corpus)

    @property
    def identity(self) -> dict[str, Any]:
        return {**self._corpus.identity, "head": self._head}

    @property
    def train(self) -> TextsOf:
        return TextsOf(self, TRAIN)

    @property
    def validation(self) -> TextsOf:
        return TextsOf(self, VALIDATION)

    def shards(self, tokenizer: Tokenizer, cache: Cache) -> Shards:
        """Of the head."""
        corpus = self._corpus
        known_by = {**self.identity, "tokenizer": tokenizer.fingerprint}

        def build(folder: Path) -> None:
            write_shards(
                folder,
                lambda _: self._head_chunks(),
                tokenizer,
                source=self.identity,
                held_out=corpus.held_out,
                workers=corpus.workers,
            )

        made = read_shards(cache.load_or_build("heads", known_by, build))
        corpus.check_parts(made)
        return made

    def train_rows(self, tokenizer: Tokenizer, length: int, cache: Cache) -> StreamedRows:
        corpus = self._corpus
        known_by = fingerprint([self.identity, tokenizer.fingerprint, length, self._block_rows])
        head = pack_stream(self.shards(tokenizer, cache).stream(TRAIN), tokenizer, length)
        return StreamedRows(
            self._train_chunks,
            tokenizer,
            length,
            head=head,
            known_by=known_by,
            block=self._block_rows,
            held_out=corpus.held_out,
            workers=corpus.workers,
            cursors=cache.root / "streams" / f"{known_by}.jsonl",
        )

    def _train_chunks(self, cursor: Any = None) -> Iterator[Chunk]:
        chunks = self._corpus.train_chunks(cursor)
        # what is held out by hash is on one side only; another source may hold what is trained on
        return chunks if self._corpus.validation_source is None else self._monitor.watch(chunks)

    def texts(self, part: str) -> Iterator[str]:
        """The texts of a part of the head, read anew."""
        return self._corpus.texts_of(self._head_chunks(), part)

    def _head_chunks(self) -> Iterator[Chunk]:
        sizes = {TRAIN: 0, VALIDATION: 0}
        for chunks in self._corpus.sources():
            for chunk in chunks:
                part = chunk.part or TRAIN
                yield Chunk(chunk.texts[: self._head - sizes[part]], None, chunk.part)
                sizes[part] += len(chunk.texts)
                if sizes[part] >= self._head:
                    break


@final
@dataclass(frozen=True)
class TextsOf:
    """A part of a corpus, of which the one column `text` can be iterated over, and known by its source."""

    corpus: SourceCorpus | StreamedCorpus
    part: str
    column_names: tuple[str, ...] = ("text",)

    @property
    def fingerprint(self) -> str:
        return fingerprint([self.corpus.identity, self.part])

    def __getitem__(self, column: str) -> Iterator[str]:
        assert column == "text"
        return self.corpus.texts(self.part)


@final
class ShardedCorpus:
    """Shards that were made earlier, here or on another machine; their text is not there."""

    entropy_rate: float | None = None

    def __init__(self, path: str, cache: Cache | None = None) -> None:
        """A folder by local path, or by fsspec path: then it is fetched into the cache once."""
        self._made = read_shards(_fetched(path, cache) if "://" in path else Path(path))

    @property
    def train(self) -> NoTexts:
        return NoTexts(self._made.folder)

    validation = train

    def shards(self, tokenizer: Tokenizer, cache: Cache) -> Shards:
        self._made.check_tokenizer(tokenizer)
        self._made.check_touched()
        return self._made


@final
@dataclass(frozen=True)
class NoTexts:
    """A part of which there are tokens alone."""

    folder: Path
    column_names: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        raise self._missing()

    def __getitem__(self, column: str) -> Iterator[str]:
        raise self._missing()

    def _missing(self) -> DataError:
        return DataError(
            f"{self.folder} holds tokens and no text to learn a tokenizer from. Take the one that they were made with: "
            f'[tokenizer] kind = "saved", path = "{self.folder / "tokenizer.json"}".'
        )


def _fetched(path: str, cache: Cache | None) -> Path:
    """A local copy of a folder of shards, made once for each content of its manifest."""
    try:
        system, place = fsspec.url_to_fs(path.rstrip("/"))
        manifest = system.cat_file(f"{place}/{MANIFEST}")
        manifest.decode()
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{path} cannot be read as a folder of token shards: {error}. Give the folder that has {MANIFEST}."
        ) from error

    def fetch(folder: Path) -> None:
        (folder / MANIFEST).write_bytes(manifest)
        found = read_shards(
            folder, name=path
        )  # with names that stay in the folder, or nothing is fetched
        for record in (record for part in PARTS for record in found.records(part)):
            for file, due in found.sealed(record):
                _fetch(system, f"{place}/{file.name}", file, due, path)
        for name in found.unsealed():
            _fetch(system, f"{place}/{name}", folder / name, None, path)
        found.verify()

    return (cache or Cache()).load_or_build(
        "fetched", {"manifest": fingerprint(manifest.decode())}, fetch
    )


def _fetch(system: Any, place: str, file: Path, sha256: str | None, source: str) -> None:
    """Fetch a file; DataError when it is not the one that the manifest was made with, at the second try neither."""
    for _ in range(2):
        try:
            system.get_file(place, str(file))
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise DataError(
                f"{source}: {file.name}, which its {MANIFEST} names, cannot be fetched ({error}). Copy the folder there "
                "again from where the shards were made."
            ) from error
        if sha256 is None or file_sha256(file) == sha256:
            return
    raise DataError(
        f"{source}: {file.name} is damaged: fetched twice, its SHA-256 is not the one that {MANIFEST} has. Copy the folder "
        "there again from where the shards were made."
    )
