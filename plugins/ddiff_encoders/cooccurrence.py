"""Encoder from co-occurrence counts of the corpus; needs no model and no download."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, final

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from ddiff import (
    ArgumentError,
    Cache,
    ComponentConfig,
    PositiveFloat,
    Rows,
    Seed,
    Tokenizer,
    compute_cooccurrence_embeddings,
)

# Number of tokens in which co-occurrences are counted: more take long and change little.
COUNTED = 2**26
FORMAT = 1  # increase it when the same settings give other vectors


@final
class CooccurrenceEncoder:
    """Weighted mean of co-occurrence vectors of the tokens, learned from the training text.

    The vector of a text with the tokens w_1, ..., w_n is

        sum_i c(w_i) v(w_i) / sum_i c(w_i),    c(w) = a / (a + p(w))

    v(w) is the co-occurrence vector of token w, and p(w) its frequency in the training rows. The
    weights c are those of smooth inverse frequency (Arora et al. 2017): frequent tokens count less.
    Special tokens, and tokens without a co-occurrence vector, are left out. A text without other
    tokens has no vector.

    Args:
        vectors: [V,D] vectors of the tokens. A token with a zero vector is left out.
        weights: [V] weights c of the tokens.
        tokenizer: tokenizer with V tokens.
        fingerprint: identifier of all inputs.
    """

    class Config(ComponentConfig):
        dim: Annotated[int, Field(gt=0, le=65536)] = 64
        """Dimensions of a vector."""
        window: Annotated[int, Field(gt=0, le=1024)] = 4
        """Largest distance, in tokens, at which two tokens count as co-occurring."""
        smoothing: PositiveFloat = 1e-3
        """Frequency a at which the weight of a token is one half."""
        seed: Seed = 0
        """Seed of the truncated singular value decomposition."""

    @classmethod
    def build(
        cls, config: Config, *, tokenizer: Tokenizer, rows: Rows, cache: Cache | None
    ) -> CooccurrenceEncoder:
        inputs = {
            "format": FORMAT,
            "rows": rows.fingerprint,
            "tokenizer": tokenizer.fingerprint,
            "dim": config.dim,
            "window": config.window,
            "seed": config.seed,
        }
        if cache is None:
            vectors = _token_vectors(config, tokenizer, rows)
        else:
            # All processes read one file: the decomposition may depend on the number of threads.
            def write(place: Path) -> None:
                np.save(place / "vectors.npy", _token_vectors(config, tokenizer, rows))

            vectors = np.load(cache.load_or_build("token_vectors", inputs, write) / "vectors.npy")
        counts = rows.token_counts()
        frequency = counts / max(1, counts.sum())
        weights = config.smoothing / (config.smoothing + frequency)
        weights[list(tokenizer.special_ids)] = 0.0
        identity = repr([sorted(inputs.items()), config.smoothing])
        fingerprint = hashlib.sha256(identity.encode()).hexdigest()[:32]
        return cls(vectors, weights, tokenizer, fingerprint)

    def __init__(
        self,
        vectors: NDArray[np.float32],
        weights: NDArray[np.float64],
        tokenizer: Tokenizer,
        fingerprint: str,
    ) -> None:
        self.dim: int = vectors.shape[1]
        self.fingerprint = fingerprint
        self._vectors = vectors.astype(np.float64)
        self._weights = np.where(vectors.any(1), weights, 0.0)
        self._tokenizer = tokenizer

    def encode(self, texts: Sequence[str]) -> NDArray[np.float32]:
        encoded = np.full((len(texts), self.dim), np.nan, np.float32)
        for row, ids in enumerate(self._tokenizer.encode(list(texts))):
            # text by text, so that a vector does not depend on the other texts
            weights = self._weights[ids]
            total = weights.sum()
            if total > 0.0:
                encoded[row] = weights @ self._vectors[ids] / total
        return encoded


def _token_vectors(
    config: CooccurrenceEncoder.Config, tokenizer: Tokenizer, rows: Rows
) -> NDArray[np.float32]:
    """Compute the co-occurrence vectors [V,D]. Raises ArgumentError if D exceeds their rank."""
    ids, document = rows.stream(COUNTED)
    vectors = compute_cooccurrence_embeddings(
        ids,
        document,
        tokenizer.num_tokens,
        width=config.dim,
        window=config.window,
        seed=config.seed,
    )
    # columns beyond the rank of the counts are zero
    rank = int(vectors.any(0).sum())
    if rank < config.dim:
        raise ArgumentError(
            f"dim must be at most {rank}, the rank of the co-occurrence counts of this corpus and "
            f"tokenizer; got {config.dim}. Set dim = {rank}, or use a tokenizer with more tokens."
        )
    return vectors
