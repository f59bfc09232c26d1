"""Data set of sums, such as 47+08=055, whose entropy is known."""

from __future__ import annotations

import math

import numpy as np

from ddiff import ArgumentError, ComponentConfig, Documents, PositiveInt, documents_from_texts

LARGEST = 100  # exclusive limit of a summand
LENGTH = 9  # symbols of a row


class PluginName:
    """Sums of two numbers below 100. Every row has nine symbols.

    The two summands are independent and uniform, and determine the row. The entropy of a row is
    therefore 2 ln 100 nats, and no valid bound is below this number.
    """

    class Config(ComponentConfig):
        rows: PositiveInt = 2048
        """Rows for training."""
        validation: PositiveInt = 256
        """Rows for validation."""

    @classmethod
    def build(cls, config: Config, *, length: int, seed: int) -> Documents:  # may also take cache
        cls.preview(config, length=length)
        rng = np.random.default_rng(seed)
        train = cls.draw(rng, config.rows)
        return Documents(
            documents_from_texts(train),
            documents_from_texts(cls.draw(rng, config.validation)),
            entropy_rate=2.0 * math.log(LARGEST) / LENGTH,
        )

    @staticmethod
    def draw(rng: np.random.Generator, count: int) -> list[str]:
        """Draw `count` rows."""
        pairs = rng.integers(LARGEST, size=(count, 2))
        return [f"{a:02}+{b:02}={a + b:03}" for a, b in pairs.tolist()]

    @staticmethod
    def preview(config: Config, *, length: int) -> None:
        """Raise ArgumentError if the rows of the recipe have another length than the sums."""
        if length != LENGTH:
            raise ArgumentError(
                f"[data] length must be {LENGTH}, the symbols of a sum; got {length}. "
                f"Use length = {LENGTH}."
            )
