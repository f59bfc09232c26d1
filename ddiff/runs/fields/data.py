"""Data of a run of several fields: samples, tokenizers, vocabularies and normalizers."""

from __future__ import annotations

from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import ArrayLike
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors

from ddiff.atomic import write_atomic
from ddiff.core.gaussian import GaussianProcess, VectorDecoder
from ddiff.core.normalizer import IdentityNormalizer, Normalizer
from ddiff.core.vocabulary import Vocabulary
from ddiff.data.cache import Cache
from ddiff.data.columns import (
    AT_ONCE,
    ColumnShape,
    FieldsDocuments,
    FieldsTable,
    TextColumn,
    TokenColumn,
)
from ddiff.data.documents import Documents, documents_from_texts
from ddiff.data.encoded_vectors import EncodedVectors
from ddiff.data.fields_batch import FieldsBatch
from ddiff.data.files import read_bytes, read_json, write_json
from ddiff.data.packing import PackedRows
from ddiff.data.permutation import row_at
from ddiff.data.tokenizer import Tokenizer
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION
from ddiff.errors import ArgumentError, DataError
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.fields_recipe import FieldsRecipe, FieldTables
from ddiff.run_dir.files import FIELD_SHAPE, FIELDS, NORMALIZER, TOKENIZER, VOCABULARY
from ddiff.runs.fields.encoded import encode_texts, make_columns
from ddiff.runs.fields.values import (
    ColumnTokens,
    FieldShape,
    FieldValues,
    TextEncoder,
    TextValues,
    TokenValues,
    VectorValues,
    present_chunks,
)
from ddiff.runs.saved_tokenizer import load_saved_tokenizer


class RunFields:
    """Data of a recipe of several fields, read at first use.

    Args:
        recipe: the recipe.
        saved: directory of a trained run, whose tokenizers, vocabularies and normalizers are used.
            The data are then read only if samples of them are needed. None: the components of the
            recipe are built, some of them from the training data.
    """

    def __init__(self, recipe: FieldsRecipe, saved: str | Path | None = None) -> None:
        self.recipe = recipe
        self._saved = None if saved is None else Path(saved)
        self._cache = Cache()

    # ------------------------------------------------------------------ samples

    @cached_property
    def documents(self) -> FieldsDocuments:
        """Samples with one column per field. Vectors of a text are computed if they are missing.

        Raises DataError if the columns of the data set are not the fields of the recipe.
        """
        found = self._stored_documents
        encoded = {}
        for name, tables in self.recipe.fields.items():
            if tables.keys.encode is not None:
                encoded[name] = make_columns(self.encode(name), tables.keys.encode)
        if not encoded:
            return found
        train: dict[str, Any] = {name: columns.train for name, columns in encoded.items()}
        validation: dict[str, Any] = {name: columns.validation for name, columns in encoded.items()}
        return FieldsDocuments(
            FieldsTable(found.train.columns | train),
            FieldsTable(found.validation.columns | validation),
            found.entropies,
        )

    @cached_property
    def _stored_documents(self) -> FieldsDocuments:
        """Samples of the data set, without vectors that the recipe computes."""
        documents: FieldsDocuments = self.recipe.data.build(
            seed=self.recipe.seed, cache=self._cache
        )
        check_columns(self.recipe, documents.shapes)
        return documents

    def _table(self, part: str) -> FieldsTable:
        return self.documents.train if part == TRAIN else self.documents.validation

    def _stored_table(self, part: str) -> FieldsTable:
        stored = self._stored_documents
        return stored.train if part == TRAIN else stored.validation

    @property
    def num_validation(self) -> int:
        """Number of validation samples."""
        return len(self.documents.validation)

    def lacking(self) -> set[frozenset[str]]:
        """Return the combinations of fields that some training samples lack."""
        return self.documents.train.lacking()

    def encode(self, name: str) -> EncodedVectors:
        """Compute the vectors of a field with the key `encode`, unless the cache contains them."""
        source = self.recipe.fields[name].keys.encode
        assert source is not None
        values = self._text_fields[source]
        return encode_texts(self.recipe, values, self._stored_documents, self._cache)

    def read(self) -> None:
        """Read and check the training and the validation values of all fields."""
        for values in self.fields.values():
            for part in (TRAIN, VALIDATION):
                values.read(part)

    def batch_at(self, step: int, micro: int, rank: int = 0, world_size: int = 1) -> FieldsBatch:
        """Return micro-batch `micro` of rank `rank` at a training step, on the CPU.

        A slot is an index of a sample in the global batch. At step k, slot s contains the sample
        `row_at(seed, k * batch + s)`. Here `batch` is the number of slots, and `row_at` shuffles
        the training samples. The global batch therefore depends neither on the number of ranks nor
        on the number of micro-batches. Each pair (micro-batch, rank) gets the same number of
        consecutive slots, and the pairs are in lexicographic order.
        """
        keys = self.recipe.train
        size = keys.batch // (keys.accumulate * world_size)
        first = (micro * world_size + rank) * size
        slots = np.arange(first, first + size)
        samples = row_at(self.recipe.seed, step * keys.batch + slots, len(self.documents.train))
        return self._make_batch(samples, TRAIN, slots)

    def validation_batch(self, numbers: ArrayLike) -> FieldsBatch:
        """Return the validation samples `numbers` [B]. The index of a sample is its number."""
        return self._make_batch(numbers, VALIDATION, numbers)

    def _make_batch(self, samples: ArrayLike, part: str, index: ArrayLike) -> FieldsBatch:
        fields = {name: values.encode(samples, part) for name, values in self.fields.items()}
        return FieldsBatch(fields, torch.from_numpy(np.array(index, np.int64)))

    # ------------------------------------------------------------------ fields

    @cached_property
    def shapes(self) -> dict[str, ColumnShape]:
        """Descriptions of the columns, by name, in the order of the recipe."""
        found = self.documents.shapes if self._saved is None else self._saved_shapes(self._saved)
        return {name: found[name] for name in self.recipe.fields}

    def _saved_shapes(self, saved: Path) -> dict[str, ColumnShape]:
        """Read the descriptions of the columns in the directory of a trained run."""
        # pictures are not saved, because a data set describes them without its data
        preview = self.recipe.data.preview() or {}
        shapes = {}
        for name in self.recipe.fields:
            values = read_json(str(saved / FIELDS / name / FIELD_SHAPE), "RunFields")
            picture = preview[name].picture if name in preview else None
            shapes[name] = ColumnShape(**values, picture=picture)
        return shapes

    @cached_property
    def _text_fields(self) -> dict[str, TextValues]:
        """Values of the fields of texts, by name, for the columns that the data set has.

        The vectors of the fields with `encode` are computed from these values afterwards.
        """
        texts = {}
        for name, tables in self.recipe.fields.items():
            if tables.keys.encode is None and tables.tokenizer is not None:
                texts[name] = self._build_texts(name, tables)
        return texts

    @cached_property
    def fields(self) -> dict[str, FieldValues]:
        """Values of each field, by name, in the order of the recipe."""
        fields: dict[str, FieldValues] = {}
        for name, tables in self.recipe.fields.items():
            shape = self.shapes[name]
            if shape.kind == "texts":
                fields[name] = self._text_fields[name]
            elif shape.kind == "tokens":
                fields[name] = self._build_tokens(name, tables, shape)
            else:
                normalizer = self._build_normalizer(name, tables, shape)
                fields[name] = VectorValues(name, shape, normalizer, self._table)
        return fields

    def _file(self, name: str, file: str) -> str | None:
        """Return the path of a saved file of a field; None if the run is not saved."""
        if self._saved is None:
            return None
        return str(self._saved / FIELDS / name / file)

    def _build_texts(self, name: str, tables: FieldTables) -> TextValues:
        spec = tables.tokenizer
        length = tables.keys.length
        assert spec is not None
        assert length is not None
        saved = self._file(name, TOKENIZER)
        tokenizer: Tokenizer
        if saved is not None:
            tokenizer = load_saved_tokenizer(spec, saved)
        else:
            documents = _present_texts(self._stored_documents, name)
            tokenizer = spec.build(documents=documents, cache=self._cache)
        encoder = TextEncoder(name, tokenizer, length, tables.keys.long == "cut")

        def build_vocabulary(values: TextValues) -> Vocabulary:
            return self._build_vocabulary(values, tables.vocabulary, tokenizer)

        return TextValues(encoder, build_vocabulary, self._stored_table)

    def _build_tokens(self, name: str, tables: FieldTables, shape: ColumnShape) -> TokenValues:
        def build_vocabulary(values: TokenValues) -> Vocabulary:
            # the names of tokens are known only from the data, which a saved run does not need
            names = None
            if self._saved is None:
                column = self._table(TRAIN)[name]
                assert isinstance(column, TokenColumn)
                names = column.names
            tokens = ColumnTokens(values.num_tokens, names)
            return self._build_vocabulary(values, tables.vocabulary, tokens)

        return TokenValues(name, shape, build_vocabulary, self._table)

    def _build_vocabulary(
        self, values: TextValues | TokenValues, spec: ComponentSpec, tokenizer: Any
    ) -> Vocabulary:
        saved = self._file(values.name, VOCABULARY)
        if saved is not None:
            return Vocabulary.load(saved)
        # rows are made only for a vocabulary that uses them
        rows: PackedRows | None = values.rows if spec.takes_input("rows") else None
        found: Vocabulary = spec.build(tokenizer=tokenizer, rows=rows, cache=self._cache)
        return found

    def _build_normalizer(self, name: str, tables: FieldTables, shape: ColumnShape) -> Normalizer:
        """Load the normalizer of a saved run, or fit it to the training vectors.

        The fitted tensors are cached, so that all processes of a run use the same ones. Vectors of
        a field with a decoder of values are checked once, and not fitted.
        """
        spec = tables.normalizer
        decoder = find_grid(name, tables, shape)
        saved = self._file(name, NORMALIZER)
        if saved is not None:
            return load_normalizer(saved, spec)
        width = shape.width
        assert width is not None

        def write(place: Path) -> None:
            normalizer: Normalizer
            if decoder is None:
                chunks = present_chunks(self._table, name)
                normalizer = spec.build(chunks=chunks, width=width)
            else:
                self._check_grid(name, decoder)
                # Pictures of mostly one value have a small deviation, which "none" would refuse.
                normalizer = IdentityNormalizer(width)
            save_normalizer(normalizer, str(place / NORMALIZER))

        inputs: dict[str, Any] = {
            "component": spec.to_dict(),
            "origin": str(spec.component.origin),
            "vectors": self.documents.train[name].fingerprint,
            "width": width,
        }
        if decoder is not None and decoder.values is not None:
            inputs["values"] = decoder.values.tolist()
            inputs["validation"] = self.documents.validation[name].fingerprint
        entry = self._cache.load_or_build("normalizers", inputs, write)
        return load_normalizer(str(entry / NORMALIZER), spec)

    def _check_grid(self, name: str, decoder: VectorDecoder) -> None:
        """Raise DataError if a number of the samples is not a value of the decoder."""
        for part in (TRAIN, VALIDATION):
            for chunk in present_chunks(self._table, name, part):
                try:
                    decoder.check(torch.from_numpy(chunk))
                except ArgumentError as error:
                    raise DataError(f'Column "{name}", {part} samples: {error}') from error

    # ------------------------------------------------------------------ record

    def component_fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of tokenizers, vocabularies and normalizers, for a checkpoint."""
        found = {}
        for name, values in self.fields.items():
            for component, fingerprint in values.fingerprints().items():
                found[f"{component} of {name}"] = fingerprint
        return found

    def data_fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of the training and the validation samples."""
        return {
            "training samples": self.documents.train.fingerprint,
            "validation samples": self.documents.validation.fingerprint,
        }

    def fingerprints(self) -> dict[str, str]:
        """Return the fingerprints of components and samples, by their names in a checkpoint."""
        return self.component_fingerprints() | self.data_fingerprints()

    def save(self, directory: str | Path) -> None:
        """Write tokenizers, vocabularies and normalizers into `directory`/fields/NAME.

        `RunFields(recipe, directory)` reads them.
        """
        for name, values in self.fields.items():
            folder = Path(directory) / FIELDS / name
            shape = self.shapes[name]
            described = {key: value for key, value in vars(shape).items() if key != "picture"}
            write_json(str(folder / FIELD_SHAPE), described)
            if values.tokenizer is not None:
                values.tokenizer.save(str(folder / TOKENIZER))
            if values.vocabulary is not None:
                values.vocabulary.save(str(folder / VOCABULARY))
            if values.normalizer is not None:
                save_normalizer(values.normalizer, str(folder / NORMALIZER))


# ---------------------------------------------------------------------- dry runs


def preview_fields(recipe: FieldsRecipe) -> dict[str, FieldShape] | None:
    """Return the shape of each field without reading data, for a dry run.

    Returns None if a shape is unknown without the data. Raises DataError if the columns of the data
    set are not the fields of the recipe.
    """
    columns = recipe.data.preview()
    if columns is None:
        return None
    check_columns(recipe, columns)
    shapes = {}
    for name, tables in recipe.fields.items():
        # the dimension of an encoder is known only when it is built
        if tables.keys.encode is not None:
            return None
        shape = _preview_field(tables, columns[name])
        if shape is None:
            return None
        shapes[name] = shape
    return shapes


def _preview_field(tables: FieldTables, column: ColumnShape) -> FieldShape | None:
    grid = None if column.picture is None else column.picture.grid
    if column.kind == "vectors":
        assert column.positions is not None
        width = tables.normalizer.preview(width=column.width)
        return None if width is None else FieldShape(None, width, column.positions, grid)
    num_tokens = column.num_tokens
    positions = column.positions
    if column.kind == "texts":
        assert tables.tokenizer is not None
        num_tokens = tables.tokenizer.preview()
        positions = tables.keys.length
    assert positions is not None
    vocabulary = tables.vocabulary.preview(num_tokens=num_tokens)
    return None if vocabulary is None else FieldShape(vocabulary, None, positions, grid)


# ---------------------------------------------------------------------- checks and files


def check_columns(recipe: FieldsRecipe, columns: Mapping[str, ColumnShape]) -> None:
    """Raise DataError if the columns of a data set do not fit the fields of a recipe."""
    stored = {name for name, tables in recipe.fields.items() if tables.keys.encode is None}
    if stored != set(columns):
        described = ", ".join(f'"{name}" ({shape})' for name, shape in columns.items())
        missing = _quote(name for name in recipe.fields if name in stored - set(columns))
        unused = _quote(name for name in columns if name not in stored)
        raise DataError(
            "[data] must have one column for each field of the recipe that is not computed by "
            f"`encode`. Columns of the data: {described}. Fields of the recipe: "
            f"{_quote(recipe.fields)}. Fields without column: {missing}. Columns without field: "
            f"{unused}. Rename, add or remove tables [fields.NAME]."
        )
    for name in columns:
        _check_field(name, recipe.fields[name], columns[name])


def _check_field(name: str, tables: FieldTables, column: ColumnShape) -> None:
    """Raise DataError if the keys of a field do not fit its column."""
    table = f"[fields.{name}]"
    is_text = column.kind == "texts"
    needed = "vectors" if column.kind == "vectors" else "tokens"
    if needed not in tables.process.members.states:
        raise DataError(
            f'{table}: the process "{tables.process.component.name}" is not for {needed}, but the '
            f"column of the data holds {column}. Choose a process of {needed}, or change the "
            "column with the keys of [data]."
        )
    if is_text and tables.tokenizer is None:
        raise DataError(
            f"{table} needs a tokenizer, because the column of the data holds texts. Set "
            'tokenizer = "words" (texts of few different words) or "bpe".'
        )
    if is_text and tables.keys.length is None:
        raise DataError(
            f"{table} needs length, the number of tokens of each sample, because the column of the "
            "data holds texts. Shorter texts are filled with end marks."
        )
    if not is_text and tables.tokenizer is not None:
        raise DataError(
            f"{table} must have no tokenizer, because the column of the data holds {column}. "
            "Remove the tokenizer."
        )
    if not is_text and tables.keys.length is not None:
        raise DataError(
            f"{table} must have no length, because the column of the data holds {column}. Remove "
            "the length."
        )
    if column.kind == "vectors":
        find_grid(name, tables, column)


def find_grid(name: str, tables: FieldTables, column: ColumnShape) -> VectorDecoder | None:
    """Return the decoder of a field whose process has one for a grid of values, else None.

    The values are in units of the data. A normalizer would give every number of a vector another
    grid, and add a volume to nats of discrete data. Raises DataError if the field has one.
    """
    process = tables.process.build(vocabulary=None, width=column.width)
    if not isinstance(process, GaussianProcess) or process.decoder.values is None:
        return None
    normalizer = tables.normalizer.component.name
    if normalizer != "none":
        raise DataError(
            f'[fields.{name}] normalizer must be "none", because the process has decoder = "grid", '
            f'whose values are in units of the data; got "{normalizer}". Set normalizer = "none". '
            "If the numbers of the data set are not in [-1, 1] yet, scale the data set and values: "
            "x becomes 2 (x - low) / (high - low) - 1."
        )
    return process.decoder


def _quote(names: Any) -> str:
    return ", ".join(f'"{name}"' for name in names) or "none"


def _present_texts(documents: FieldsDocuments, name: str) -> Documents:
    """Return the texts of all samples that have one, for learning a tokenizer."""
    parts = []
    for part, table in ((TRAIN, documents.train), (VALIDATION, documents.validation)):
        texts: list[str] = []
        for start in range(0, len(table), AT_ONCE):
            column = table[name]
            assert isinstance(column, TextColumn)
            block = column.texts[start : start + AT_ONCE]
            texts.extend(text for text in block if text is not None)
        if part == TRAIN and not texts:
            raise DataError(
                f'Column "{name}": no training sample has a text, so that no tokenizer can be '
                "learned. Correct the data, or remove the field."
            )
        # a tokenizer is learned from training texts, and does not need validation texts
        parts.append(documents_from_texts(texts or [""]))
    return Documents(*parts)


def save_normalizer(normalizer: Normalizer, path: str) -> None:
    """Write the tensors of a normalizer and the widths of its vectors to a safetensors file."""
    tensors = {name: tensor.contiguous() for name, tensor in normalizer.tensors().items()}
    tensors["data_width"] = torch.tensor(normalizer.data_width)
    write_atomic(path, save_safetensors(tensors))


def load_normalizer(path: str, spec: ComponentSpec) -> Normalizer:
    """Read a normalizer that `save_normalizer` has written.

    `spec`: component that built the normalizer. Raises DataError if the file cannot be read.
    """
    content = read_bytes(path, "load_normalizer")
    try:
        tensors = load_safetensors(content)
        width = int(tensors.pop("data_width"))
    except Exception as error:  # the safetensors library raises its own errors
        raise DataError(
            f"load_normalizer: {path} is not a complete file of a normalizer ({error}). Restore "
            "the file from a copy."
        ) from error
    found: Normalizer = spec.load(tensors=tensors, width=width)
    return found
