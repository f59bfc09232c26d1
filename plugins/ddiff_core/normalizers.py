"""Normalizers of fields of vectors as recipe components: linear maps to mean 0 and variance 1."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any, final

from ddiff import (
    ArgumentError,
    ComponentConfig,
    IdentityNormalizer,
    MeanStdNormalizer,
    PcaNormalizer,
    PositiveInt,
)

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

    # Data vectors in chunks [n,D], so that they need not all be in memory.
    Chunks = Iterable[Tensor | NDArray[Any]]


@final
class Unchanged:
    """Normalizer that changes nothing, for vectors that have mean 0 and variance 1 already.

    Training vectors with a standard deviation below 0.5 or above 2 are refused.
    """

    @staticmethod
    def build(config: ComponentConfig, *, chunks: Chunks) -> IdentityNormalizer:
        return IdentityNormalizer.fit(chunks)

    @staticmethod
    def load(
        config: ComponentConfig, *, tensors: Mapping[str, Tensor], width: int
    ) -> IdentityNormalizer:
        return IdentityNormalizer(width)

    @staticmethod
    def preview(config: ComponentConfig, *, width: int) -> int:
        return width


@final
class Standard:
    """Normalizer to mean 0 and standard deviation 1 of every number of the training vectors."""

    @staticmethod
    def build(config: ComponentConfig, *, chunks: Chunks) -> MeanStdNormalizer:
        return MeanStdNormalizer.fit(chunks)

    @staticmethod
    def load(config: ComponentConfig, *, tensors: Mapping[str, Tensor]) -> MeanStdNormalizer:
        return MeanStdNormalizer(tensors["mean"], tensors["std"])

    @staticmethod
    def preview(config: ComponentConfig, *, width: int) -> int:
        return width


@final
class Pca:
    """Normalizer to the first principal components of the training vectors, with variance 1.

    Components that are left out are lost: a bound in units of the data then does not exist.
    """

    class Config(ComponentConfig):
        width: PositiveInt
        """Number of principal components."""

    @classmethod
    def build(cls, config: Config, *, chunks: Chunks, width: int) -> PcaNormalizer:
        return PcaNormalizer.fit(chunks, cls.preview(config, width=width))

    @staticmethod
    def load(config: Config, *, tensors: Mapping[str, Tensor]) -> PcaNormalizer:
        return PcaNormalizer(tensors["mean"], tensors["components"], tensors["scales"])

    @staticmethod
    def preview(config: Config, *, width: int) -> int:
        if config.width > width:
            raise ArgumentError(
                f"width must be at most {width}, the numbers of a vector of the data; got "
                f"{config.width}."
            )
        return config.width
