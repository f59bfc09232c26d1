"""The engine's state spaces as components of a recipe."""

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
COUNTED = 2**26  # tokens whose neighbours are counted: more would take long and change little


class Flat:
    """The words and, unless `mask = false`, one mask."""

    class Config(ComponentConfig):
        mask: bool = True

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
    """A tree by nested k-means of word embeddings; centroids are kept, special tokens form a branch of their own."""

    class Config(ComponentConfig):
        sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=64)] = (64,)
        """Nodes per level, finest first; `[512, 32]` makes a three-level tree with its root, `[1]` one cluster under it."""
        source: str = COOCCURRENCE
        """Embeddings: "cooccurrence" (of the training rows), or a .npy or .safetensors file with a row per token."""
        model: str | None = None
        """In place of a source: a transformers model (directory or hub name) whose input embeddings are clustered."""
        width: Annotated[int, Field(gt=0, le=65536)] = 64
        """Dimensions of the co-occurrence embeddings."""
        window: Annotated[int, Field(gt=0, le=1024)] = 4
        """How far apart two tokens may stand and still occur together."""
        min_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
        max_share: Annotated[float, Field(ge=1.0, le=1e9)] = 5.0
        """A cluster holds between these multiples of the mean number of members."""
        seed: Seed = 0

        @model_validator(mode="after")
        def _one_source(self) -> Clusters.Config:
            if self.model is not None and self.source != COOCCURRENCE:
                raise ValueError(
                    f"source and model both name embeddings; got {self.source!r} and {self.model!r}, keep one"
                )
            return self

    @classmethod
    def build(
        cls, config: Config, *, tokenizer: Tokenizer, rows: Rows | None, cache: Cache | None
    ) -> HierarchicalVocabulary | Vocabulary:
        from ddiff import Vocabulary

        if cache is None:
            return cls._tree(config, tokenizer, rows)
        inputs = config.model_dump() | {
            "tokenizer": tokenizer.fingerprint,
            "embeddings": cls._source_fingerprint(config, tokenizer, rows),
        }

        def write(place: Path) -> None:
            cls._tree(config, tokenizer, rows).save(str(place / "vocabulary.safetensors"))

        return Vocabulary.load(
            str(cache.load_or_build("clusters", inputs, write) / "vocabulary.safetensors")
        )

    @staticmethod
    def reads(config: Config) -> tuple[str, ...]:
        return () if config.source == COOCCURRENCE else (config.source,)

    @staticmethod
    def preview(config: Config, *, num_tokens: int | None) -> HierarchicalVocabulary | None:
        """A tree of these sizes, the nodes dealt out evenly; it has no less room than the real one."""
        import torch

        from ddiff import HierarchicalVocabulary

        if not num_tokens:
            return None
        below = (num_tokens, *config.sizes)
        if (
            below[0] < below[1]
            or min(below) < 1
            or any(above >= under for under, above in pairwise(below[1:]))
        ):
            raise ArgumentError(
                f"sizes must decrease strictly, from at most the {num_tokens} tokens to at least one cluster; got "
                f"{list(config.sizes)}."
            )
        dealt = [torch.arange(under) * above // under for under, above in pairwise(below)]
        return HierarchicalVocabulary([*dealt, *_above(config.sizes)])

    @classmethod
    def _tree(
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
            [*parents, *_above(config.sizes)], centroids, tokenizer.fingerprint
        )

    @staticmethod
    def _embeddings(config: Config, tokenizer: Tokenizer, rows: Rows | None) -> Any:
        from ddiff import compute_cooccurrence_embeddings, load_model_embeddings, read_embeddings

        if config.model is not None:
            return load_model_embeddings(config.model, tokenizer.num_tokens)
        if config.source != COOCCURRENCE:
            return read_embeddings(config.source, tokenizer.num_tokens)
        ids, document = _needed(rows).stream(COUNTED)
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
        """Of what the embeddings come from: counting costs more than the fingerprint of rows, reading a matrix does not."""
        if config.model is None and config.source == COOCCURRENCE:
            return _needed(rows).fingerprint
        return hashlib.sha256(cls._embeddings(config, tokenizer, rows).tobytes()).hexdigest()


class File:
    """A tree from token-to-cluster files."""

    class Config(ComponentConfig):
        paths: Annotated[tuple[str, ...], Field(min_length=1)]
        """.npy, .json or .safetensors, finest level first: token to cluster, cluster to coarser cluster, ..."""
        extra: NonNegativeInt = 0
        """Entries at the end of the first file for special tokens that the tokenizer has not."""
        mask_token_id: NonNegativeInt | None = None
        """A token that the first file leaves out."""

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


def _above(sizes: tuple[int, ...]) -> list[list[int]]:
    """The root over a lone cluster, which would be taken for the root itself."""
    return [[0]] if sizes == (1,) else []


def _needed(rows: Rows | None) -> Rows:
    if rows is None:
        raise DataError(
            'Clusters with source = "cooccurrence" are counted in the packed training rows, and there are none here. '
            "Give a file of embeddings as source, or a model."
        )
    return rows
