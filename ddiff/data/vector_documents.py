"""Documents with a vector as a condition, from samples with a text and vectors."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa

from ddiff.data.arrow import load_or_build_table
from ddiff.data.cache import Cache
from ddiff.data.columns import AT_ONCE, FieldsDocuments, FieldsTable
from ddiff.data.documents import Documents
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION


def join_vectors(
    samples: FieldsDocuments,
    *,
    text: str = "text",
    vectors: str = "latent",
    cache: Cache | None = None,
) -> Documents:
    """Make documents with a vector condition, so that a recipe of text can use the vectors.

    The condition has the name of the column of vectors. If a sample has n vectors of d numbers,
    they become one list of n * d numbers. A sample without text is left out, and a sample without
    vectors has no value of the condition.

    Args:
        samples: samples with a column of texts and a column of vectors.
        text: name of the column of texts.
        vectors: name of the column of vectors.
        cache: cache of the documents. None: the documents are kept in memory.
    """
    join = partial(_join_part, text=text, vectors=vectors, cache=cache)
    own = (vectors,) if samples.shapes[vectors].computed_from == text else ()
    return Documents(
        join(samples.train, TRAIN), join(samples.validation, VALIDATION), own_vectors=own
    )


def _join_part(table: FieldsTable, part: str, text: str, vectors: str, cache: Cache | None) -> Any:
    """Make the documents of a part, with the columns "text", "name" and `vectors`."""
    schema = pa.schema(
        [
            ("text", pa.large_string()),
            ("name", pa.string()),
            (vectors, pa.list_(pa.float32())),
        ]
    )
    return load_or_build_table(
        schema,
        lambda: _make_batches(table, schema, part, text, vectors),
        kind="vector_documents",
        # computed only with a cache, since the fingerprint reads all samples
        make_inputs=lambda: {
            "samples": table.fingerprint,
            "part": part,
            "text": text,
            "vectors": vectors,
        },
        cache=cache,
    )


def _make_batches(
    table: FieldsTable, schema: pa.Schema, part: str, text: str, vectors: str
) -> Iterator[pa.RecordBatch]:
    for start in range(0, len(table), AT_ONCE):
        numbers = np.arange(start, min(start + AT_ONCE, len(table)))
        texts = table.read_texts(text, numbers)
        found = table.read(vectors, numbers)
        rows = []
        for row, number in enumerate(numbers):
            if not texts.present[row]:
                continue
            vector = found.values[row].ravel().tolist() if found.present[row] else None
            rows.append({"text": texts.values[row], "name": f"{part} {number}", vectors: vector})
        yield pa.RecordBatch.from_pylist(rows, schema=schema)
