"""Vocabularies (state spaces of a position) as recipe components."""

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
# Number of tokens in which co-occurrences are counted: more take long and change little.
COUNTED = 2**26


class Flat:
    """Flat vocabulary: the tokens and, unless `mask = false`, one mask state."""

    class Config(ComponentConfig):
        mask: bool = True
        """Add a mask state to the tokens."""

    @staticmethod
    def build(
        config: Config, *, tokenizer: Tokenizer, rows: Rows | None, cache: Cache | None
    ) -> FlatVocabulary:
        from ddiff import FlatVocabulary

        return FlatVocabulary(tokenizer.num_tokens, config.mask, tokenizer.fingerprint)

    @staticmethod
    def preview(config: Config, *, num_tokens: int | None) -> FlatVocabulary | None:
        from ddiff import FlatVocabulary

        # Without tokenizer there is no fingerprint, and shapes do not depend on the fingerprint.
        return FlatVocabulary(num_tokens, config.mask) if num_tokens else None


class Clusters:
    """Tree of token clusters, from nested k-means of token embeddings.

    The cluster centroids are stored with the tree. Special tokens form a separate branch of
    the tree.
    """

    class Config(ComponentConfig):
        sizes: Annotated[tuple[PositiveInt, ...], Field(min_length=1, max_length=64)] = (64,)
        """Number of clusters of each level, the finest level first. `[512, 32]` is a tree of 512
        clusters of tokens, 32 clusters of these clusters, and the mask."""
        source: str = COOCCURRENCE
        """Token embeddings: "cooccurrence" (from counts in the training rows), or the path of a
        .npy or .safetensors file."""
        model: str | None = None
        """Transformers model (directory or hub name) whose token embeddings are used in place of
        `source`."""
        width: Annotated[int, Field(gt=0, le=65536)] = 64
        """Dimensions of the co-occurrence embeddings."""
        window: Annotated[int, Field(gt=0, le=1024)] = 4
        """Largest distance, in tokens, at which two tokens count as co-occurring."""
        min_share: Annotated[float, Field(ge=0.0, le=1.0)] = 0.1
        """Smallest allowed cluster size, as a multiple of the mean cluster size."""
        max_share: Annotated[float, Field(ge=1.0, le=1e9)] = 5.0
        """Largest allowed cluster size, as a multiple of the mean cluster size."""
        seed: Seed = 0
        """Seed of k-means and of the co-occurrence embeddings."""

        @model_validator(mode="after")
        def _check_one_source(self) -> Clusters.Config:
            if self.model is not None and self.source != COOCCURRENCE:
                raise ValueError(
                    "token embeddings can come from source or from model, not from both; got "
                    f"source = {self.source!r} and model = {self.model!r}; leave one out"
                )
            return self

    @classmethod
    def build(
        cls, config: Config, *, tokenizer: Tokenizer, rows: Rows | None, cache: Cache | None
    ) -> HierarchicalVocabulary | Vocabulary:
        from ddiff import Vocabulary

        if cache is None:
            return cls._cluster(config, tokenizer, rows)
        # Every input of the clustering is part of the key: an equal key means an equal tree.
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
        """Return a tree with the requested level sizes and equally large clusters, for a dry run.

        A model on this tree has parameters of the same shapes as on the tree that `build` computes.
        Returns None if the number of tokens, `num_tokens`, is None.
        """
        import torch

        from ddiff import HierarchicalVocabulary

        if not num_tokens:
            return None
        sizes = (num_tokens, *config.sizes)
        # There may be one cluster per token, but each level above must be smaller than the last.
        shrinks = all(above < below for below, above in pairwise(config.sizes))
        if num_tokens < config.sizes[0] or min(sizes) < 1 or not shrinks:
            raise ArgumentError(
                f"sizes must decrease strictly, from at most {num_tokens}, the number "
                f"of tokens, to at least 1; got {list(config.sizes)}."
            )
        # Node i of `below` nodes goes to parent floor(i * above / below): equal contiguous groups.
        parents = [torch.arange(below) * above // below for below, above in pairwise(sizes)]
        return HierarchicalVocabulary([*parents, *_root_level(config.sizes)])

    @classmethod
    def _cluster(
        cls, config: Config, tokenizer: Tokenizer, rows: Rows | None
    ) -> HierarchicalVocabulary:
        from ddiff import HierarchicalVocabulary, nested_kmeans

        # Special tokens are not clustered with the others: their embeddings have no neighbours.
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
        """Return a hash of the data that determine the token embeddings.

        These data are the training rows `rows` if embeddings come from co-occurrences, else the
        embedding matrix.
        """
        if config.model is None and config.source == COOCCURRENCE:
            # Hashing the rows is cheaper than counting co-occurrences, which a cached tree avoids.
            return _require_rows(rows).fingerprint
        return hashlib.sha256(cls._embeddings(config, tokenizer, rows).tobytes()).hexdigest()


class File:
    """Tree of token clusters, read from files with the cluster of each token."""

    class Config(ComponentConfig):
        paths: Annotated[tuple[str, ...], Field(min_length=1)]
        """Files (.npy, .json, .safetensors), one per level: the first holds the cluster of each
        token, each further file the parent of each cluster of the level below."""
        extra: NonNegativeInt = 0
        """Number of entries at the end of the first file that are ignored, because the tokenizer
        does not have their tokens."""
        mask_token_id: NonNegativeInt | None = None
        """Id of a token that has no entry in the first file."""

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
    """Return the parents of an extra root level if all tokens are in one cluster, else no level.

    `sizes` are the numbers of clusters per level. A vocabulary takes a top level with one node as
    its root, which is the mask. With the sizes (1,) the single cluster would therefore become the
    mask. The result [[0]] adds a root above it. In other cases the vocabulary adds the root itself,
    and the result is an empty list.
    """
    return [[0]] if sizes == (1,) else []


def _require_rows(rows: Rows | None) -> Rows:
    if rows is None:
        raise DataError(
            '[vocabulary] source = "cooccurrence" needs packed training rows; got none. '
            "Set source to a file of token embeddings, or model to a transformers model."
        )
    return rows
