"""Columns of a data set of several fields: texts, tokens and vectors, and tables of columns.

A table has one column per field, and all its columns have the same number of samples. A sample may
lack a field: its text is None, or its mark in `present` is False. A missing value is read as zeros.

    images = TokenColumn(levels, num_tokens=17)                   # levels: integers [N,64]
    table = FieldsTable({"image": images, "text": TextColumn(["zero", None])})
    levels, present = table.read("image", [3, 0, 5])              # [3,64] and [3]
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, Literal, NamedTuple, final

import numpy as np
from numpy.typing import ArrayLike, NDArray

from ddiff.data.cache import fingerprint
from ddiff.data.pictures import Picture
from ddiff.data.text import check_text
from ddiff.errors import ArgumentError, DataError

AT_ONCE = 4096  # samples that are read together where a whole column is read

Kind = Literal["texts", "tokens", "vectors"]


@final
@dataclass(frozen=True)
class ColumnShape:
    """Description of a column without its data, from which a dry run builds a model.

    Args:
        kind: kind of the values.
        positions: number n of positions of a sample; None for texts, whose lengths differ.
        num_tokens: number of different tokens; None for texts and vectors.
        width: number d of numbers in a vector; None for texts and tokens.
        computed_from: column of texts from which the vectors are computed, else None.
        picture: conversion of a sample into pixels; None if the column has no pictures. Not
            compared.
    """

    kind: Kind
    positions: int | None = None
    num_tokens: int | None = None
    width: int | None = None
    computed_from: str | None = None
    picture: Picture | None = field(default=None, compare=False)

    def __str__(self) -> str:
        if self.kind == "texts":
            return "texts"
        if self.kind == "tokens":
            return f"{self.positions} of {self.num_tokens} tokens"
        return f"{self.positions} vectors of {self.width} numbers"


class Texts(NamedTuple):
    """Texts of k samples.

    Attributes:
        values: texts, "" for a sample without text.
        present: bool [k], whether each sample has a text.
    """

    values: list[str]
    present: NDArray[np.bool_]


class Arrays(NamedTuple):
    """Tokens or vectors of k samples.

    Attributes:
        values: tokens int64 [k,n] or vectors float64 [k,n,d], 0 for a sample without values.
        present: bool [k], whether each sample has values.
    """

    values: NDArray[Any]
    present: NDArray[np.bool_]


# ---------------------------------------------------------------------- columns


@final
class TextColumn:
    """Column of texts.

    Args:
        texts: one text per sample; None for a sample without text. An empty text is a text.
    """

    unit = "token"

    def __init__(self, texts: Sequence[str | None]) -> None:
        self.texts = texts
        self.shape = ColumnShape("texts")

    def __len__(self) -> int:
        return len(self.texts)

    def check(self) -> None:
        """Raise DataError for a value that is neither a text nor None."""
        for number, text in enumerate(self.texts):
            if text is not None:
                check_text(text, f"sample {number}")

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """Marks of the samples that have a text, bool [N]."""
        return np.array([text is not None for text in self.texts], bool)

    def missing(self) -> int:
        """Return the number of samples without text."""
        return int((~self.present).sum())

    def read(self, numbers: ArrayLike) -> Texts:
        """Return the texts of the samples `numbers` [k]."""
        wanted = _check_numbers(numbers, len(self))
        found = [self.texts[int(number)] for number in wanted]
        present = np.array([text is not None for text in found], bool)
        return Texts([text or "" for text in found], present)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all texts and their boundaries, as 32 hexadecimal digits."""
        digest = hashlib.sha256(b"texts")
        for text in self.texts:
            content = b"" if text is None else text.encode()
            # The length separates the texts, and -1 a missing text from an empty one.
            size = -1 if text is None else len(content)
            digest.update(size.to_bytes(8, "little", signed=True))
            digest.update(content)
        return digest.hexdigest()[:32]


@final
class TokenColumn:
    """Column of token ids, with the same number of tokens in every sample.

    Args:
        ids: integers [N,n], an array that may be memory-mapped.
        num_tokens: number of different tokens; the ids are 0 .. num_tokens - 1.
        picture: conversion of the ids [n] of a sample into pixels.
        present: bool [N], whether each sample has tokens; None: all samples. The ids of other
            samples are not read.
        names: text of each token.
    """

    def __init__(
        self,
        ids: NDArray[np.integer],
        num_tokens: int,
        picture: Picture | None = None,
        present: ArrayLike | None = None,
        names: Sequence[str] | None = None,
    ) -> None:
        self.ids = ids
        self.num_tokens = num_tokens
        self.picture = picture
        self.names = None if names is None else list(names)
        self.present = _presence(present, len(ids))
        positions = ids.shape[1] if ids.ndim == 2 else None
        self.shape = ColumnShape("tokens", positions, num_tokens, picture=picture)

    def __len__(self) -> int:
        return len(self.ids)

    @property
    def unit(self) -> str:
        """Return "pixel" for tokens that are drawn as a picture, else "token"."""
        return "token" if self.picture is None else "pixel"

    def check(self) -> None:
        """Raise DataError for ids of another form, and for ids out of range."""
        if self.ids.ndim != 2 or self.ids.dtype.kind not in "iu" or not self.ids.shape[1]:
            raise DataError(
                "ids must be an array of integers [N,n], with n tokens per sample; got "
                f"{self.ids.dtype} {self.ids.shape}. Convert the ids, or use VectorColumn for "
                "numbers."
            )
        if self.num_tokens < 1:
            raise DataError(f"num_tokens must be at least 1; got {self.num_tokens}.")
        if self.names is not None and len(self.names) != self.num_tokens:
            raise DataError(
                f"names must have one text per token, {self.num_tokens} in all; got "
                f"{len(self.names)}."
            )
        _check_marks(self.present, len(self))
        for numbers in _blocks(len(self)):
            self._check_range(numbers)

    def _check_range(self, numbers: NDArray[np.int64]) -> None:
        ids, _ = self.read(numbers)
        is_outside = (ids < 0) | (ids >= self.num_tokens)
        if is_outside.any():
            row, position = np.argwhere(is_outside)[0]
            raise DataError(
                f"ids must lie in 0..{self.num_tokens - 1}, because num_tokens = "
                f"{self.num_tokens}; got {ids[row, position]} at position {position} of sample "
                f"{numbers[row]}. Correct the ids, or give the number of different tokens."
            )

    def missing(self) -> int:
        """Return the number of samples without tokens."""
        return int((~self.present).sum())

    def read(self, numbers: ArrayLike) -> Arrays:
        """Return the ids [k,n] of the samples `numbers` [k]."""
        wanted = _check_numbers(numbers, len(self))
        present = self.present[wanted]
        ids = np.zeros((len(wanted), self.ids.shape[1]), np.int64)
        ids[present] = self.ids[wanted[present]]
        return Arrays(ids, present)

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of all ids, marks and names, as 32 hexadecimal digits."""
        digest = hashlib.sha256(fingerprint(["tokens", self.num_tokens, self.names]).encode())
        return _hash_arrays(digest, self, "<i8")


@final
class VectorColumn:
    """Column of vectors, with the same number of vectors in every sample.

    Vectors are read when they are needed, so that they may be larger than the memory.

    Args:
        read: function of sample numbers [k] that returns vectors [k,n,d] and bool marks [k]. A
            sample without vectors has the mark False; its vectors are not used.
        count: number N of samples.
        positions: number n of vectors of a sample.
        width: number d of numbers in a vector.
        picture: conversion of the vectors [n,d] of a sample into pixels.
        fingerprint: hexadecimal digits that identify the vectors. None: a SHA-256 of all vectors,
            for which they are read once.
        computed_from: column of texts from which the vectors are computed, else None. A bound of
            such a text given its own vector is not a likelihood of the text.
        present: bool [N], whether each sample has vectors. `read` must return the same marks. None:
            `read` is called once for all samples to find out.
    """

    unit = "number"

    def __init__(
        self,
        read: Callable[[NDArray[np.int64]], tuple[NDArray[Any], NDArray[np.bool_]]],
        count: int,
        positions: int,
        width: int,
        picture: Picture | None = None,
        fingerprint: str | None = None,
        computed_from: str | None = None,
        present: ArrayLike | None = None,
    ) -> None:
        self._read = read
        self._count = count
        self._known_present = None if present is None else np.asarray(present)
        self._known_fingerprint = fingerprint
        self.positions = positions
        self.width = width
        self.picture = picture
        self.computed_from = computed_from
        self.shape = ColumnShape(
            "vectors", positions, width=width, computed_from=computed_from, picture=picture
        )

    @classmethod
    def from_array(
        cls,
        vectors: NDArray[Any],
        picture: Picture | None = None,
        present: ArrayLike | None = None,
        computed_from: str | None = None,
    ) -> VectorColumn:
        """Make a column from an array [N,n,d] or [N,d], which may be memory-mapped.

        `present`: bool [N], whether each sample has vectors; None: all samples. The other arguments
        are those of the class.
        """
        if vectors.ndim not in (2, 3) or vectors.dtype.kind != "f":
            raise ArgumentError(
                "VectorColumn.from_array: vectors must be an array of floats [N,n,d], or [N,d] for "
                f"one vector per sample; got {vectors.dtype} {vectors.shape}. Convert the numbers: "
                "vectors.astype(float)."
            )
        shaped = vectors if vectors.ndim == 3 else vectors[:, None]
        marks = _presence(present, len(shaped))
        _check_marks(marks, len(shaped))

        def read(numbers: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[np.bool_]]:
            return shaped[numbers], marks[numbers]

        return cls(
            read,
            len(shaped),
            shaped.shape[1],
            shaped.shape[2],
            picture,
            computed_from=computed_from,
            present=marks,
        )

    def __len__(self) -> int:
        return self._count

    def check(self) -> None:
        """Raise DataError for an invalid size. Vectors are checked when they are read."""
        if self.positions < 1 or self.width < 1:
            raise DataError(
                "positions and width must be at least 1; got positions = "
                f"{self.positions} and width = {self.width}."
            )
        if self._known_present is not None:
            _check_marks(self._known_present, len(self))

    @cached_property
    def present(self) -> NDArray[np.bool_]:
        """Marks of the samples that have vectors, bool [N]."""
        if self._known_present is not None:
            return self._known_present
        marks = [self.read(numbers).present for numbers in _blocks(len(self))]
        return np.concatenate(marks)

    def missing(self) -> int:
        """Return the number of samples without vectors."""
        return int((~self.present).sum())

    def read(self, numbers: ArrayLike) -> Arrays:
        """Return the vectors float64 [k,n,d] of the samples `numbers` [k].

        Raises DataError for vectors of another form, and for NaN and infinity in a vector that is
        not marked as missing.
        """
        wanted = _check_numbers(numbers, len(self))
        found, present = self._read(wanted)
        expected = (len(wanted), self.positions, self.width)
        if found.shape != expected or found.dtype.kind != "f":
            raise DataError(
                f"vectors must be a float array of shape {expected}, with one row per sample; got "
                f"{found.dtype} of shape {found.shape}. Correct the positions and the width of the "
                "column."
            )
        _check_marks(present, len(wanted))
        vectors = np.zeros(expected)
        vectors[present] = found[present]
        is_wrong = ~np.isfinite(vectors).all((1, 2))
        if is_wrong.any():
            raise DataError(
                "vectors must be finite; got NaN or infinity in sample "
                f"{wanted[is_wrong][0]}. Mark a sample without vectors as missing (present = "
                "False), or remove it."
            )
        return Arrays(vectors, present)

    @cached_property
    def fingerprint(self) -> str:
        """Identifier of the vectors, hexadecimal digits."""
        if self._known_fingerprint is not None:
            return self._known_fingerprint
        return _hash_arrays(hashlib.sha256(b"vectors"), self, "<f8")


Column = TextColumn | TokenColumn | VectorColumn


# ---------------------------------------------------------------------- tables


@final
class FieldsTable:
    """Table of samples with one column per field.

    Args:
        columns: columns by the names of their fields.

    Raises DataError, with the name of the column, for an invalid column, and for columns of
    different lengths.
    """

    def __init__(self, columns: Mapping[str, Column]) -> None:
        self.columns = dict(columns)
        lengths = {name: len(column) for name, column in self.columns.items()}
        if not lengths or len(set(lengths.values())) > 1 or not min(lengths.values()):
            found = ", ".join(f'"{name}" has {size}' for name, size in lengths.items())
            raise DataError(
                "FieldsTable: columns must have the same number of samples, at least one; "
                f"{found or 'got no column'}. A sample that lacks a field has an entry too: None, "
                "or present = False."
            )
        for name, column in self.columns.items():
            with _name_column(name):
                column.check()

    def __len__(self) -> int:
        return len(next(iter(self.columns.values())))

    def __getitem__(self, name: str) -> Column:
        return self.columns[name]

    @property
    def shapes(self) -> dict[str, ColumnShape]:
        """Descriptions of the columns, by name."""
        return {name: column.shape for name, column in self.columns.items()}

    def missing(self) -> dict[str, int]:
        """Return the number of samples that lack each field."""
        counts = {}
        for name, column in self.columns.items():
            with _name_column(name):
                counts[name] = column.missing()
        return counts

    def lacking(self) -> set[frozenset[str]]:
        """Return the combinations of fields that samples lack, each once.

        A combination has all fields that one sample lacks. Complete samples have none.
        """
        marks = []
        for name, column in self.columns.items():
            with _name_column(name):
                marks.append(~column.present)
        names = list(self.columns)
        combinations = set()
        for row in np.unique(np.stack(marks, 1), axis=0):
            lacks = frozenset(name for name, mark in zip(names, row, strict=True) if mark)
            if lacks:
                combinations.add(lacks)
        return combinations

    def read_texts(self, name: str, numbers: ArrayLike) -> Texts:
        """Return the texts of the samples `numbers` [k] of a column of texts."""
        column = self.columns[name]
        if not isinstance(column, TextColumn):
            raise ArgumentError(
                f'FieldsTable.read_texts: the column "{name}" must hold texts; it holds '
                f"{column.shape}. Use `read`."
            )
        return column.read(numbers)

    def read(self, name: str, numbers: ArrayLike) -> Arrays:
        """Return the values of the samples `numbers` [k] of a column of tokens or vectors.

        Raises DataError with the name of the column for values that cannot be used.
        """
        column = self.columns[name]
        if isinstance(column, TextColumn):
            raise ArgumentError(
                f'FieldsTable.read: the column "{name}" must hold tokens or vectors; it holds '
                "texts. Use `read_texts`."
            )
        with _name_column(name):
            return column.read(numbers)

    @cached_property
    def fingerprint(self) -> str:
        """Identifier of all names and values, 32 hexadecimal digits."""
        found = {}
        for name, column in self.columns.items():
            with _name_column(name):
                found[name] = column.fingerprint
        return fingerprint(found)


@final
@dataclass(frozen=True)
class FieldsDocuments:
    """Training and validation samples of several fields.

    Args:
        train: training samples.
        validation: validation samples, with the same columns.
        entropies: true entropy in nats per sample by target, such as "joint", "text" or
            "image | text", for a generated source; empty for other data.

    Raises DataError if the two tables have different columns.
    """

    train: FieldsTable
    validation: FieldsTable
    entropies: Mapping[str, float] = field(default_factory=dict)

    def __post_init__(self) -> None:
        ours = self.train.shapes
        theirs = self.validation.shapes
        if ours != theirs:
            raise DataError(
                "FieldsDocuments: train and validation must have the same columns; train has "
                f"{_list_shapes(ours)}, and validation has {_list_shapes(theirs)}."
            )

    @property
    def shapes(self) -> dict[str, ColumnShape]:
        """Descriptions of the columns, by name."""
        return self.train.shapes


def _list_shapes(shapes: Mapping[str, ColumnShape]) -> str:
    return ", ".join(f'"{name}" ({shape})' for name, shape in shapes.items())


@contextmanager
def _name_column(name: str) -> Iterator[None]:
    """Add the name of a column to the messages of DataErrors in a `with` block."""
    try:
        yield
    except DataError as error:
        raise DataError(f'Column "{name}": {error}') from error


# ---------------------------------------------------------------------- checks and hashes


def _presence(present: ArrayLike | None, count: int) -> NDArray[np.bool_]:
    return np.ones(count, bool) if present is None else np.asarray(present)


def _check_marks(present: NDArray[Any], count: int) -> None:
    if present.shape != (count,) or present.dtype != bool:
        raise DataError(
            f"present must be bool [{count}], one mark per sample; got {present.dtype} "
            f"{list(present.shape)}."
        )


def _check_numbers(numbers: ArrayLike, count: int) -> NDArray[np.int64]:
    """Return sample numbers as an array [k]. Raises ArgumentError for numbers out of range."""
    wanted = np.asarray(numbers, np.int64)
    if wanted.ndim != 1 or (wanted.size and (wanted.min() < 0 or wanted.max() >= count)):
        raise ArgumentError(
            "A column is read by a one-dimensional list of sample numbers in "
            f"0..{count - 1}; got {numbers!r}."
        )
    return wanted


def _blocks(count: int) -> Iterator[NDArray[np.int64]]:
    """Yield all sample numbers in blocks, so that a large column is never read as a whole."""
    for start in range(0, count, AT_ONCE):
        yield np.arange(start, min(start + AT_ONCE, count))


def _hash_arrays(digest: Any, column: TokenColumn | VectorColumn, dtype: str) -> str:
    """Add the values and marks of a column to a hash, and return 32 hexadecimal digits.

    `dtype`: type to which the values are converted. It fixes the byte order, so that the result is
    the same on every machine.
    """
    digest.update(repr((len(column), column.shape.positions, column.shape.width)).encode())
    for numbers in _blocks(len(column)):
        values, present = column.read(numbers)
        digest.update(present.tobytes())
        digest.update(np.ascontiguousarray(values, dtype).tobytes())
    return digest.hexdigest()[:32]
