"""Encode the documents of a recipe as vectors: `ddiff encode`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch

from ddiff.data.cache import Cache
from ddiff.data.corpus import Corpus, StreamedCorpus
from ddiff.data.documents import Documents, fingerprint_texts
from ddiff.data.encoded_vectors import EncodingSettings
from ddiff.data.encoding import (
    Encoder,
    EncodingJob,
    EncodingResult,
    check_vector_folder,
    get_positions,
)
from ddiff.data.tokenizer_workers import TRAIN, VALIDATION
from ddiff.distributed.launcher import get_rank_info
from ddiff.distributed.single import resolve_device
from ddiff.errors import ArgumentError, DataError, PluginError, RecipeError
from ddiff.recipe.component import ComponentSpec
from ddiff.recipe.model import BaseRecipe, Recipe
from ddiff.run_dir.destination import check_destination
from ddiff.runs.data import RunText

SHARD_SIZE = 4096
"""Default number of documents in a shard: the most work that a killed process loses."""


class EncodedDocuments(NamedTuple):
    """Output of `ddiff encode`: a table of training and validation documents, and remarks."""

    titles: list[str]
    parts: list[list[str]]
    remarks: list[str]


def encode_documents(
    recipe: Recipe,
    out: str | None = None,
    *,
    shard_size: int = SHARD_SIZE,
    max_samples: int | None = None,
) -> EncodedDocuments:
    """Encode every document of a recipe as one vector.

    Several processes may call this function with the same arguments at the same time. A call
    resumes an unfinished folder, and verifies a finished folder.

    Args:
        recipe: recipe with a table [encoder].
        out: output folder on this machine; None: the run directory with the ending `-vectors`.
        shard_size: number of documents in a file.
        max_samples: largest number of training documents, and of validation documents; None: all.

    Raises an error, before anything is written, if the recipe has no encoder or no texts, or if the
    folder holds other files or other vectors.
    """
    spec = recipe.encoder
    if spec is None:
        raise RecipeError(
            f"{recipe.source}: `ddiff encode` needs a table [encoder], which the recipe does not "
            'have. Add one, such as encoder = "cooccurrence" with the plugin "encoders", or on the '
            "command line: --set encoder='\"cooccurrence\"'."
        )
    folder = _check_folder(out or f"{recipe.run_dir}-vectors")
    text = RunText(recipe)
    documents = text.documents
    with recipe.data.prefix_errors():
        _check_has_texts(documents)
    encoder = build_encoder(
        spec,
        {
            "documents": documents,
            # texts are tokenized and packed only for an encoder that uses the tokens
            "tokenizer": text.tokenizer if spec.takes_input("tokenizer") else None,
            "rows": text.train_rows if spec.takes_input("rows") else None,
            "device": resolve_encoder_device(recipe),
            "cache": Cache(),
        },
    )
    settings = describe_encoding(spec, encoder, documents, shard_size, max_samples)
    result = EncodingJob(folder, documents, encoder, settings, label=spec.table).run()
    return _summarize(folder, result)


def _check_folder(out: str) -> Path:
    """Return the output folder. Raises ArgumentError for a remote, foreign or unwritable folder."""
    place = check_destination(out, "ddiff encode --out", folder=True)
    if place.local is None:
        raise ArgumentError(
            "ddiff encode --out: the folder must be on this machine, because processes lock files "
            f"in it and vectors are memory-mapped; got {out}. Encode into a local folder, and copy "
            "it afterwards."
        )
    check_vector_folder(place.local)
    return place.local


def _check_has_texts(documents: Documents | Corpus) -> None:
    """Raise DataError for a corpus without texts, or without a fixed list of documents."""
    if isinstance(documents, StreamedCorpus):
        raise DataError(
            "streaming = true has no fixed list of documents, and vectors belong to document "
            "numbers. Set streaming = false to encode the documents."
        )
    if "text" not in documents.train.column_names:
        raise DataError(
            "the data set holds tokens and no text, so that its documents cannot be encoded. Use "
            "the data set from which the token shards were made."
        )


def build_encoder(spec: ComponentSpec, inputs: Mapping[str, Any]) -> Encoder:
    """Build an encoder, and check its dimension and fingerprint.

    `inputs`: documents, tokenizer, rows, device and cache.
    """
    encoder: Encoder = spec.build(**inputs)
    is_positive = isinstance(encoder.dim, int) and encoder.dim > 0
    if not is_positive or not isinstance(encoder.fingerprint, str) or not encoder.fingerprint:
        raise PluginError(
            f"The {spec.component} must have dim, a positive integer, and fingerprint, a non-empty "
            f"string; got dim = {encoder.dim!r} and fingerprint = {encoder.fingerprint!r}. Fix the "
            "encoder."
        )
    positions = get_positions(encoder)
    if positions is not None and not (isinstance(positions, int) and positions > 0):
        raise PluginError(
            f"The {spec.component} must have positions, a positive integer, or None for one vector "
            f"per text; got {positions!r}. Fix the encoder."
        )
    return encoder


def describe_encoding(
    spec: ComponentSpec,
    encoder: Encoder,
    documents: Documents | Corpus,
    shard_size: int = SHARD_SIZE,
    max_samples: int | None = None,
) -> EncodingSettings:
    """Return the settings of the vectors of `documents`. All vectors of a folder have them.

    `spec` describes `encoder`; the other arguments are those of `encode_documents`.
    """
    return EncodingSettings(
        encoder=encoder.fingerprint,
        dim=encoder.dim,
        data={
            TRAIN: fingerprint_texts(documents.train),
            VALIDATION: fingerprint_texts(documents.validation),
        },
        shard_size=shard_size,
        max_samples=max_samples,
        description=spec.to_dict(),
        positions=get_positions(encoder),
    )


def resolve_encoder_device(recipe: BaseRecipe) -> torch.device:
    """Return [backend] device; processes of one machine use different GPUs."""
    device = resolve_device(recipe.backend_keys.device)
    info = get_rank_info()
    if device.type == "cuda" and device.index is None and info is not None:
        return torch.device("cuda", info.local_rank % torch.cuda.device_count())
    return device


def _summarize(folder: Path, result: EncodingResult) -> EncodedDocuments:
    manifest = result.manifest
    parts = []
    for part in (TRAIN, VALIDATION):
        total = manifest["documents"][part]
        missing = manifest["missing"][part]
        shards = len(manifest["parts"][part])
        parts.append([part, f"{total:,}", f"{total - missing:,}", f"{missing:,}", f"{shards:,}"])
    each = "Vectors"
    if "positions" in manifest:
        each = f"Up to {manifest['positions']} vectors per document,"
    remarks = [f"{each} of {manifest['dim']} dimensions in {folder}"]
    if result.encoded:
        speed = result.encoded / max(result.seconds, 1e-9)
        remarks.append(
            f"This process encoded {result.encoded:,} texts in {result.seconds:.1f} s: "
            f"{speed:,.0f} texts/s."
        )
    elif result.was_finished:
        remarks.append("The vectors existed already; all shards are complete and undamaged.")
    else:
        remarks.append("Other processes encoded all texts.")
    missing = sum(manifest["missing"].values())
    if missing:
        remarks.append(
            f"{missing:,} documents have no vector, because they are blank or the encoder found no "
            "known token. They are marked as missing."
        )
    titles = ["part", "documents", "vectors", "missing", "shards"]
    return EncodedDocuments(titles, parts, remarks)
