"""Read documents from the bundled novels and from text files.

Each reader defines the unit of a document: a chapter, a file, a paragraph or a line. The unit
matters, because evaluation computes confidence intervals over documents.
"""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from typing import Any

import pyarrow as pa
from datasets import Dataset, Value

from ddiff.data.arrow import load_or_build_table
from ddiff.data.cache import Cache
from ddiff.data.compression import open_uncompressed
from ddiff.data.paths import base_name, find_train_and_validation, open_file, printable
from ddiff.data.text import RULES, Split, check_text, text_documents
from ddiff.data.tokenizer_workers import hash_to_unit
from ddiff.errors import ArgumentError, DataError
from ddiff.progress import show_progress

_SCHEMA = pa.schema([("text", pa.large_string()), ("name", pa.string())])
_HELD_OUT_NOVEL = "persuasion"
_CHAPTER = re.compile(r"(?m)^(?:VOLUME [IVX]+\n+)?(?:CHAPTER|Chapter) [0-9IVXL]+$")
_SMALLER_DOCUMENTS = {
    "by file": ', or choose smaller documents (split = "paragraph" or "line")',
    "by paragraph": ', or choose smaller documents (split = "line")',
}


@dataclass(frozen=True)
class Documents:
    """Training and validation documents, each a `datasets.Dataset` with columns "text" and "name".

    `entropy_rate` is the true entropy in nats per symbol for a generated source, and None for all
    other documents. `own_vectors` are the columns of vectors that are computed from the text, as
    embeddings are: a text given such a vector has no likelihood. `fill` is the symbol with which
    shorter texts were filled up to rows of one length, and None if there is no such symbol.
    `author` is the author of all documents, if there is only one: a title for tables with quoted
    words. Raises DataError if the training or validation part is empty, has no column "text", or
    holds values that are not text.
    """

    train: Dataset
    validation: Dataset
    entropy_rate: float | None = None
    own_vectors: tuple[str, ...] = ()
    fill: str | None = None
    author: str | None = None

    def __post_init__(self) -> None:
        _check_part(self.train, "train")
        _check_part(self.validation, "validation")

    @cached_property
    def part_fingerprints(self) -> tuple[str, str]:
        """Fingerprints of the training documents and of the validation documents."""
        return fingerprint_texts(self.train), fingerprint_texts(self.validation)

    @cached_property
    def fingerprint(self) -> str:
        """Fingerprint of the training and validation documents together."""
        return hashlib.sha256("".join(self.part_fingerprints).encode()).hexdigest()[:32]


def fingerprint_texts(documents: Any) -> str:
    """Return a SHA-256 of the texts and their boundaries, as 32 hexadecimal digits.

    `documents` is a `datasets.Dataset`, or the training or validation part of a corpus. For a part
    of a corpus, no text is read, and the attribute `fingerprint` of the part is returned.
    """
    if not isinstance(documents, Dataset):
        return documents.fingerprint
    digest = hashlib.sha256()
    for batch in documents.select_columns("text").iter(256):
        for text in batch["text"]:
            content = text.encode()
            # The length of each text is hashed before the text, so that moving a boundary changes
            # the digest.
            digest.update(len(content).to_bytes(8, "little"))
            digest.update(content)
    return digest.hexdigest()[:32]


def documents_from_texts(texts: Iterable[str], names: Iterable[str] | None = None) -> Dataset:
    """Build a data set of documents in memory, with the columns "text" and "name".

    By default the names are "text 0", "text 1" and so on. Raises DataError for a value that is not
    text, or that contains NUL or a lone surrogate.
    """
    texts = list(texts)
    if names is None:
        names = [f"text {number}" for number in range(len(texts))]
    names = list(names)
    checked = [check_text(text, name) for text, name in zip(texts, names)]
    return Dataset.from_dict({"text": checked, "name": names})


def load_bundled_novels() -> Documents:
    """Load Jane Austen's six novels, one document per chapter.

    Five novels (245 chapters) are the training part, Persuasion (24 chapters) is the validation
    part.
    """
    train: list[tuple[str, str]] = []
    validation: list[tuple[str, str]] = []
    folder = files("ddiff.data").joinpath("novels")
    for file in sorted(folder.iterdir(), key=lambda file: file.name):
        if not file.name.endswith(".txt.xz"):
            continue
        title = file.name.removesuffix(".txt.xz")
        part = validation if title == _HELD_OUT_NOVEL else train
        for number, text in enumerate(_split_chapters(file.read_bytes()), start=1):
            part.append((text, f"{title} {number}"))
    return Documents(
        documents_from_texts(*zip(*train)),
        documents_from_texts(*zip(*validation)),
        author="Austen",
    )


def read_text_files(
    train: Sequence[str],
    *,
    validation: Sequence[str] = (),
    held_out: float = 0.05,
    split: Split = "file",
    cache: Cache | None = None,
) -> Documents:
    """Read UTF-8 text files, given by fsspec paths or globs.

    Args:
        train: files of the training documents. A file that matches two patterns is read once.
        validation: files of the validation documents. Without validation files, a fraction
            `held_out` of the documents, chosen by the hash of the text, is the validation part.
            Equal documents are therefore in the same part, and adding files moves no document to
            the other part.
        held_out: fraction in (0,1), used only without validation files.
        split: unit of a document: "file", "paragraph" (separated by blank lines) or "line"
            (`ddiff.data.text` defines line ends). Blank documents are left out.
        cache: cache of the documents. None: the documents are kept in memory.

    Raises DataError for a file that is missing, empty, compressed, not UTF-8 or contains NUL, and
    for a file that is named both for training and for validation.
    """
    if not validation and not 0 < held_out < 1:
        raise ArgumentError(
            f"read_text_files: held_out must lie in (0, 1); got {held_out}. Set held_out, or "
            "name validation files."
        )
    paths, validation_paths = find_train_and_validation(train, validation)
    corpus = _read(paths, split, cache)
    if validation_paths:
        return Documents(corpus, _read(validation_paths, split, cache))
    return split_documents(corpus, held_out, f"by {split}")


def split_documents(
    corpus: Dataset, held_out: float, kind: str, items: str = "document(s)"
) -> Documents:
    """Hold out a fraction `held_out` of the documents, chosen by the hash of the text.

    `items` and `kind` name the documents in error messages: "document(s)" "by line". Raises
    DataError if the training or the validation part is empty.
    """
    train: list[int] = []
    validation: list[int] = []
    for number, text in enumerate(corpus["text"]):
        part = validation if hash_to_unit(text.encode()) < held_out else train
        part.append(number)
    if not train or not validation:
        counted = " ".join([str(len(corpus)), items, kind]).strip()
        raise DataError(
            f"{counted} cannot be divided with held_out = {held_out}: {len(train)} for training "
            f"and {len(validation)} for validation. Name validation files"
            f"{_SMALLER_DOCUMENTS.get(kind, '')}"
            f"{', or choose another held_out' if len(corpus) > 1 else ''}."
        )
    return Documents(corpus.select(train), corpus.select(validation))


def _split_chapters(compressed: bytes) -> list[str]:
    """Split the compressed text of a novel before each chapter heading.

    The front matter and the heading of a volume belong to the chapter that follows them.
    """
    text = lzma.decompress(compressed).decode()
    headings = [heading.start() for heading in _CHAPTER.finditer(text)]
    # The text before the first heading belongs to the first chapter.
    cuts = [0, *headings[1:], len(text)]
    return [text[start:stop].strip() for start, stop in pairwise(cuts)]


def _check_part(part: Dataset, name: str) -> None:
    if "text" not in part.column_names:
        raise DataError(
            f'Documents: {name} must have a column "text"; its columns are '
            f"{part.column_names}. Rename the column with the text."
        )
    if part.features["text"] not in (Value("string"), Value("large_string")):
        raise DataError(
            f'Documents: the column "text" of {name} must hold strings; it holds '
            f"{part.features['text']}. Convert numbers to text, and remove missing "
            "values."
        )
    if len(part) == 0:
        raise DataError(f"Documents: {name} is empty. Give at least one document.")
    if part.data.column("text").null_count:
        raise DataError(
            f'Documents: the column "text" of {name} has missing values (None or NaN). Remove '
            "the rows without text."
        )


def _read(paths: Sequence[str], split: Split, cache: Cache | None) -> Dataset:
    """Read the documents of all files.

    `split` says whether a document is a file, a paragraph or a line. The result is memory-mapped
    from `cache`. If `cache` is None, the result is in memory.
    """
    return read_corpus(
        paths,
        _SCHEMA,
        lambda: _batches(paths, split),
        kind="documents",
        settings={"split": split},
        cache=cache,
    )


def read_corpus(
    paths: Sequence[str],
    schema: pa.Schema,
    make_batches: Callable[[], Iterable[pa.RecordBatch]],
    *,
    kind: str,
    settings: Mapping[str, Any],
    cache: Cache | None,
    content: str = "text",
) -> Dataset:
    """Read the table of documents in files, memory-mapped from `cache`, or in memory without one.

    Args:
        paths: the files.
        schema: columns of the table.
        make_batches: reads the files.
        kind: kind of the cache entry.
        settings: further inputs of the cache entry, on which the batches depend.
        cache: cache of the table; None: the result is in memory.
        content: name of the content of the files in the message about empty files.

    Raises DataError if the files have no document.
    """

    def make_inputs() -> Mapping[str, Any]:
        contents = [[base_name(path), file_fingerprint(path)] for path in paths]
        return {"files": contents, **settings, "rules": RULES}

    corpus = load_or_build_table(
        schema, make_batches, kind=kind, make_inputs=make_inputs, cache=cache
    )
    _check_not_empty(corpus, paths, content)
    return corpus


def _check_not_empty(corpus: Dataset, paths: Sequence[str], content: str) -> None:
    """Raise DataError if no document was read from `paths`."""
    if not len(corpus):
        listed = ", ".join(printable(path) for path in paths[:5])
        if len(paths) > 5:
            listed += ", ..."
        raise DataError(
            f"The corpus is empty: {listed} holds no {content}. Name files that contain {content}."
        )


def file_fingerprint(path: str) -> str:
    """Return the SHA-256 of the file at `path`, a local or fsspec path."""
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _batches(paths: Sequence[str], split: Split) -> Iterator[pa.RecordBatch]:
    with show_progress(len(paths), "reading text") as bar:
        for path in paths:
            texts, names = _read_file(path, split)
            # large_string has 64-bit offsets: the text of one file may exceed 2 GiB.
            text_column = pa.array(texts, pa.large_string())
            name_column = pa.array(names, pa.string())
            yield pa.RecordBatch.from_arrays([text_column, name_column], schema=_SCHEMA)
            bar.advance(1)


def _read_file(path: str, split: Split) -> tuple[list[str], list[str]]:
    """Return the non-blank documents of one file, and their names.

    `split` says whether a document is a file, a paragraph or a line.
    """
    name = base_name(path)
    texts = []
    names = []
    with open_uncompressed(path) as file:
        for number, text in text_documents(file, printable(path), split):
            texts.append(text)
            names.append(name if split == "file" else f"{name} {split} {number}")
    return texts, names
