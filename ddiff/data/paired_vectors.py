"""Texts with one or more vectors each, from the files of published extraction programs.

Two layouts are read, and folders of `ddiff encode`. All vectors of a data set have the same shape:

    train_data.json, latents/train/*.npy          one file of vectors per text (`read_vector_files`)
    train_data.jsonl, latent_shards/shard_*.npy   one file for many texts (`read_vector_shards`)

A vector file is opened when its samples are read. Its header is checked when the data set is made.
"""

from __future__ import annotations

import hashlib
import json
import mmap
import re
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddiff.data.columns import FieldsDocuments, FieldsTable, TextColumn, VectorColumn
from ddiff.data.compression import open_uncompressed
from ddiff.data.documents import Documents, fingerprint_texts
from ddiff.data.encoded_vectors import EncodedVectors, VectorPart
from ddiff.data.field_parts import (
    Hashes,
    Numbers,
    check_parts,
    fingerprint_files,
    hash_key,
    hash_keys,
    split_samples,
)
from ddiff.data.paths import base_name, explain_errors, open_file, printable
from ddiff.data.records import read_records
from ddiff.data.text import check_text
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION
from ddiff.errors import DataError
from ddiff.progress import show_progress

Missing = Literal["error", "absent"]
"""Reaction to a sample that lacks a field: DataError, or a mark in the column."""

TEXT = "text"
VECTORS = "latent"
TEXT_FOLDER = "texts"
VECTOR_FOLDER = "latents"
SHARD_NAME = re.compile(r"shard_(\d+)\.npy")

Mapped = NDArray[Any]


class VectorShape(NamedTuple):
    """Shape of the vectors of a sample: `positions` vectors of `width` numbers."""

    positions: int
    width: int


def open_vectors(path: str) -> Mapped:
    """Memory-map an array of floats in a .npy file.

    Raises DataError if the file is missing, truncated or holds other values.
    """
    with explain_errors(path):
        found: Mapped = np.load(path, mmap_mode="r", allow_pickle=False)
    if not isinstance(found, np.ndarray) or found.dtype.kind != "f":
        held = found.dtype if isinstance(found, np.ndarray) else "several arrays"
        raise DataError(
            f"{printable(path)} must hold one array of floats; it holds {held}. Write the vectors "
            "with np.save(path, vectors.astype(np.float32))."
        )
    # a plain view of the same memory, because slices of a memmap object are slow
    return found.view(np.ndarray)


# ---------------------------------------------------------------------- one file per sample


class Pair(NamedTuple):
    """Sample of a manifest.

    Attributes:
        text: text; None if it is missing.
        path: file with the vectors; None if there is none.
        place: name of the sample in messages, such as "train_data.json object 3".
    """

    text: str | None
    path: str | None
    place: str


def read_vector_files(
    folder: str,
    *,
    manifest: str = "train_data.json",
    validation: str | None = None,
    held_out: float = 0.05,
    missing: Missing = "error",
    computed: bool = True,
) -> FieldsDocuments:
    """Read texts and the file with the vectors of each text.

    The manifest is a list of objects with the keys `text` or `text_path`, and `latent_path`.
    Without a manifest, the files texts/train/NAME.txt and latents/train/NAME.npy are a pair. A file
    holds one vector [d] or several vectors [n,d].

    Args:
        folder: folder of the data set, from which paths of the manifest start.
        manifest: name of the manifest of the training samples in `folder`.
        validation: name of the manifest of the validation samples. None: validation_data.json, or
            texts/validation, if it exists; else a fraction `held_out` by the hash of the text.
        held_out: fraction in (0,1), used only without validation samples.
        missing: "error" refuses a sample without text or without vectors; "absent" marks it.
        computed: whether the vectors were computed from the texts.

    Returns documents with the columns "text" and "latent".
    """
    root = Path(folder)
    parts = {TRAIN: _list_pairs(root, manifest, TRAIN, missing)}
    if validation is not None or _has_validation(root):
        name = validation or "validation_data.json"
        parts[VALIDATION] = _list_pairs(root, name, VALIDATION, missing)
        check_parts(_hash_pairs(parts[TRAIN]), _hash_pairs(parts[VALIDATION]), folder)
    else:
        every = parts[TRAIN]
        train, held = split_samples(_hash_pairs(every), held_out, printable(folder))
        parts[TRAIN] = [every[number] for number in train]
        parts[VALIDATION] = [every[number] for number in held]
    shape = _check_headers([pair for pairs in parts.values() for pair in pairs], folder)
    tables = {part: _make_pair_table(pairs, shape, computed) for part, pairs in parts.items()}
    return FieldsDocuments(tables[TRAIN], tables[VALIDATION])


def find_vector_shape(folder: str, manifest: str = "train_data.json") -> VectorShape:
    """Return the shape of the vectors of a sample from the first file that exists, for a dry run.

    Raises DataError if no training sample has vectors.
    """
    root = Path(folder)
    for pair in _read_pairs(root, manifest, TRAIN):
        if pair.path is not None and Path(pair.path).is_file():
            return _sample_shape(open_vectors(pair.path), pair.path)
    raise _no_vectors_error(folder)


def _no_vectors_error(folder: str) -> DataError:
    return DataError(f"{printable(folder)} has no vectors. Add the files of the vectors.")


def _has_validation(root: Path) -> bool:
    return (root / "validation_data.json").is_file() or (
        not (root / "train_data.json").is_file() and (root / TEXT_FOLDER / VALIDATION).is_dir()
    )


def _list_pairs(root: Path, manifest: str, part: str, missing: Missing) -> list[Pair]:
    """List the checked samples of a part."""
    found = [_check_pair(pair, missing) for pair in _read_pairs(root, manifest, part)]
    if not found:
        raise DataError(f"{printable(str(root / manifest))} has no samples. Add samples.")
    return found


def _read_pairs(root: Path, manifest: str, part: str) -> Iterator[Pair]:
    """Yield the samples of a manifest, or, without manifest, of the two folders of a part."""
    path = root / manifest
    if not path.is_file() and (root / TEXT_FOLDER / part).is_dir():
        return _pair_by_name(root, part)
    return _read_manifest(root, path)


def _read_manifest(root: Path, path: Path) -> Iterator[Pair]:
    for place, values in read_records(str(path), ["latent_path"], [TEXT, "text_path"]):
        text = values[TEXT]
        if text is None and values["text_path"] is not None:
            text = _read_text(_locate(root, values["text_path"], place))
        elif text is not None:
            check_text(text, place)
        found = values["latent_path"]
        yield Pair(text, None if found is None else _locate(root, found, place), place)


def _pair_by_name(root: Path, part: str) -> Iterator[Pair]:
    texts = {path.stem: path for path in (root / TEXT_FOLDER / part).glob("*.txt")}
    vectors = {path.stem: path for path in (root / VECTOR_FOLDER / part).glob("*.npy")}
    for name in sorted(texts.keys() | vectors.keys()):
        text = _read_text(str(texts[name])) if name in texts else None
        path = str(vectors[name]) if name in vectors else None
        yield Pair(text or None, path, f"{part} {name}")


def _read_text(path: str) -> str:
    with open_file(path) as file:
        content = file.read()
    with explain_errors(path):
        return check_text(content.decode("utf-8-sig").strip(), printable(path))


def _locate(root: Path, written: Any, place: str) -> str:
    """Return the path of a file that a manifest names.

    Manifests often hold paths of the machine that made them. If there is no such file, the last
    three parts of the path, such as latents/train/NAME.npy, are looked up in `root`.
    """
    if not isinstance(written, str):
        raise DataError(f"{place}: a path must be a text; got {written!r}. Correct the manifest.")
    path = root / written  # an absolute path replaces `root`
    if path.is_file():
        return str(path)
    moved = root.joinpath(*Path(written).parts[-3:])
    return str(moved if moved.is_file() else path)


def _check_pair(pair: Pair, missing: Missing) -> Pair:
    """Replace a blank text, and a path without file, by None.

    Raises DataError for a sample that lacks both fields, or one of them if `missing` is "error".
    """
    # a blank text is a missing text: other data sets leave out blank documents
    text = pair.text if pair.text and not pair.text.isspace() else None
    path = pair.path
    if path is not None and not Path(path).is_file():
        if missing == "error":
            raise missing_error(pair.place, f"no vectors: there is no file {printable(path)}")
        path = None
    check_complete(pair.place, text is not None, path is not None, missing)
    return Pair(text, path, pair.place)


def check_complete(place: str, has_text: bool, has_vectors: bool, missing: Missing) -> None:
    """Raise DataError for a sample without both fields, or one of them if `missing` is "error"."""
    if not has_text and not has_vectors:
        raise DataError(f"{place} has neither a text nor vectors. Remove the sample.")
    if missing == "error" and not (has_text and has_vectors):
        raise missing_error(place, "no vectors" if has_text else "no text")


def missing_error(place: str, what: str) -> DataError:
    return DataError(
        f'{place} has {what}. Add the missing value, or set missing = "absent" in [data] to train '
        "on such samples without the field."
    )


def _hash_pairs(pairs: Sequence[Pair]) -> Hashes:
    """Return the hash of each text, by which samples are divided.

    A sample without text has the hash of the name of its file.
    """
    keys = []
    for pair in pairs:
        key = Path(pair.path or "").name if pair.text is None else pair.text
        keys.append(key.encode())
    return hash_keys(keys)


def _check_headers(pairs: Sequence[Pair], folder: str) -> VectorShape:
    """Open every vector file, and return the shape of the vectors of a sample.

    Raises DataError for a file that cannot be read, and for files of different shapes.
    """
    first = ""
    shape: VectorShape | None = None
    with show_progress(len(pairs), "checking vectors") as bar:
        for pair in pairs:
            bar.advance(1)
            if pair.path is None:
                continue
            found = _sample_shape(open_vectors(pair.path), pair.path)
            if shape is None:
                first = pair.path
                shape = found
            if found != shape:
                raise DataError(
                    f"{printable(pair.path)} has {found.positions} vector(s) of {found.width} "
                    f"numbers, but {printable(first)} has {shape.positions} of {shape.width}. All "
                    "vectors of a data set must have the same shape: compute them by one encoder."
                )
    if shape is None:
        raise _no_vectors_error(folder)
    return shape


def _sample_shape(vectors: Mapped, path: str) -> VectorShape:
    """Return the shape of an array [d] or [n,d] of one sample."""
    if vectors.ndim not in (1, 2):
        raise DataError(
            f"{printable(path)} must hold one vector [d] or several vectors [n,d] of one sample; "
            f"its shape is {list(vectors.shape)}. Write one file per sample."
        )
    return VectorShape(1 if vectors.ndim == 1 else len(vectors), vectors.shape[-1])


def _make_pair_table(pairs: Sequence[Pair], shape: VectorShape, computed: bool) -> FieldsTable:
    paths = [pair.path for pair in pairs]

    def read(numbers: NDArray[np.int64]) -> tuple[Mapped, NDArray[np.bool_]]:
        vectors = np.zeros((len(numbers), *shape))
        for row, number in enumerate(numbers):
            path = paths[number]
            if path is not None:
                vectors[row] = open_vectors(path).reshape(shape)
        return vectors, present[numbers]

    present = np.array([path is not None for path in paths], bool)
    files = [path for path in paths if path is not None]
    column = VectorColumn(
        read,
        len(paths),
        *shape,
        present=present,
        fingerprint=fingerprint_files(files, [*shape, present.tobytes().hex()]),
        computed_from=TEXT if computed else None,
    )
    return FieldsTable({TEXT: TextColumn([pair.text for pair in pairs]), VECTORS: column})


# ---------------------------------------------------------------------- shards of vectors


class _Line(NamedTuple):
    """Line of a JSON-lines file.

    Attributes:
        start: position of its first byte.
        size: number of its bytes.
        text: its text; None if it is missing or blank.
        shard: number of the shard with the vectors; -1 without vectors.
        row: row of the vectors in the shard.
        place: file and line, for messages.
    """

    start: int
    size: int
    text: str | None
    shard: int
    row: int
    place: str


class _Index(NamedTuple):
    """Samples of a JSON-lines file, as positions of lines and vectors; arrays [N].

    `start`, `size`, `shard` and `row` are those of `_Line`. `has_text` is 0 or 1. `hashes`: hash of
    each text, or of the place of the vectors of a sample without text.
    """

    start: Numbers
    size: Numbers
    shard: Numbers
    row: Numbers
    has_text: Numbers
    hashes: Hashes

    def select(self, numbers: Numbers) -> _Index:
        """Return the samples with these numbers."""
        return _Index._make(values[numbers] for values in self)


def read_vector_shards(
    folder: str,
    *,
    train: str = "train_data.jsonl",
    validation: str | None = None,
    held_out: float = 0.05,
    shards: str = "latent_shards",
    missing: Missing = "error",
    computed: bool = True,
) -> FieldsDocuments:
    """Read JSON lines with texts and the places of their vectors in files of many vectors.

    A line is an object with the keys `text`, `shard` and `idx`: the vector is row `idx` of the file
    shard_NNNN.npy, an array [N,d] or [N,n,d]. Other keys are ignored. Neither texts nor vectors are
    kept in memory.

    Args:
        folder: folder of the data set.
        train: name of the file with the training samples in `folder`.
        validation: name of the file with the validation samples. None: validation_data.jsonl, if it
            exists; else a fraction `held_out` of the training file by the hash of the text.
        shards: name of the folder with the shards in `folder`.
        held_out, missing, computed: as in `read_vector_files`.

    Returns documents with the columns "text" and "latent".
    """
    root = Path(folder)
    vectors = _Shards(root / shards)
    path = str(root / train)
    trained = vectors.index_lines(path, missing)
    held_path = str(root / (validation or "validation_data.jsonl"))
    if validation is None and not Path(held_path).is_file():
        train_numbers, held_numbers = split_samples(trained.hashes, held_out, printable(path))
        held = trained.select(held_numbers)
        trained = trained.select(train_numbers)
        held_path = path
    else:
        held = vectors.index_lines(held_path, missing)
        check_parts(trained.hashes, held.hashes, folder)
    return FieldsDocuments(
        vectors.make_table(path, trained, computed), vectors.make_table(held_path, held, computed)
    )


def find_shard_shape(folder: str, shards: str = "latent_shards") -> VectorShape:
    """Return the shape of the vectors of a sample from the headers of the shards, for a dry run."""
    return _Shards(Path(folder) / shards).shape


class _Shards:
    """Memory-mapped files of vectors by number. All have the same shape of a sample."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._vectors: dict[int, Mapped] = {}
        self._paths: dict[int, str] = {}
        for path in sorted(folder.glob("shard_*.npy")):
            matched = SHARD_NAME.fullmatch(path.name)
            if matched is not None:
                self._paths[int(matched[1])] = str(path)
                self._vectors[int(matched[1])] = open_vectors(str(path))
        if not self._paths:
            raise DataError(
                f"{printable(str(folder))} has no files shard_NNNN.npy. Name the folder of the "
                'vectors in [data]: shards = "...".'
            )
        self.shape = self._find_shape()

    def _find_shape(self) -> VectorShape:
        """Return the shape of a sample. Raises DataError for shards of different shapes."""
        first = next(iter(self._vectors))
        expected = self._vectors[first].shape[1:]
        for number, vectors in self._vectors.items():
            if vectors.ndim not in (2, 3) or vectors.shape[1:] != expected:
                raise DataError(
                    f"{printable(self._paths[number])} must hold vectors [N,d] or [N,n,d], with "
                    f"the same d (and n) as {printable(self._paths[first])} "
                    f"{list(self._vectors[first].shape)}; its shape is {list(vectors.shape)}. "
                    "Compute all vectors by one encoder."
                )
        return VectorShape(1 if len(expected) == 1 else expected[0], expected[-1])

    def index_lines(self, path: str, missing: Missing) -> _Index:
        """Read all lines once, and return the positions of texts and vectors.

        Raises DataError for a line that cannot be used.
        """
        numbers = array("q")  # arrays need a tenth of the memory of lists
        hashes = array("Q")
        for line in _read_lines(path):
            self._check_place(line, missing)
            has_text = line.text is not None
            numbers.extend((line.start, line.size, line.shard, line.row, has_text))
            key = line.text if line.text is not None else f"{line.shard} {line.row}"
            hashes.append(hash_key(key.encode()))
        if not hashes:
            raise DataError(f"{printable(path)} has no samples. Name a file with samples.")
        columns = np.array(numbers, np.int64).reshape(-1, 5).T
        return _Index._make([*columns, np.array(hashes, np.uint64)])

    def _check_place(self, line: _Line, missing: Missing) -> None:
        """Raise DataError if a line lacks a field, or names vectors that do not exist."""
        check_complete(line.place, line.text is not None, line.shard >= 0, missing)
        if line.shard < 0:
            return
        vectors = self._vectors.get(line.shard)
        if vectors is None:
            raise DataError(
                f"{line.place} names the shard {line.shard}, but {printable(str(self.folder))} has "
                f"the shards {_summarize(sorted(self._vectors))}. Copy the missing file, or remove "
                "the lines of this shard: an interrupted extraction may not have written it."
            )
        if not 0 <= line.row < len(vectors):
            raise DataError(
                f"{line.place} names row {line.row} of the shard {line.shard}, which has "
                f"{len(vectors)} rows. Correct idx, or write the shard again."
            )

    def make_table(self, path: str, index: _Index, computed: bool) -> FieldsTable:
        """Make the table of some lines of the file `path`."""
        present = index.shard >= 0

        def read(numbers: NDArray[np.int64]) -> tuple[Mapped, NDArray[np.bool_]]:
            vectors = np.zeros((len(numbers), *self.shape))
            shards = index.shard[numbers]
            for shard in np.unique(shards[shards >= 0]):
                chosen = shards == shard
                rows = self._vectors[shard][index.row[numbers[chosen]]]
                vectors[chosen] = rows.reshape(-1, *self.shape)
            return vectors, present[numbers]

        used = [self._paths[shard] for shard in np.unique(index.shard[present]).tolist()]
        rows = hashlib.sha256(np.stack([index.shard, index.row]).astype("<i8").tobytes())
        column = VectorColumn(
            read,
            len(present),
            *self.shape,
            present=present,
            fingerprint=fingerprint_files(used, [*self.shape, rows.hexdigest()]),
            computed_from=TEXT if computed else None,
        )
        return FieldsTable({TEXT: TextColumn(_LineTexts(path, index)), VECTORS: column})


def _summarize(numbers: Sequence[int]) -> str:
    """Return a short list of numbers, such as "0, 1, ..., 9"."""
    if len(numbers) <= 4:
        return ", ".join(map(str, numbers))
    return f"{numbers[0]}, {numbers[1]}, ..., {numbers[-1]}"


def _read_lines(path: str) -> Iterator[_Line]:
    """Yield the lines of a file of JSON objects. Raises DataError with the number of the line."""
    with open_uncompressed(path):
        pass  # refuses a compressed file, in which lines have no positions
    name = base_name(path)
    with open_file(path) as file:
        start = 0
        for number, content in enumerate(file, start=1):
            if not content.isspace():
                place = f"{name} line {number}"
                yield _parse_line(content, start, place)
            start += len(content)


def _parse_line(content: bytes, start: int, place: str) -> _Line:
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise DataError(
            f"{place} is not JSON: it cannot be read ({error}). Every line must be one object. An "
            "interrupted extraction may have joined two lines."
        ) from error
    if not isinstance(found, dict) or not {TEXT, "shard", "idx"} <= found.keys():
        keys = sorted(found) if isinstance(found, dict) else type(found).__name__
        raise DataError(
            f"{place} must be an object with the keys text, shard and idx; got {keys}. Write null "
            "for a missing value."
        )
    text = found[TEXT]
    if text is not None and not check_text(text, place).strip():
        text = None  # a blank text is a missing text: other data sets leave out blank documents
    numbers = []
    for key in ("shard", "idx"):
        value = found[key]
        is_number = isinstance(value, int) and not isinstance(value, bool) and value >= 0
        if value is not None and not is_number:
            raise DataError(f"{place}: {key} must be an integer >= 0, or null; got {value!r}.")
        numbers.append(value)
    shard, row = (-1, -1) if None in numbers else numbers
    return _Line(start, len(content), text, shard, row, place)


class _LineTexts(Sequence[str | None]):
    """Texts of a JSON-lines file, read from the file when they are needed."""

    def __init__(self, path: str, index: _Index) -> None:
        self._index = index
        with explain_errors(path), open(path, "rb") as file:
            self._content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)

    def __len__(self) -> int:
        return len(self._index.start)

    def __getitem__(self, number: Any) -> Any:
        if isinstance(number, slice):
            return [self[single] for single in range(*number.indices(len(self)))]
        if not self._index.has_text[number]:
            return None
        start = self._index.start[number]
        return json.loads(self._content[start : start + self._index.size[number]])[TEXT]


# ---------------------------------------------------------------------- folders of ddiff encode


def read_encoded_texts(
    documents: Documents,
    folder: str,
    *,
    dim: int | None = None,
    encoder: str | None = None,
) -> FieldsDocuments:
    """Join documents with the vectors that `ddiff encode` has computed from them.

    Documents without a vector are marked.

    Args:
        documents: the documents, which must be the encoded ones.
        folder: folder that `ddiff encode` wrote.
        dim: expected dimension of a vector; None: any.
        encoder: expected fingerprint of the encoder; None: any.

    Returns documents with the columns "text" and "latent". Raises DataError for a folder of other
    documents, another dimension or another encoder.
    """
    expected = {
        TRAIN: fingerprint_texts(documents.train),
        VALIDATION: fingerprint_texts(documents.validation),
    }
    vectors = EncodedVectors.open(folder, dim=dim, encoder=encoder, data=expected)
    tables = []
    for texts, part in (
        (documents.train, vectors.train),
        (documents.validation, vectors.validation),
    ):
        column = make_encoded_column(part, len(texts), computed_from=TEXT)
        tables.append(FieldsTable({TEXT: TextColumn(list(texts["text"])), VECTORS: column}))
    return FieldsDocuments(tables[0], tables[1])


def make_encoded_column(part: VectorPart, count: int, computed_from: str) -> VectorColumn:
    """Make a column of the vectors of `count` documents, from a folder of `ddiff encode`.

    `computed_from`: name of the field of the texts.
    """
    positions = part.positions
    width = part.dim

    def read(numbers: NDArray[np.int64]) -> tuple[Mapped, NDArray[np.bool_]]:
        found, present = part.read(numbers)
        return found.reshape(len(numbers), positions, width).astype(np.float64), present

    present = np.zeros(count, bool)
    # documents after the encoded ones, if the folder was written with max_samples, have no vector
    present[: part.num_documents] = part.present
    return VectorColumn(
        read,
        count,
        positions,
        width,
        present=present,
        fingerprint=part.fingerprint,
        computed_from=computed_from,
    )
