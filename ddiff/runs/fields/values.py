"""Values of one field: conversion of data into batches, and of sampled states into plain values.

There are three kinds of fields: texts (`TextValues`), tokens (`TokenValues`) and vectors
(`VectorValues`).
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from functools import cached_property
from typing import Any, NamedTuple, final

import numpy as np
import torch
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from ddiff.core.normalizer import Normalizer
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.cache import fingerprint
from ddiff.data.columns import AT_ONCE, Arrays, Column, ColumnShape, FieldsTable, TextColumn, Texts
from ddiff.data.fields_batch import FieldBatch, token_field, vector_field
from ddiff.data.packing import PackedRows, pack_ids
from ddiff.data.pictures import Picture, Pixels
from ddiff.data.text import check_text
from ddiff.data.tokenizer import Tokenizer, Unencodable
from ddiff.data.tokenizer_workers import TRAIN
from ddiff.errors import ArgumentError, DataError, shorten

Tables = Callable[[str], FieldsTable]
"""Function that returns the table of a part, "train" or "validation", and reads it if needed."""

GIVEN = "given"
"""Part of texts of a caller, which are not part of the data."""

MOST_SHOWN = 60  # characters of a text in a message


class FieldShape(NamedTuple):
    """Shape of a field, from which its process, its head and its stream are built.

    Attributes:
        vocabulary: vocabulary of a field of tokens; None for vectors.
        width: number of normalized numbers in a vector; None for tokens.
        positions: number n of positions.
        grid: rows and columns of the positions of a picture; None for other fields.
    """

    vocabulary: Vocabulary | None
    width: int | None
    positions: int
    grid: tuple[int, int] | None


class FieldValues(ABC):
    """Values of one field.

    Attributes:
        name: name of the field.
        positions: number n of positions of a sample.
        picture: conversion of a sample into pixels; None if the field has no pictures.
        tokenizer: tokenizer of a field of texts, else None.
        vocabulary: vocabulary of a field of tokens; None for vectors.
        normalizer: normalizer of a field of vectors; None for tokens.
        computed_from: field of texts from which the vectors are computed, else None.
    """

    tokenizer: Tokenizer | None = None
    vocabulary: Vocabulary | None = None
    normalizer: Normalizer | None = None
    computed_from: str | None = None

    def __init__(self, name: str, positions: int, picture: Picture | None, tables: Tables) -> None:
        self.name = name
        self.positions = positions
        self.picture = picture
        self._tables = tables

    def column(self, part: str) -> Column:
        """Return the column of the training or the validation data."""
        return self._tables(part)[self.name]

    @property
    def width(self) -> int | None:
        """Number of normalized numbers in a vector; None for tokens."""
        return None if self.normalizer is None else self.normalizer.width

    @property
    def shape(self) -> FieldShape:
        grid = None if self.picture is None else self.picture.grid
        return FieldShape(self.vocabulary, self.width, self.positions, grid)

    @property
    @abstractmethod
    def unit(self) -> str:
        """Name of an item in metrics: "token", "pixel" or "number"."""

    @abstractmethod
    def encode(self, numbers: ArrayLike, part: str) -> FieldBatch:
        """Return the values of the samples `numbers` [k] of a part, as the network takes them.

        `part` is "train" or "validation".
        """

    @abstractmethod
    def encode_values(self, values: Any) -> FieldBatch:
        """Return values of a caller as the network takes them.

        Values are k texts, token ids [k,n], or vectors in data units [k,n,d]; [k,d] if n is 1.
        Raises DataError or ArgumentError for other values.
        """

    @abstractmethod
    def check_values(self, values: Any) -> None:
        """Raise ArgumentError or DataError if values of a caller have another form or range."""

    @abstractmethod
    def list_values(self, values: Any) -> list[Any]:
        """Return values of a caller, as for `encode_values`, as k texts or nested lists."""

    @abstractmethod
    def read_values(self, numbers: ArrayLike, part: str) -> list[Any]:
        """Return the values of the samples `numbers` [k] in the data, as k texts or nested lists.

        Vectors are in units of the data.
        """

    @abstractmethod
    def decode(self, states: Tensor) -> list[dict[str, Any]]:
        """Return clean states of k samples as plain values.

        Texts have the keys "text" and "ids", tokens the key "ids", and vectors the key "vectors",
        a list of n vectors in data units.
        """

    def draw(self, states: Tensor) -> list[Pixels]:
        """Return the pixels of clean states of k samples.

        Raises ArgumentError for a field without pictures.
        """
        if self.picture is None:
            raise ArgumentError(
                f'The field "{self.name}" has no pictures. Use a data set whose column of this '
                "name has a picture."
            )
        return [self.picture.pixels(values) for values in self._plain_arrays(states)]

    @abstractmethod
    def _plain_arrays(self, states: Tensor) -> NDArray[Any]:
        """Return ids [k,n] or vectors in data units [k,n,d]."""

    @abstractmethod
    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of tokenizer, vocabulary and normalizer, by name."""

    @abstractmethod
    def read(self, part: str) -> None:
        """Check all values of a part. Raises DataError for values that cannot be encoded."""


# ---------------------------------------------------------------------- texts


class TextIds(NamedTuple):
    """Token ids of N texts, each filled with end marks up to n positions.

    Attributes:
        ids: int32 [N,n].
        sizes: int64 [N], number of tokens of each text with its first end mark.
        present: bool [N], whether each sample has a text.
    """

    ids: NDArray[np.int32]
    sizes: NDArray[np.int64]
    present: NDArray[np.bool_]


@final
class TextEncoder:
    """Encoder of texts into n positions: the tokens of the text, then end marks.

    All positions are part of the sample and valid, also those after the first end mark: valid
    positions that depend on the text would tell the network the length of the text. A text of n
    tokens has no end mark.

    Args:
        name: name of the field.
        tokenizer: tokenizer of the field.
        length: number n of positions.
        cuts: whether longer texts are cut. Otherwise they are refused.
    """

    def __init__(self, name: str, tokenizer: Tokenizer, length: int, cuts: bool = False) -> None:
        self.name = name
        self.tokenizer = tokenizer
        self.length = length
        self.cuts = cuts

    def encode_column(self, column: TextColumn, part: str) -> TextIds:
        """Encode all texts of a column. Raises DataError if a text is too long."""
        label = self._label(part)
        blocks = []
        longest = 0
        for start in range(0, len(column), AT_ONCE):
            numbers = np.arange(start, min(start + AT_ONCE, len(column)))
            texts = column.read(numbers)
            lists = self._tokenize(texts.values, label, start)
            longest = max(longest, *(len(ids) for ids in lists))
            blocks.append(self._fill(lists, texts))
        if longest > self.length and not self.cuts:
            raise self._find_long_text(column, part, longest)
        return TextIds(*(np.concatenate(arrays) for arrays in zip(*blocks, strict=True)))

    def encode_texts(self, texts: Sequence[str]) -> TextIds:
        """Encode texts of a caller. Raises DataError if a text is too long."""
        checked = [check_text(text, f"text {number}") for number, text in enumerate(texts)]
        column = TextColumn(checked)
        return self.encode_column(column, GIVEN)

    def _label(self, part: str) -> str:
        return f'Column "{self.name}", {part} sample'

    def _tokenize(self, texts: list[str], label: str, first: int) -> list[list[int]]:
        """Tokenize texts. `first`: number of the first text, for messages."""
        try:
            return self.tokenizer.encode(texts)
        except Unencodable as error:
            number = first + error.row
            raise error.at(number, f"{label} {number}") from error

    def _fill(self, lists: list[list[int]], texts: Texts) -> TextIds:
        filler = self.tokenizer.eos_id
        ids = np.full((len(lists), self.length), filler or 0, np.int32)
        sizes = np.zeros(len(lists), np.int64)
        for row, tokens in enumerate(lists):
            kept = tokens[: self.length]
            if filler is None and texts.present[row] and len(kept) < self.length:
                raise DataError(
                    f'Column "{self.name}": the text {shorten(texts.values[row], MOST_SHOWN)!r} '
                    f"has {len(kept)} tokens, but its tokenizer has no end mark, so that every "
                    f"text must have [fields.{self.name}] length = {self.length} tokens. Use a "
                    'tokenizer with an end mark, such as "words" or "bpe".'
                )
            ids[row, : len(kept)] = kept
            # with the end mark, if there is a position for it
            sizes[row] = min(len(kept) + 1, self.length)
        return TextIds(ids, sizes, texts.present)

    def _find_long_text(self, column: TextColumn, part: str, longest: int) -> DataError:
        """Return the DataError for the first text that is too long."""
        label = self._label(part)
        for number in range(len(column)):
            text = column.read([number]).values[0]
            size = len(self.tokenizer.encode([text])[0])
            if size > self.length:
                break
        if part == GIVEN:
            return DataError(
                f'Field "{self.name}": the given text {shorten(text, MOST_SHOWN)!r} has {size} '
                f"tokens, but a text of this model has at most {self.length}. Give a shorter text."
            )
        return DataError(
            f"{label} {number} has {size} tokens ({shorten(text, MOST_SHOWN)!r}), but "
            f"[fields.{self.name}] length = {self.length}. The longest text has {longest} tokens. "
            f"Set [fields.{self.name}] length = {longest}, or cut the texts: "
            f'[fields.{self.name}] long = "cut".'
        )


@final
class TextValues(FieldValues):
    """Values of a field of texts, which are tokenized into n positions."""

    unit = "token"

    def __init__(
        self, encoder: TextEncoder, vocabulary: Callable[[TextValues], Vocabulary], tables: Tables
    ) -> None:
        """Make the values.

        Args:
            encoder: encoder of the texts.
            vocabulary: function that returns the vocabulary. Some vocabularies are built from the
                training rows of the field.
            tables: function that returns the table of a part.
        """
        super().__init__(encoder.name, encoder.length, None, tables)
        self.encoder = encoder
        self._encoded: dict[str, TextIds] = {}
        self.tokenizer = encoder.tokenizer
        self.vocabulary = vocabulary(self)
        _check_vocabulary(self.name, self.vocabulary, self.tokenizer)

    def read(self, part: str) -> None:
        if part not in self._encoded:
            column = self.column(part)
            assert isinstance(column, TextColumn)
            self._encoded[part] = self.encoder.encode_column(column, part)

    def encode(self, numbers: ArrayLike, part: str) -> FieldBatch:
        self.read(part)
        found = self._encoded[part]
        rows = np.asarray(numbers, np.int64)
        return self._make_batch(TextIds(found.ids[rows], found.sizes[rows], found.present[rows]))

    def encode_values(self, values: Any) -> FieldBatch:
        return self._make_batch(self.encoder.encode_texts(values))

    def check_values(self, values: Any) -> None:
        self.encoder.encode_texts(values)

    def list_values(self, values: Any) -> list[Any]:
        return list(values)

    def read_values(self, numbers: ArrayLike, part: str) -> list[Any]:
        return self._tables(part).read_texts(self.name, numbers).values

    def _make_batch(self, found: TextIds) -> FieldBatch:
        # a sample without text has values 0, which no other position attends to
        ids = np.where(found.present[:, None], found.ids, 0).astype(np.int64)
        counted = np.arange(self.positions) < found.sizes[:, None]
        return token_field(
            torch.from_numpy(ids),
            absent=torch.from_numpy(~found.present),
            counted=torch.from_numpy(counted),
        )

    @cached_property
    def rows(self) -> PackedRows:
        """Rows of the training texts, as the network reads them."""
        self.read(TRAIN)
        found = self._encoded[TRAIN]
        return pack_ids(found.ids[found.present], self.encoder.tokenizer.num_tokens)

    def decode(self, states: Tensor) -> list[dict[str, Any]]:
        tokenizer = self.encoder.tokenizer
        kept = []
        for ids in states.tolist():
            # the text ends before the first end mark
            size = ids.index(tokenizer.eos_id) if tokenizer.eos_id in ids else len(ids)
            kept.append(ids[:size])
        texts = tokenizer.decode(kept)
        return [{"text": text, "ids": ids} for text, ids in zip(texts, kept, strict=True)]

    def _plain_arrays(self, states: Tensor) -> NDArray[Any]:
        return states.cpu().numpy()

    def fingerprints(self) -> dict[str, str]:
        assert self.vocabulary is not None
        return {
            "tokenizer": self.encoder.tokenizer.fingerprint,
            "vocabulary": self.vocabulary.fingerprint,
        }


# ---------------------------------------------------------------------- tokens


class ColumnTokens:
    """Stand-in for a tokenizer, from which vocabularies of columns of token ids are built.

    Args:
        num_tokens: number of tokens.
        names: text of each token; None: "0", "1" and so on.
    """

    eos_id = None
    special_ids: tuple[int, ...] = ()
    unit = "token"

    def __init__(self, num_tokens: int, names: Sequence[str] | None = None) -> None:
        self.num_tokens = num_tokens
        self._names = [str(number) for number in range(num_tokens)] if names is None else names
        self.fingerprint = fingerprint(["column", list(self._names)])[:16]

    def tokens(self) -> list[str]:
        """Return the tokens as strings, in the order of their ids."""
        return list(self._names)


@final
class TokenValues(FieldValues):
    """Values of a field of token ids."""

    def __init__(
        self,
        name: str,
        column_shape: ColumnShape,
        vocabulary: Callable[[TokenValues], Vocabulary],
        tables: Tables,
    ) -> None:
        """Make the values.

        Args:
            name: name of the field.
            column_shape: description of the column of token ids.
            vocabulary: function that returns the vocabulary. Some vocabularies are built from the
                training rows of the field.
            tables: function that returns the table of a part.
        """
        assert column_shape.positions is not None
        assert column_shape.num_tokens is not None
        super().__init__(name, column_shape.positions, column_shape.picture, tables)
        self.num_tokens = column_shape.num_tokens
        self.vocabulary = vocabulary(self)
        if self.vocabulary.num_tokens != self.num_tokens:
            raise DataError(
                f'The vocabulary of the field "{name}" must have the {self.num_tokens} tokens of '
                f"the data; it has {self.vocabulary.num_tokens}. Build it from these data."
            )

    @property
    def unit(self) -> str:
        return "token" if self.picture is None else "pixel"

    def read(self, part: str) -> None:
        """Read the table, which checks the ids."""
        self.column(part)

    def encode(self, numbers: ArrayLike, part: str) -> FieldBatch:
        return _make_token_batch(self._tables(part).read(self.name, numbers))

    def check_values(self, values: Any) -> None:
        ids = np.asarray(values)
        highest = self.num_tokens - 1
        has_shape = ids.ndim == 2 and ids.shape[1] == self.positions and ids.dtype.kind in "iu"
        if not has_shape or ids.min(initial=0) < 0 or ids.max(initial=0) > highest:
            raise ArgumentError(
                f'Values of the field "{self.name}" must be integers in 0..{highest} of '
                f"shape [k,{self.positions}]; got {ids.dtype} of shape {list(ids.shape)}."
            )

    def encode_values(self, values: Any) -> FieldBatch:
        self.check_values(values)
        ids = np.asarray(values)
        return _make_token_batch(Arrays(ids.astype(np.int64), np.ones(len(ids), bool)))

    def list_values(self, values: Any) -> list[Any]:
        return np.asarray(values).tolist()

    def read_values(self, numbers: ArrayLike, part: str) -> list[Any]:
        return self._tables(part).read(self.name, numbers).values.tolist()

    @cached_property
    def rows(self) -> PackedRows:
        """Rows of the ids of all training samples that have the field."""
        blocks = [found.values[found.present] for found in _read_blocks(self._tables, self.name)]
        return pack_ids(np.concatenate(blocks), self.num_tokens)

    def decode(self, states: Tensor) -> list[dict[str, Any]]:
        return [{"ids": ids} for ids in states.tolist()]

    def _plain_arrays(self, states: Tensor) -> NDArray[Any]:
        return states.cpu().numpy()

    def fingerprints(self) -> dict[str, str]:
        assert self.vocabulary is not None
        return {"vocabulary": self.vocabulary.fingerprint}


def _make_token_batch(found: Arrays) -> FieldBatch:
    absent = torch.from_numpy(~found.present)
    return token_field(torch.from_numpy(found.values), absent=absent)


# ---------------------------------------------------------------------- vectors


@final
class VectorValues(FieldValues):
    """Values of a field of vectors, which are normalized for the network.

    Args:
        name: name of the field.
        column_shape: description of the column of vectors.
        normalizer: normalizer of the vectors.
        tables: function that returns the table of a part.
    """

    unit = "number"

    def __init__(
        self, name: str, column_shape: ColumnShape, normalizer: Normalizer, tables: Tables
    ) -> None:
        assert column_shape.positions is not None
        super().__init__(name, column_shape.positions, column_shape.picture, tables)
        if normalizer.data_width != column_shape.width:
            raise DataError(
                f'The normalizer of the field "{name}" must be for the vectors of '
                f"{column_shape.width} numbers of the data; it is for {normalizer.data_width} "
                "numbers. Fit it to these data."
            )
        self.normalizer = normalizer
        self.computed_from = column_shape.computed_from
        self._map = normalizer

    def read(self, part: str) -> None:
        """Read the table. Vectors are checked when they are encoded."""
        self.column(part)

    def encode(self, numbers: ArrayLike, part: str) -> FieldBatch:
        return self._make_batch(self._tables(part).read(self.name, numbers))

    def check_values(self, values: Any) -> None:
        vectors = np.asarray(values)
        expected = (self.positions, self._map.data_width)
        described = f'Values of the field "{self.name}" must be'
        has_shape = vectors.shape[1:] == expected
        if self.positions == 1 and vectors.ndim == 2:
            has_shape = vectors.shape[1] == expected[1]
        if not has_shape or vectors.dtype.kind not in "fiu":
            raise ArgumentError(
                f"{described} numbers [k,{expected[0]},{expected[1]}]: {expected[0]} vectors of "
                f"{expected[1]} numbers for each of k samples; got {vectors.dtype} "
                f"{list(vectors.shape)}."
            )
        is_wrong = ~np.isfinite(vectors.reshape(len(vectors), -1))
        if is_wrong.any():
            row = int(is_wrong.any(1).argmax())
            found = vectors[row].reshape(-1)[is_wrong[row]][0]
            raise ArgumentError(
                f"{described} finite numbers; got {found} in sample {row} of {len(vectors)}. "
                "Replace or remove this sample."
            )

    def encode_values(self, values: Any) -> FieldBatch:
        self.check_values(values)
        vectors = self._shape_values(values).astype(np.float64)
        return self._make_batch(Arrays(vectors, np.ones(len(vectors), bool)))

    def list_values(self, values: Any) -> list[Any]:
        return self._shape_values(values).tolist()

    def _shape_values(self, values: Any) -> NDArray[Any]:
        """Return checked vectors [k,n,d] of a caller, who may leave out n = 1."""
        vectors = np.asarray(values)
        return vectors.reshape(len(vectors), self.positions, self._map.data_width)

    def read_values(self, numbers: ArrayLike, part: str) -> list[Any]:
        return self._tables(part).read(self.name, numbers).values.tolist()

    def _make_batch(self, found: Arrays) -> FieldBatch:
        present = torch.from_numpy(found.present)
        normalized = self._map.encode(torch.from_numpy(found.values))
        # The normalizer moves zeros, but the values of an absent sample must be 0.
        vectors = torch.where(present[:, None, None], normalized, 0.0)
        return vector_field(vectors, absent=~present)

    def decode(self, states: Tensor) -> list[dict[str, Any]]:
        return [{"vectors": vectors.tolist()} for vectors in self._plain_arrays(states)]

    def _plain_arrays(self, states: Tensor) -> NDArray[Any]:
        return self._map.decode(states).cpu().numpy()

    def fingerprints(self) -> dict[str, str]:
        digest = hashlib.sha256(str(self._map.data_width).encode())
        for name, tensor in sorted(self._map.tensors().items()):
            digest.update(f"{name} {list(tensor.shape)}".encode())
            # little-endian, so that the fingerprint is the same on every machine
            digest.update(tensor.numpy().astype("<f8").tobytes())
        return {"normalizer": digest.hexdigest()[:16]}


def present_chunks(tables: Tables, name: str, part: str = TRAIN) -> Iterator[NDArray[np.float64]]:
    """Yield the vectors of all samples of a part that have the field, in chunks [k,d]."""
    for found in _read_blocks(tables, name, part):
        vectors = found.values[found.present]
        yield vectors.reshape(-1, vectors.shape[-1])


def _read_blocks(tables: Tables, name: str, part: str = TRAIN) -> Iterator[Arrays]:
    """Read the column `name` of a part in blocks."""
    table = tables(part)
    for start in range(0, len(table), AT_ONCE):
        yield table.read(name, np.arange(start, min(start + AT_ONCE, len(table))))


def _check_vocabulary(name: str, vocabulary: Vocabulary, tokenizer: Tokenizer) -> None:
    """Raise DataError if a vocabulary was built for another tokenizer."""
    theirs = vocabulary.tokenizer_fingerprint
    has_other_fingerprint = bool(theirs) and theirs != tokenizer.fingerprint
    if vocabulary.num_tokens != tokenizer.num_tokens or has_other_fingerprint:
        raise DataError(
            f'The vocabulary of the field "{name}" belongs to another tokenizer: it has '
            f"{vocabulary.num_tokens} tokens of tokenizer {theirs or '(not recorded)'}, but the "
            f"tokenizer of the field has {tokenizer.num_tokens} tokens and the fingerprint "
            f"{tokenizer.fingerprint}. Build the vocabulary from this tokenizer, or use the "
            "tokenizer of the vocabulary."
        )
