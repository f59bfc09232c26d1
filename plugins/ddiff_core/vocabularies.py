"""Vocabularies (state spaces) of the engine as recipe components."""

from __future__ import annotations

import hashlib
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import Field, model_validator

from ddiff import ArgumentError, ComponentConfig, DataError, NonNegativeInt, PositiveInt, Seed

if TYPE_CHECKING:
    from ddiff import Cache, FlatVocabulary, HierarchicalVocabulary, Rows, Tokenizer, Vocabulary

COOCCURRENCE = "cooccurrence"
COUNTED = 2**26  # tokens of the corpus that are counted: more take long and change little


class Flat:
    """The tokens and, unless `mask = false`, one mask state."""

    class Config(ComponentConfig):
        mask: bool = True
        """Add a mask state."""

    @staticmethod
    def build(
        config: Config, *, tokenizer: Tokenizer, rows: Rows | None, cache: Cache | None
    ) -> FlatVocabulary:
        from ddiff import FlatVocabulary

        return FlatVocabulary(tokenizer.num_tokens, config.mask, tokenizer.fingerprint)

    @staticmethod
    def preview(config: Config, *, num_tokens: int | None) -> FlatVocabulary | None:
        from ddiff import FlatVocabulary

        return FlatVocabulary(num_tokens, config.mask) if num_tokens else None


class Clusters:
    """Tree of token clusters, by nested k-means of token embeddings.

    The centroids are stored with the tree. Special tokens form a separate branch.
    """

    class Config(ComponentConfig):
        sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=64)] = (64,)
        """Clusters per level, finest first; the root comes on top: `[512, 32]` is three levels."""
        source: str = COOCCURRENCE
        """Embeddings: "cooccurrence" (of the training rows), or a .npy or .safetensors file."""
        model: str | None = None
        """Transformers model (directory or hub name) with the embeddings, instead of source."""
        width: Annotated[int, Field(gt=0, le=65536)] = 64
        """Dimensions of the co-occurrence embeddings."""
        window: Annotated[int, Field(gt=0, le=1024)] = 4
        """Largest distance of two tokens that count as co-occurring."""
        min_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
        """Smallest cluster, as a multiple of the mean cluster size."""
        max_share: Annotated[float, Field(ge=1.0, le=1e9)] = 5.0
        """Largest cluster, as a multiple of the mean cluster size."""
        seed: Seed = 0
        """Seed of k-means and of the co-occurrence embeddings."""

        @model_validator(mode="after")
        def _check_one_source(self) -> Clusters.Config:
            if self.model is not None and self.source != COOCCURRENCE:
                raise ValueError(
                    f"source and model both name embeddings; got {self.source!r} and "
                    f"{self.model!r}, keep one"
                )
            return self

    @classmethod
    def build(
        cls, config: Config, *, tokenizer: Tokenizer, rows: Rows | None, cache: Cache | None
    ) -> HierarchicalVocabulary | Vocabulary:
        from ddiff import Vocabulary

        if cache is None:
            return cls._cluster(config, tokenizer, rows)
        inputs = config.model_dump() | {
            "tokenizer": tokenizer.fingerprint,
            "embeddings": cls._source_fingerprint(config, tokenizer, rows),
        }

        def write(place: Path) -> None:
            cls._cluster(config, tokenizer, rows).save(str(place / "vocabulary.safetensors"))

        entry = cache.load_or_build("clusters", inputs, write)
        return Vocabulary.load(str(entry / "vocabulary.safetensors"))

    @staticmethod
    def reads(config: Config) -> tuple[str, ...]:
        return () if config.source == COOCCURRENCE else (config.source,)

    @staticmethod
    def preview(config: Config, *, num_tokens: int | None) -> HierarchicalVocabulary | None:
        """Return a tree of the same sizes with evenly divided nodes, for a dry run.

        The shapes of model parameters and the memory they need are those of the real tree.
        """
        import torch

        from ddiff import HierarchicalVocabulary

        if not num_tokens:
            return None
        sizes = (num_tokens, *config.sizes)
        # The tokens may be as many as the clusters above them; further levels must shrink.
        shrinks = all(above < below for below, above in pairwise(config.sizes))
        if num_tokens < config.sizes[0] or min(sizes) < 1 or not shrinks:
            raise ArgumentError(
                f"sizes must decrease strictly, from at most the {num_tokens} tokens to at least "
                f"one cluster; got {list(config.sizes)}."
            )
        parents = [torch.arange(below) * above // below for below, above in pairwise(sizes)]
        return HierarchicalVocabulary([*parents, *_root_level(config.sizes)])

    @classmethod
    def _cluster(
        cls, config: Config, tokenizer: Tokenizer, rows: Rows | None
    ) -> HierarchicalVocabulary:
        from ddiff import HierarchicalVocabulary, nested_kmeans

        parents, centroids = nested_kmeans(
            cls._embeddings(config, tokenizer, rows),
            config.sizes,
            seed=config.seed,
            min_share=config.min_share,
            max_share=config.max_share,
            special_ids=tokenizer.special_ids,
        )
        return HierarchicalVocabulary(
            [*parents, *_root_level(config.sizes)], centroids, tokenizer.fingerprint
        )

    @staticmethod
    def _embeddings(config: Config, tokenizer: Tokenizer, rows: Rows | None) -> Any:
        from ddiff import compute_cooccurrence_embeddings, load_model_embeddings, read_embeddings

        if config.model is not None:
            return load_model_embeddings(config.model, tokenizer.num_tokens)
        if config.source != COOCCURRENCE:
            return read_embeddings(config.source, tokenizer.num_tokens)
        ids, document = _require_rows(rows).stream(COUNTED)
        return compute_cooccurrence_embeddings(
            ids,
            document,
            tokenizer.num_tokens,
            width=config.width,
            window=config.window,
            seed=config.seed,
        )

    @classmethod
    def _source_fingerprint(cls, config: Config, tokenizer: Tokenizer, rows: Rows | None) -> str:
        """Return a fingerprint of what the embeddings are computed from."""
        if config.model is None and config.source == COOCCURRENCE:
            # Counting co-occurrences costs more than hashing the rows; reading a matrix does not.
            return _require_rows(rows).fingerprint
        return hashlib.sha256(cls._embeddings(config, tokenizer, rows).tobytes()).hexdigest()


class File:
    """Tree of token clusters, from token-to-cluster files."""

    class Config(ComponentConfig):
        paths: Annotated[tuple[str, ...], Field(min_length=1)]
        """.npy, .json or .safetensors: token to cluster, then cluster to coarser cluster, ..."""
        extra: NonNegativeInt = 0
        """Entries at the end of the first file for special tokens that the tokenizer lacks."""
        mask_token_id: NonNegativeInt | None = None
        """Token without an entry in the first file."""

    @staticmethod
    def build(
        config: Config, *, tokenizer: Tokenizer, rows: Rows | None, cache: Cache | None
    ) -> HierarchicalVocabulary:
        from ddiff import HierarchicalVocabulary, read_clusters

        levels = read_clusters(
            config.paths,
            tokenizer.num_tokens,
            extra=config.extra,
            mask_token_id=config.mask_token_id,
        )
        return HierarchicalVocabulary(levels, tokenizer_fingerprint=tokenizer.fingerprint)

    @staticmethod
    def reads(config: Config) -> tuple[str, ...]:
        return config.paths


def _root_level(sizes: tuple[int, ...]) -> list[list[int]]:
    """Return a root level for a tree of one cluster, which would itself be taken for the root."""
    return [[0]] if sizes == (1,) else []


def _require_rows(rows: Rows | None) -> Rows:
    if rows is None:
        raise DataError(
            'Clusters with source = "cooccurrence" are counted in the packed training rows, and '
            "there are none here. Give a file of embeddings as source, or a model."
        )
    return rows
