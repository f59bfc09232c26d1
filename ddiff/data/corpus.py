"""Corpora too large for memory, tokenized into shards or streamed.

The text of a sharded corpus is read and tokenized once. Training then reads only the shards. A
streamed corpus is tokenized during training. Both kinds of corpus read the texts in chunks: a
`Chunk` is a list of consecutive texts with a cursor, the position in the source after these texts.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, final

import fsspec

from ddiff.atomic import copy_atomic
from ddiff.data.cache import Cache, fingerprint
from ddiff.data.chat import ChatCorpus
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
    """Texts in a fixed order, and token shards of these texts. An alternative to `Documents`.

    Tokenizers are learned from the iterables `train["text"]` and `validation["text"]`.
    """

    train: Any
    validation: Any
    entropy_rate: float | None

    def shards(self, tokenizer: Tokenizer, cache: Cache) -> Shards:
        """Return the training and validation token shards, and build missing shards."""
        ...


def build_train_rows(
    documents: Documents | Corpus, tokenizer: Tokenizer, length: int, cache: Cache
) -> Rows:
    """Concatenate the training documents and cut the token stream into rows.

    Conversations are not cut.
    """
    if isinstance(documents, StreamedCorpus):
        return documents.train_rows(tokenizer, length, cache)
    if isinstance(documents, ChatCorpus):
        return documents.rows(TRAIN, tokenizer, length, cache)
    shards = load_or_build_shards(documents, tokenizer, cache)
    return pack_stream(shards.stream(TRAIN), tokenizer, length)


def build_validation_rows(
    documents: Documents | Corpus, tokenizer: Tokenizer, length: int, cache: Cache
) -> PackedRows:
    """Pack the validation documents into rows; each document starts a new row."""
    if isinstance(documents, ChatCorpus):
        return documents.rows(VALIDATION, tokenizer, length, cache)
    shards = load_or_build_shards(documents, tokenizer, cache)
    return pack_stream(shards.stream(VALIDATION), tokenizer, length, separate=True)


def check_repetitions(documents: Documents | Corpus, shards: Shards) -> None:
    """Raise DataError if all validation documents also occur in the training text.

    A warning is logged if only some validation documents occur in the training text, or if the
    training or the validation part contains many documents twice. Documents from a generated source
    with known entropy are not checked, because their rows may repeat by chance.
    """
    if documents.entropy_rate is None:
        source = documents if isinstance(documents, SourceCorpus) else "The corpus"
        check_overlap(shards.overlap, source)


def load_or_build_shards(
    documents: Documents | Corpus, tokenizer: Tokenizer, cache: Cache
) -> Shards:
    """Return the token shards of the training and validation parts, and build missing shards."""
    if not isinstance(documents, Documents):
        return documents.shards(tokenizer, cache)
    source = dict(zip(PARTS, documents.part_fingerprints))
    inputs = {**source, "tokenizer": tokenizer.fingerprint}

    def build(folder: Path) -> None:
        total = len(documents.train) + len(documents.validation)
        write_shards(
            folder, lambda _: _chunks_of_parts(documents), tokenizer, source=source, total=total
        )

    return read_shards(cache.load_or_build("tokens", inputs, build))


def _chunks_of_parts(documents: Documents) -> Iterator[Chunk]:
    yield from chunks_of(documents.train, TRAIN)
    yield from chunks_of(documents.validation, VALIDATION)


def copy_shards(made: Shards, path: str) -> None:
    """Copy the folder of the shards `made` to an fsspec path. The manifest is copied last.

    Raises DataError if the path holds other shards.
    """
    system, place = fsspec.url_to_fs(path.rstrip("/"))
    manifest = (made.folder / MANIFEST).read_bytes()
    if system.exists(f"{place}/{MANIFEST}"):
        if system.cat_file(f"{place}/{MANIFEST}") == manifest:
            return
        raise DataError(f"{path} holds other shards. Name another folder, or delete {path}.")
    names = made.files()
    for name in names:
        target = f"{place}/{name}"
        # A file of an interrupted copy is complete, since each is renamed when it is complete.
        # A file with another size is therefore a different file.
        if system.exists(target) and system.size(target) != (made.folder / name).stat().st_size:
            raise DataError(
                f"{path} holds another file named {name}, which would be overwritten. Name another "
                "folder, or move that file away."
            )
    system.makedirs(place, exist_ok=True)
    for name in (*names, MANIFEST):
        copy_atomic(made.folder / name, f"{place}/{name}", system)


@final
@dataclass(frozen=True)
class SourceCorpus:
    """Corpus of the texts of a source.

    Validation texts come from `validation_source`. Without a validation source, the hash of the
    text assigns a fraction `held_out` of the documents to the validation part.
    """

    source: TextSource
    validation_source: TextSource | None = None
    held_out: float = 0.005
    workers: int = 1
    entropy_rate: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        if self.validation_source is None and not 0 < self.held_out < 1:
            raise ArgumentError(
                f"held_out must lie in (0, 1); got {self.held_out}. Set held_out, or name "
                "validation texts."
            )
        if self.validation_source is not None:
            check_disjoint(self.source.paths, self.validation_source.paths)
            if self.source.identity == self.validation_source.identity:
                raise DataError(
                    f"{self.source} is named for training and for validation: the model would be "
                    "evaluated on its training text. Name another split or other files for "
                    "validation, or leave validation out, so that a fraction of the documents is "
                    "held out."
                )

    def __str__(self) -> str:
        return str(self.source)

    @property
    def train(self) -> CorpusPart:
        return CorpusPart(self, TRAIN)

    @property
    def validation(self) -> CorpusPart:
        return CorpusPart(self, VALIDATION)

    @cached_property
    def identity(self) -> dict[str, Any]:
        """Identity of the training and validation sources, as JSON."""
        if self.validation_source is None:
            return {"source": self.source.identity, "held_out": self.held_out}
        return {"source": self.source.identity, "validation": self.validation_source.identity}

    def shards(self, tokenizer: Tokenizer, cache: Cache) -> Shards:
        identity = {"source": self.identity, "tokenizer": tokenizer.fingerprint}
        # The shards are not an entry of the cache, because a large build must be resumed after a
        # kill and not discarded.
        made = self.write_shards(tokenizer, cache.root / "shards" / fingerprint(identity))
        made.check_modified()
        return made

    def write_shards(self, tokenizer: Tokenizer, folder: Path) -> Shards:
        """Tokenize the training and validation documents into a folder.

        Raises DataError if the training or the validation part has no text.
        """
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
        """Raise DataError if the shards `made` have no training or no validation text."""
        for part in (TRAIN, VALIDATION):
            if not made.records(part):
                raise DataError(
                    f"{self.source} has no text for the {part} part (held_out = {self.held_out}). "
                    "Set another held_out, or name validation texts."
                )

    def train_chunks(self, cursor: Any = None) -> Iterator[Chunk]:
        """Yield the chunks of the training source.

        The chunks also contain the documents that their hash assigns to the validation part.
        `cursor`: position in the source after which reading begins; None: the start of the source.
        """
        return self.source.chunks(cursor, part=None if self.validation_source is None else TRAIN)

    def sources(self) -> list[Iterator[Chunk]]:
        """Return one iterator of chunks per source.

        The first iterator reads the training source. If there is a validation source, a second
        iterator reads it.
        """
        if self.validation_source is None:
            return [self.train_chunks()]
        return [self.train_chunks(), self.validation_source.chunks(part=VALIDATION)]

    def chunks(self, cursor: Any = None) -> Iterator[Chunk]:
        """Yield the chunks of the training source, then those of the validation source.

        Reading begins after the position `cursor`, or at the start if `cursor` is None. With a
        validation source, a cursor is a pair: the part ("train" or "validation") and the position
        in the source of that part. Without a validation source, `Chunk.part` is None, and the hash
        of each text assigns the text to a part.
        """
        if self.validation_source is None:
            yield from self.source.chunks(cursor, part=None)
            return
        part, inner = cursor or (TRAIN, None)
        if part == TRAIN:
            for chunk in self.source.chunks(inner, part=TRAIN):
                yield Chunk(chunk.texts, [TRAIN, chunk.cursor], TRAIN)
            inner = None
        for chunk in self.validation_source.chunks(inner, part=VALIDATION):
            yield Chunk(chunk.texts, [VALIDATION, chunk.cursor], VALIDATION)

    def texts(self, part: str) -> Iterator[str]:
        """Read the texts of the part "train" or "validation" from the start of the source."""
        return self.select_texts(self.chunks(), part)

    def select_texts(self, chunks: Iterable[Chunk], part: str) -> Iterator[str]:
        """Yield the texts in `chunks` that belong to the part "train" or "validation"."""
        for chunk in chunks:
            for text in chunk.texts:
                if (chunk.part or self._part_by_hash(text)) == part:
                    yield text

    def _part_by_hash(self, text: str) -> str:
        return VALIDATION if hash_to_unit(text.encode()) < self.held_out else TRAIN


@final
class StreamedCorpus:
    """Corpus that is tokenized during training.

    Only the first `head` documents of the training source, and of the validation source if there is
    one, are stored as shards. Without a validation source, the validation part consists of the
    held-out documents among the first `head` documents. Token counts, clusters and learned
    tokenizers are computed only from the stored training documents. Rows are shuffled within blocks
    of `block` rows.
    """

    entropy_rate: float | None = None

    def __init__(self, corpus: SourceCorpus, *, head: int = 20_000, block: int = 4096) -> None:
        if head < 1:
            raise ArgumentError(f"head must be a number of documents, at least 1; got {head}.")
        self._corpus = corpus
        self._head = head
        self._block_rows = block
        self._monitor = OverlapMonitor(lambda: self.texts(VALIDATION), corpus)

    @property
    def identity(self) -> dict[str, Any]:
        return {**self._corpus.identity, "head": self._head}

    @property
    def train(self) -> CorpusPart:
        return CorpusPart(self, TRAIN)

    @property
    def validation(self) -> CorpusPart:
        return CorpusPart(self, VALIDATION)

    def shards(self, tokenizer: Tokenizer, cache: Cache) -> Shards:
        """Return the token shards of the first documents, and build missing shards.

        The argument `head` of the corpus is the number of these documents.
        """
        corpus = self._corpus
        inputs = {**self.identity, "tokenizer": tokenizer.fingerprint}

        def build(folder: Path) -> None:
            write_shards(
                folder,
                lambda _: self._head_chunks(),
                tokenizer,
                source=self.identity,
                held_out=corpus.held_out,
                workers=corpus.workers,
            )

        made = read_shards(cache.load_or_build("heads", inputs, build))
        corpus.check_parts(made)
        return made

    def train_rows(self, tokenizer: Tokenizer, length: int, cache: Cache) -> StreamedRows:
        """Return endless training rows, whose text is tokenized only when a row is read."""
        identity = [self.identity, tokenizer.fingerprint, length, self._block_rows]
        name = fingerprint(identity)
        head = self.shards(tokenizer, cache).stream(TRAIN)
        return StreamedRows(
            self._train_chunks,
            tokenizer,
            length,
            head=pack_stream(head, tokenizer, length),
            fingerprint=name,
            block=self._block_rows,
            held_out=self._corpus.held_out,
            workers=self._corpus.workers,
            cursors=cache.root / "streams" / f"{name}.jsonl",
        )

    def _train_chunks(self, cursor: Any = None) -> Iterator[Chunk]:
        chunks = self._corpus.train_chunks(cursor)
        if self._corpus.validation_source is None:
            # Equal documents have equal hashes, so no document can be in both parts.
            return chunks
        return self._monitor.watch(chunks)

    def texts(self, part: str) -> Iterator[str]:
        """Read the texts of the part "train" or "validation".

        Only the first documents of each source are read. The argument `head` of the corpus is their
        number.
        """
        return self._corpus.select_texts(self._head_chunks(), part)

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
class CorpusPart:
    """Training or validation part of a corpus, with one iterable column "text"."""

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
    """Corpus of existing token shards, without the text."""

    entropy_rate: float | None = None

    def __init__(self, path: str, cache: Cache | None = None) -> None:
        """Open a local folder of shards, or copy a remote folder (fsspec path) into the cache."""
        folder = _fetch_shards(path, cache) if "://" in path else Path(path)
        self._made = read_shards(folder)

    @property
    def train(self) -> PartWithoutTexts:
        return PartWithoutTexts(self._made.folder)

    validation = train

    def shards(self, tokenizer: Tokenizer, cache: Cache) -> Shards:
        self._made.check_tokenizer(tokenizer)
        self._made.check_modified()
        return self._made


@final
@dataclass(frozen=True)
class PartWithoutTexts:
    """Part of a corpus of which only the tokens are stored."""

    folder: Path
    column_names: tuple[str, ...] = ()

    @property
    def fingerprint(self) -> str:
        raise self._missing_error()

    def __getitem__(self, column: str) -> Iterator[str]:
        raise self._missing_error()

    def _missing_error(self) -> DataError:
        return DataError(
            f"{self.folder} holds token shards, but no text to learn a tokenizer from. Use the "
            'tokenizer of the shards: [tokenizer] kind = "saved", path = '
            f'"{self.folder / "tokenizer.json"}".'
        )


def _fetch_shards(path: str, cache: Cache | None) -> Path:
    """Copy a remote folder of shards into the cache, unless it was copied before."""
    try:
        system, place = fsspec.url_to_fs(path.rstrip("/"))
        manifest = system.cat_file(f"{place}/{MANIFEST}")
        manifest.decode()
    except (OSError, ValueError, ImportError) as error:
        raise DataError(
            f"{path} cannot be read as a folder of token shards: {error}. Name the folder that "
            f"contains {MANIFEST}."
        ) from error

    def fetch(folder: Path) -> None:
        (folder / MANIFEST).write_bytes(manifest)
        # The manifest is read first, because this checks that no file name leads out of the folder.
        shards = read_shards(folder, name=path)
        for record in shards.all_records():
            for file, sha256 in shards.checksums(record):
                _fetch_file(system, f"{place}/{file.name}", file, sha256, path)
        for name in shards.files_without_checksum():
            _fetch_file(system, f"{place}/{name}", folder / name, None, path)
        shards.verify()

    cache = cache or Cache()
    inputs = {"manifest": fingerprint(manifest.decode())}
    return cache.load_or_build("fetched", inputs, fetch)


def _fetch_file(system: Any, place: str, file: Path, sha256: str | None, source: str) -> None:
    """Download a file and compare its SHA-256 with the manifest.

    A file with a wrong checksum is downloaded once more. Raises DataError if the second checksum is
    wrong too.

    Args:
        system: fsspec file system of the remote folder.
        place: path of the file in this file system.
        file: local path to which the file is written.
        sha256: SHA-256 in the manifest; None: the checksum is not compared.
        source: name of the remote folder in messages.
    """
    for _ in range(2):
        try:
            system.get_file(place, str(file))
        except OSError as error:
            if error.errno in DISK_FULL:
                raise
            raise DataError(
                f"{source}: the file {file.name} of its {MANIFEST} cannot be downloaded ({error}). "
                "Copy the folder again from the machine that made the shards."
            ) from error
        if sha256 is None or file_sha256(file) == sha256:
            return
    raise DataError(
        f"{source}: {file.name} is damaged: after two downloads its SHA-256 still differs from "
        f"that in {MANIFEST}. Copy the folder again from the machine that made the shards."
    )
