"""Corpora as documents: the bundled novels, text files, rows of symbols.

Documents are what evaluation intervals are over, so a reader says what a document is: a chapter, a file, a paragraph, a
line.
"""

from __future__ import annotations

import hashlib
import lzma
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from typing import Any

import pyarrow as pa
from datasets import Dataset, Value

from ddiff.data.arrow import read_table, table_in_memory, write_table
from ddiff.data.cache import Cache
from ddiff.data.compression import open_uncompressed
from ddiff.data.paths import base_name, find_train_and_validation, open_file, printable
from ddiff.data.text import RULES, Split, check_text, text_documents
from ddiff.data.tokenizer_workers import hash_to_unit
from ddiff.errors import ArgumentError, DataError
from ddiff.progress import progress

_SCHEMA = pa.schema([("text", pa.large_string()), ("name", pa.string())])
_HELD_OUT_NOVEL = "persuasion"
_CHAPTER = re.compile(r"(?m)^(?:VOLUME [IVX]+\n+)?(?:CHAPTER|Chapter) [0-9IVXL]+$")


@dataclass(frozen=True)
class Documents:
    """A corpus: training and validation documents, each a `datasets.Dataset` with columns "text" and "name".

    `entropy_rate` is the true entropy of the source in nats per symbol where it is known (generated sources). DataError
    when a part is empty, has no column "text", or holds something that is not text.
    """

    train: Dataset
    validation: Dataset
    entropy_rate: float | None = None

    def __post_init__(self) -> None:
        _check_part(self.train, "train")
        _check_part(self.validation, "validation")

    @cached_property
    def part_fingerprints(self) -> tuple[str, str]:
        """Of the text of each part."""
        return fingerprint_texts(self.train), fingerprint_texts(self.validation)

    @cached_property
    def fingerprint(self) -> str:
        """Of the text of both parts."""
        return hashlib.sha256("".join(self.part_fingerprints).encode()).hexdigest()[:32]


def fingerprint_texts(documents: Any) -> str:
    """32 hexadecimal digits of the SHA-256 of the documents' text, their boundaries included; of a part of a corpus that is
    not held, its own fingerprint."""
    if not isinstance(documents, Dataset):
        return documents.fingerprint
    digest = hashlib.sha256()
    for batch in documents.select_columns("text").iter(256):
        for text in batch["text"]:
            content = text.encode()
            digest.update(len(content).to_bytes(8, "little") + content)
    return digest.hexdigest()[:32]


def documents_from_texts(texts: Iterable[str], names: Iterable[str] | None = None) -> Dataset:
    """Documents held in memory; DataError for content that is not text or holds NUL."""
    texts = list(texts)
    names = [f"text {number}" for number in range(len(texts))] if names is None else list(names)
    checked = [check_text(text, name) for text, name in zip(texts, names)]
    return Dataset.from_dict({"text": checked, "name": names})


def load_bundled_novels() -> Documents:
    """Jane Austen's six novels by chapter: five for training (245 chapters), Persuasion (24) for validation."""
    train: list[tuple[str, str]] = []
    validation: list[tuple[str, str]] = []
    for file in sorted(
        files("ddiff.data").joinpath("novels").iterdir(), key=lambda file: file.name
    ):
        if file.name.endswith(".txt.xz"):
            title = file.name.removesuffix(".txt.xz")
            part = validation if title == _HELD_OUT_NOVEL else train
            part += [
                (text, f"{title} {number}")
                for number, text in enumerate(_chapters(file.read_bytes()), start=1)
            ]
    return Documents(*(documents_from_texts(*zip(*part)) for part in (train, validation)))


def read_text_files(
    train: Sequence[str],
    *,
    validation: Sequence[str] = (),
    held_out: float = 0.05,
    split: Split = "file",
    cache: Cache | None = None,
) -> Documents:
    """Read UTF-8 text files by fsspec path or glob; a document is a file, a paragraph (blank lines between) or a line.

    Without validation files each document is held out with probability `held_out` in (0,1) by the hash of its text, so
    equal documents fall on the same side and adding files moves none. Blank documents are left out; `ddiff.data.text` has
    the rule for line ends. A file that two patterns name is read once. DataError for files that are missing, empty,
    packed, not UTF-8 or that hold NUL, and for one that is named for training and for validation.
    """
    if not validation and not 0 < held_out < 1:
        raise ArgumentError(
            f"read_text_files: held_out must lie in (0, 1); got {held_out}. Or name validation files."
        )
    paths, validation_paths = find_train_and_validation(train, validation)
    corpus = _read(paths, split, cache)
    if validation_paths:
        return Documents(corpus, _read(validation_paths, split, cache))
    return divided(corpus, held_out, f"by {split}")


def divided(corpus: Dataset, held_out: float, kind: str) -> Documents:
    """Each document held out with probability `held_out` by the hash of its text; DataError when a part stays empty."""
    train, validation = _held_out(corpus, held_out)
    if not train or not validation:
        raise DataError(
            f"{len(corpus)} document(s) {kind} cannot be divided with held_out = {held_out}: {len(train)} for training "
            f"and {len(validation)} for validation. Name validation files, or choose {_SMALLER.get(kind, '')}another share."
        )
    return Documents(corpus.select(train), corpus.select(validation))


_SMALLER = {
    "by file": 'smaller documents (split = "paragraph" or "line"), or ',
    "by paragraph": 'smaller documents (split = "line"), or ',
}


def read_symbol_rows(
    train: Sequence[str],
    *,
    length: int,
    validation: Sequence[str] = (),
    held_out: float = 0.05,
    cache: Cache | None = None,
) -> Documents:
    """Text files of fixed-length rows of symbols, one per line, such as aligned DNA; blank lines are no rows.

    DataError names the file and line of a row that has not `length` symbols. See `read_text_files` for the rest.
    """
    documents = read_text_files(
        train, validation=validation, held_out=held_out, split="line", cache=cache
    )
    for part in (documents.train, documents.validation):
        for row in part:
            if len(row["text"]) != length:
                raise DataError(
                    f"read_symbol_rows: {row['name']} has {len(row['text'])} symbols, but every row must have "
                    f"length = {length}. Mend the file, or set [data] length to the length of its rows."
                )
    return documents


def _chapters(compressed: bytes) -> list[str]:
    """A novel cut before each chapter heading; a volume's heading and the front matter go with the chapter that follows."""
    text = lzma.decompress(compressed).decode()
    cuts = [0, *[heading.start() for heading in _CHAPTER.finditer(text)][1:], len(text)]
    return [text[start:stop].strip() for start, stop in pairwise(cuts)]


def _check_part(part: Dataset, name: str) -> None:
    if "text" not in part.column_names:
        raise DataError(
            f'Documents: {name} must have a column "text"; it has {part.column_names}. Rename the column.'
        )
    if part.features["text"] not in (Value("string"), Value("large_string")):
        raise DataError(
            f'Documents: the column "text" of {name} must hold strings; it holds {part.features["text"]}. '
            "Numbers and NaN are not text: convert or drop them."
        )
    if len(part) == 0:
        raise DataError(f"Documents: {name} is empty. A corpus needs at least one document there.")
    if part.data.column("text").null_count:
        raise DataError(
            f'Documents: the column "text" of {name} has missing values (None or NaN). Drop those rows.'
        )


def _held_out(corpus: Dataset, share: float) -> tuple[list[int], list[int]]:
    train: list[int] = []
    validation: list[int] = []
    for number, text in enumerate(corpus["text"]):
        (validation if hash_to_unit(text.encode()) < share else train).append(number)
    return train, validation


def _read(paths: Sequence[str], split: Split, cache: Cache | None) -> Dataset:
    """The documents of all files, memory-mapped from the cache when there is one."""
    if cache is None:
        corpus = table_in_memory(_SCHEMA, _batches(paths, split))
    else:
        files = [[base_name(path), file_fingerprint(path)] for path in paths]
        inputs = {"files": files, "split": split, "rules": RULES}
        entry = cache.load_or_build("documents", inputs, lambda place: _write(paths, split, place))
        corpus = read_table(entry / "documents.arrow")
    check_any(corpus, paths)
    return corpus


def check_any(corpus: Dataset, paths: Sequence[str]) -> None:
    """DataError if no document was read."""
    if not len(corpus):
        listed = ", ".join(printable(path) for path in paths[:5]) + (
            ", ..." if len(paths) > 5 else ""
        )
        raise DataError(
            f"The corpus is empty: {listed} holds no text. Name files with text in them."
        )


def _write(paths: Sequence[str], split: Split, place: Path) -> None:
    write_table(_SCHEMA, _batches(paths, split), place / "documents.arrow")


def file_fingerprint(path: str) -> str:
    digest = hashlib.sha256()
    with open_file(path) as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()


def _batches(paths: Sequence[str], split: Split) -> Iterator[pa.RecordBatch]:
    with progress(len(paths), "reading text") as bar:
        for path in paths:
            texts, names = _file_documents(path, split)
            columns = [pa.array(texts, pa.large_string()), pa.array(names, pa.string())]
            yield pa.RecordBatch.from_arrays(columns, schema=_SCHEMA)
            bar.advance(1)


def _file_documents(path: str, split: Split) -> tuple[list[str], list[str]]:
    """The non-blank documents of one file with their names."""
    name = base_name(path)
    with open_uncompressed(path) as file:
        found = list(text_documents(file, printable(path), split))
    texts = [text for _, text in found]
    names = [name if split == "file" else f"{name} {split} {number}" for number, _ in found]
    return texts, names
