"""Given values of a field: texts, token ids, or vectors in units of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ddiff.data.fields_batch import FieldBatch
from ddiff.data.text import check_text
from ddiff.errors import ArgumentError, explain_error
from ddiff.runs.fields.values import FieldValues


def encode_given(values: FieldValues, given: Any, count: int) -> FieldBatch:
    """Return the states of `count` samples from given values of a field.

    `given` is one value for all samples or a list with one value per sample. A text is a str,
    tokens are integers [n], and vectors are floats [n,d] in units of the data, or [d] if n is 1.

    Raises ArgumentError or DataError for values of another form or number.
    """
    if values.tokenizer is not None:
        return values.encode_values(_repeat_texts(values.name, given, count))
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise ArgumentError(
            f'sample: given["{values.name}"] must be numbers of the same shape for every sample; '
            f"got {error}."
        ) from error
    # one dimension fewer than a list of samples: one value for all samples
    single = 1 if values.vocabulary is not None or values.positions == 1 else 2
    array = array[None] if array.ndim == single else array
    if array.ndim and len(array) == 1:
        array = np.repeat(array, count, 0)
    encoded = values.encode_values(array)
    _check_count(values.name, len(array), count)
    return encoded


def read_given_option(values: FieldValues, texts: Sequence[str]) -> Any:
    """Return the value of the options `--given NAME=VALUE` of one field.

    For a field of texts, VALUE is a text, and several options give one text per sample. For other
    fields, VALUE is a file FILE.npy with the tokens or vectors.
    """
    if values.tokenizer is not None:
        return texts[0] if len(texts) == 1 else list(texts)
    label = f"--given {values.name}={texts[0]}"
    if len(texts) > 1:
        raise ArgumentError(
            f"{label}: a field of {'tokens' if values.vocabulary is not None else 'vectors'} is "
            f"given once, as a file with the values of all samples; got {len(texts)} values."
        )
    if Path(texts[0]).suffix != ".npy":
        raise ArgumentError(
            f"{label}: the value of a field without texts must be the name of a NumPy file, such "
            f"as {values.name}.npy; got {texts[0]}. numpy.save writes such files."
        )
    try:
        return np.load(texts[0], allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArgumentError(f"{label}: {explain_error(error) or error}") from error


def _repeat_texts(name: str, given: Any, count: int) -> list[str]:
    if isinstance(given, str):
        given = [given] * count
    if not isinstance(given, list | tuple):
        raise ArgumentError(
            f'sample: given["{name}"] must be a text, or a list of texts with one per sample; got '
            f"{type(given).__name__}."
        )
    texts = [check_text(text, f'sample: given["{name}"]') for text in given]
    _check_count(name, len(texts), count)
    return texts


def _check_count(name: str, found: int, count: int) -> None:
    if found != count:
        raise ArgumentError(
            f'sample: given["{name}"] must have one value for all samples, or {count}, one per '
            f"sample; got {found}. Set count to {found}, or give one value."
        )
