"""Vectors of the texts of a field, computed by the encoder of a recipe and kept in the cache."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ddiff.data.cache import Cache, fingerprint
from ddiff.data.columns import FieldsDocuments, VectorColumn
from ddiff.data.documents import Documents, documents_from_texts
from ddiff.data.encoded_vectors import EncodedVectors, EncodingSettings, VectorPart
from ddiff.data.encoding import EncodingJob
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION
from ddiff.errors import DataError, RecipeError
from ddiff.recipe.fields_recipe import FieldsRecipe
from ddiff.runs.encode import build_encoder, describe_encoding, resolve_encoder_device
from ddiff.runs.fields.values import TextValues


class EncodedColumns(NamedTuple):
    """Columns of vectors of the training and the validation texts."""

    train: VectorColumn
    validation: VectorColumn


def encode_texts(
    recipe: FieldsRecipe, source: TextValues, documents: FieldsDocuments, cache: Cache
) -> EncodedVectors:
    """Encode the texts of a field, unless the cache contains their vectors, and open the vectors.

    Several processes share the work, and an interrupted job resumes.

    Args:
        recipe: recipe with a table [encoder].
        source: values of the field of texts.
        documents: samples with the column of texts.
        cache: cache in which the vectors are stored.
    """
    spec = recipe.encoder
    if spec is None:
        raise RecipeError(
            f"{recipe.source or recipe.name}: a field with the key `encode` needs a table "
            "[encoder]. Add the table."
        )
    texts = collect_texts(documents, source.name)
    encoder = build_encoder(
        spec,
        {
            "documents": texts,
            "tokenizer": source.encoder.tokenizer,
            # rows are built only for an encoder that uses them
            "rows": source.rows if spec.takes_input("rows") else None,
            "device": resolve_encoder_device(recipe),
            "cache": cache,
        },
    )
    settings = describe_encoding(spec, encoder, texts)
    folder = cache.root / "encoded_fields" / settings.fingerprint
    job = EncodingJob(folder, texts, encoder, settings, label=spec.table)
    try:
        return _open_vectors(folder, settings)
    except DataError:
        # The folder is missing, unfinished or damaged. The job encodes what is missing.
        job.run()
    return _open_vectors(folder, settings)


def _open_vectors(folder: Path, settings: EncodingSettings) -> EncodedVectors:
    return EncodedVectors.open(
        folder, dim=settings.dim, encoder=settings.encoder, data=settings.data
    )


def collect_texts(documents: FieldsDocuments, name: str) -> Documents:
    """Return the texts of a column as documents. A sample without text is an empty document."""
    parts = []
    for table in (documents.train, documents.validation):
        texts = table.read_texts(name, np.arange(len(table)))
        parts.append(documents_from_texts(texts.values))
    return Documents(*parts)


def make_columns(vectors: EncodedVectors, source: str) -> EncodedColumns:
    """Make columns of encoded vectors. `source`: field of the texts that were encoded."""
    return EncodedColumns(
        _make_column(vectors, vectors.train, TRAIN, source),
        _make_column(vectors, vectors.validation, VALIDATION, source),
    )


def _make_column(vectors: EncodedVectors, part: VectorPart, name: str, source: str) -> VectorColumn:
    def read(numbers: NDArray[np.int64]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        found, present = part.read(numbers)
        return found.reshape(len(numbers), part.positions, part.dim), present

    # the settings contain the fingerprints of the encoder and of the texts
    identity = fingerprint([vectors.settings.fingerprint, name])
    return VectorColumn(
        read,
        part.num_documents,
        part.positions,
        part.dim,
        fingerprint=identity,
        computed_from=source,
        present=part.present,
    )
