"""Read token clusters and embeddings from files and pretrained models."""

from __future__ import annotations

import json
from collections.abc import Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors.numpy import load as load_safetensors

from ddiff.data.files import read_bytes
from ddiff.data.pretrained import load_pretrained
from ddiff.errors import DataError

_Ints = NDArray[np.int64]
_NO_PICKLE = (
    "Pickled files (.pt, .pkl) are not read, because they can run code: load such a file where you "
    "trust it, and save the array with numpy.save or safetensors."
)


def read_clusters(
    paths: Sequence[str], num_tokens: int, *, extra: int = 0, mask_token_id: int | None = None
) -> list[_Ints]:
    """Read a tree over tokens from one file per level, the finest level first.

    The first file holds the cluster of each of the `num_tokens` tokens, the second file the parent
    of each of these clusters, and so on. Clusters are numbered 0, 1, 2, ... without gaps. A file is
    .npy, .json (a list, or an object from index to cluster) or .safetensors (one tensor). Returns
    one array per file. Raises DataError for a file of a wrong length, with the expected and the
    actual length.

    The last two arguments are for the files published with arXiv 2510.08632, whose tokens differ
    from those of the tokenizer.

    Args:
        extra: number of entries at the end of the first file that are ignored: they belong to
            special tokens that the tokenizer does not have.
        mask_token_id: id of a token that has no entry in the first file. This token gets the
            cluster of the token with the previous id, an arbitrary choice without effect, because
            the token does not occur in text.
    """
    if not paths:
        raise DataError(
            "read_clusters: paths must name at least one file of token clusters; got none."
        )
    tokens = _read_integers(paths[0])
    _check_length(paths[0], len(tokens), num_tokens, extra, mask_token_id)
    tokens = tokens[: len(tokens) - extra]
    if mask_token_id is not None:
        if mask_token_id >= num_tokens:
            raise DataError(
                f"mask_token_id must be one of the tokenizer's {num_tokens} tokens, "
                f"0..{num_tokens - 1}; got {mask_token_id}."
            )
        neighbor = max(mask_token_id - 1, 0)
        tokens = np.insert(tokens, mask_token_id, tokens[neighbor])
    levels = [tokens, *(_read_integers(path) for path in paths[1:])]
    for number, (path, level) in enumerate(zip(paths, levels)):
        if number > 0:
            clusters_below = levels[number - 1].max() + 1
            if len(level) != clusters_below:
                raise DataError(
                    f"{path} has {len(level)} entries, but the level below it has {clusters_below} "
                    "clusters. Give one parent for each cluster."
                )
        _check_no_gap(path, level)
    return levels


def _check_length(
    path: str, length: int, num_tokens: int, extra: int, mask_token_id: int | None
) -> None:
    has_mask = mask_token_id is not None
    expected = num_tokens + extra - has_mask
    if length == expected:
        return
    reason = f"the tokenizer has {num_tokens} tokens"
    if extra:
        reason += f", and extra = {extra}"
    if has_mask:
        reason += ", one of them the mask"
    raise DataError(
        f"{path} has {length} entries, but {expected} are expected: {reason}. Use the tokenizer "
        "for which the file was made, or set extra (number of entries at the end of the file that "
        "belong to no token) or mask_token_id (id of a token without an entry)."
    )


def read_embeddings(path: str, num_tokens: int) -> NDArray[np.float32]:
    """Read embeddings [V, d] of V = `num_tokens` tokens from a .npy or .safetensors file."""
    matrix = _read_array(path)
    if matrix.ndim != 2 or matrix.dtype.kind != "f" or len(matrix) != num_tokens:
        raise DataError(
            f"{path} must hold one float matrix with a row for each of the tokenizer's "
            f"{num_tokens} tokens; it holds {matrix.dtype} of shape {matrix.shape}. Use the "
            "tokenizer for which the file was made."
        )
    if not np.isfinite(matrix).all():
        row = int(np.argmin(np.isfinite(matrix).all(1)))
        raise DataError(
            f"{path} holds NaN or infinity, first in row {row}. Compute or export the embeddings "
            "again."
        )
    return matrix.astype(np.float32)


def load_model_embeddings(source: str, num_tokens: int) -> NDArray[np.float32]:
    """Load the input embeddings [num_tokens, d] of a `transformers` model.

    `source` is a local directory or a hub name. Rows of the embedding table after the first
    `num_tokens` rows are padding and are left out.
    """
    from transformers import AutoModel  # takes seconds to import

    model = load_pretrained(AutoModel.from_pretrained, source, "model")
    try:
        table = model.get_input_embeddings().weight
    except (AttributeError, NotImplementedError) as error:
        raise DataError(
            f"The model {source!r} ({type(model).__name__}) has no table of input embeddings. Name "
            "a language model."
        ) from error
    if table.ndim != 2 or not table.isfinite().all():
        raise DataError(
            f"The embeddings of {source!r} must be one matrix of finite numbers; they contain NaN "
            f"or infinity, or have a shape {list(table.shape)} with another number of dimensions. "
            "Download or export the model again."
        )
    if len(table) < num_tokens:
        raise DataError(
            f"The embeddings of {source!r} have {len(table)} rows, but the tokenizer has "
            f"{num_tokens} tokens. Use the model's own tokenizer."
        )
    return table.detach().float().numpy()[:num_tokens]


def _read_integers(path: str) -> _Ints:
    array = _read_array(path)
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) == 0:
        raise DataError(
            f"{path} must hold one list of integers (the cluster of each entry); "
            f"it holds {array.dtype} of shape {array.shape}. Save a one-dimensional integer array."
        )
    if array.dtype.kind == "u" and array.max() > np.iinfo(np.int64).max:
        raise DataError(
            f"{path}: clusters must be numbered from 0 without gaps; the file holds {array.max()}. "
            "Number the clusters again."
        )
    return array.astype(np.int64)


def _read_array(path: str) -> NDArray[Any]:
    suffix = Path(path).suffix
    readers = {".npy": _from_npy, ".json": _from_json, ".safetensors": _from_safetensors}
    if suffix not in readers:
        raise DataError(
            f"{path}: expected a file ending in {', '.join(readers)}; got {suffix or 'no ending'}. "
            f"{_NO_PICKLE}"
        )
    content = read_bytes(path, "clusters and embeddings")
    try:
        return readers[suffix](content)
    except Exception as error:  # each format has different error classes for a damaged file
        raise DataError(
            f"{path} is not a complete {suffix} file of one array ({error}). {_NO_PICKLE}"
        ) from error


def _from_npy(content: bytes) -> NDArray[Any]:
    found = np.load(BytesIO(content), allow_pickle=False)
    if not isinstance(found, np.ndarray):
        raise ValueError("the file is an archive of arrays (.npz)")
    return found


def _from_json(content: bytes) -> NDArray[Any]:
    values = json.loads(content, object_pairs_hook=_check_distinct)
    if isinstance(values, dict):
        keys = sorted(values, key=int)
        if [int(key) for key in keys] != list(range(len(keys))):
            raise ValueError("the keys are not 0, 1, 2, ... without gaps")
        values = [values[key] for key in keys]
    return np.array(values)


def _check_distinct(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("a key occurs twice")
    return found


def _from_safetensors(content: bytes) -> NDArray[Any]:
    tensors = load_safetensors(content)
    if len(tensors) != 1:
        raise ValueError(f"the file holds {len(tensors)} tensors: {', '.join(sorted(tensors))}")
    return next(iter(tensors.values()))


def _check_no_gap(path: str, level: _Ints) -> None:
    if level.min() < 0:
        raise DataError(
            f"{path}: clusters must be numbered from 0; the file holds {level.min()}. Number the "
            "clusters again."
        )
    # This is checked before the members are counted, because counts up to a huge cluster number
    # would fill the memory.
    if level.max() >= len(level):
        raise DataError(
            f"{path} has {len(level)} entries and the largest cluster number {level.max()}, so "
            "that some cluster with a smaller number has no member. "
            "Number the clusters from 0 without gaps."
        )
    empty = np.flatnonzero(np.bincount(level) == 0)
    if len(empty):
        raise DataError(
            f"{path}: cluster {empty[0]} has no member ({len(empty)} of {level.max() + 1} clusters "
            "are empty). Number the clusters without gaps."
        )
