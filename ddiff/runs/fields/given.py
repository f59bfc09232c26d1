"""Given values of a field: texts, token ids, or vectors in units of the data."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ddiff.data.text import check_text
from ddiff.errors import ArgumentError, explain_error
from ddiff.runs.fields.values import FieldValues


def repeat_given(values: FieldValues, given: Any, count: int) -> Any:
    """Return given values of a field as a list of texts or an array, one entry per sample.

    `given` is one value for all samples or a list with one value per sample. A text is a str,
    tokens are integers [n], and vectors are floats [n,d] in units of the data, or [d] if n is 1.

    Raises ArgumentError for values of another form or number.
    """
    if values.tokenizer is not None:
        return _repeat_texts(values.name, given, count)
    try:
        array = np.asarray(given)
    except ValueError as error:
        raise ArgumentError(
            f'sample: given["{values.name}"] must be numbers of the same shape for every sample; '
            f"NumPy cannot make an array of them: {error}."
        ) from error
    array = _add_samples(values, array)
    values.check_values(array)
    if len(array) == 1:
        array = np.repeat(array, count, 0)
    _check_count(values.name, len(array), count)
    return array


def _add_samples(values: FieldValues, array: NDArray[Any]) -> NDArray[Any]:
    """Add the dimension of the samples to a value for all samples, which lacks it."""
    single = 1 if values.vocabulary is not None or values.positions == 1 else 2
    return array[None] if array.ndim == single else array


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
        array = np.load(texts[0], allow_pickle=False)
    except (OSError, ValueError, EOFError) as error:
        raise ArgumentError(f"{label}: {explain_error(error) or error}") from error
    try:
        values.check_values(_add_samples(values, array))
    except ArgumentError as error:
        error.args = (f"{label}: {error} The file holds {array.dtype} {list(array.shape)}.",)
        raise
    return array


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
