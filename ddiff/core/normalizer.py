"""Normalizers: invertible linear maps of vectors to mean 0 and variance 1.

A Gaussian process expects normalized data: with another scale its signal-to-noise ratio is wrong. A
normalizer is fitted on the training vectors, stored with the weights, and inverted at the output.

    normalizer = MeanStdNormalizer.fit(chunks)
    z = normalizer.encode(x)
    x = normalizer.decode(z)

If the map keeps all dimensions, a bound in data units is the bound of the normalized vector plus
`log_volume`, the logarithm of the volume that `decode` multiplies with.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable
from typing import Any, final

import torch
from numpy.typing import NDArray
from torch import Tensor

from ddiff.core.numerics import Constant
from ddiff.errors import ArgumentError

# Limits of the standard deviation of vectors that are not normalized. Outside, log SNR differs by
# more than 1.4 from that of vectors with deviation 1.
SMALLEST_STD = 0.5
LARGEST_STD = 2.0


class Normalizer(ABC):
    """Linear map between data vectors of `data_width` numbers and normalized ones of `width`."""

    data_width: int
    width: int

    @abstractmethod
    def encode(self, x: Tensor) -> Tensor:
        """Map data vectors [...,data_width] to normalized vectors [...,width], in float64."""

    @abstractmethod
    def decode(self, z: Tensor) -> Tensor:
        """Map normalized vectors [...,width] to data vectors [...,data_width], in float64."""

    @property
    @abstractmethod
    def log_volume(self) -> float | None:
        """Nats per vector that a bound in data units has in addition to the normalized bound.

        None if the map drops dimensions: there is then no density of the data vector.
        """

    @abstractmethod
    def tensors(self) -> dict[str, Tensor]:
        """Return the tensors that define the map, for a checkpoint."""


@final
class IdentityNormalizer(Normalizer):
    """Map that changes nothing, for data that have mean 0 and variance 1 already."""

    def __init__(self, width: int) -> None:
        self.data_width = width
        self.width = width

    @classmethod
    def fit(cls, chunks: Iterable[Tensor | NDArray[Any]]) -> IdentityNormalizer:
        """Check that the vectors in chunks [n,D] have a standard deviation between 0.5 and 2.

        The deviation is the root of the mean variance of the D numbers.
        """
        mean, covariance = _moments(chunks)
        deviation = float(covariance.diagonal().mean().sqrt())
        if not SMALLEST_STD <= deviation <= LARGEST_STD:
            raise ArgumentError(
                "IdentityNormalizer: the standard deviation of the vectors must be between "
                f"{SMALLEST_STD} and {LARGEST_STD}; got {deviation:.3g}. The noise of a Gaussian "
                'process has deviation 1. Use normalizer = "standard".'
            )
        return cls(len(mean))

    def encode(self, x: Tensor) -> Tensor:
        return x.double()

    def decode(self, z: Tensor) -> Tensor:
        return z.double()

    @property
    def log_volume(self) -> float:
        return 0.0

    def tensors(self) -> dict[str, Tensor]:
        return {}


@final
class MeanStdNormalizer(Normalizer):
    """Map z = (x - mean) / std in every dimension.

    Args:
        mean: mean of the data, [D].
        std: standard deviation of the data, [D], all positive.
    """

    def __init__(self, mean: Tensor, std: Tensor) -> None:
        if mean.dim() != 1 or mean.shape != std.shape:
            raise ArgumentError(
                "MeanStdNormalizer: mean and std must have one dimension of the same length; got "
                f"shapes {tuple(mean.shape)} and {tuple(std.shape)}."
            )
        constant = int((~(std > 0)).sum())
        if constant:
            raise ArgumentError(
                f"MeanStdNormalizer: std must be positive in all {len(std)} dimensions; {constant} "
                "are constant or NaN in the data, and have no density. Remove these dimensions, or "
                "use PcaNormalizer with fewer dimensions."
            )
        self.data_width = len(mean)
        self.width = len(mean)
        self._mean = Constant(mean.double())
        self._std = Constant(std.double())

    @classmethod
    def fit(cls, chunks: Iterable[Tensor | NDArray[Any]]) -> MeanStdNormalizer:
        """Fit mean and deviation of the vectors in chunks [n,D], tensors or arrays."""
        mean, covariance = _moments(chunks)
        return cls(mean, covariance.diagonal().sqrt())

    def encode(self, x: Tensor) -> Tensor:
        return (x.double() - self._mean.on(x.device)) / self._std.on(x.device)

    def decode(self, z: Tensor) -> Tensor:
        return z.double() * self._std.on(z.device) + self._mean.on(z.device)

    @property
    def log_volume(self) -> float:
        return float(self._std.on(torch.device("cpu")).log().sum())

    def tensors(self) -> dict[str, Tensor]:
        cpu = torch.device("cpu")
        return {"mean": self._mean.on(cpu), "std": self._std.on(cpu)}


@final
class PcaNormalizer(Normalizer):
    """Map to the first principal components, each divided by its deviation.

    Args:
        mean: mean of the data, [D].
        components: orthonormal rows [d,D], d <= D.
        scales: standard deviation [d] of the data along each component, all positive.
    """

    def __init__(self, mean: Tensor, components: Tensor, scales: Tensor) -> None:
        if components.dim() != 2 or components.shape != (len(scales), len(mean)):
            raise ArgumentError(
                "PcaNormalizer: components must be [d, D] for scales [d] and mean [D]; got shapes "
                f"{tuple(components.shape)}, {tuple(scales.shape)} and {tuple(mean.shape)}."
            )
        if not bool((scales > 0).all()):
            raise ArgumentError(
                f"PcaNormalizer: scales must be positive; got {scales.tolist()}. The data vary in "
                "fewer dimensions than components are given."
            )
        self.data_width = len(mean)
        self.width = len(scales)
        self._mean = Constant(mean.double())
        self._components = Constant(components.double())
        self._scales = Constant(scales.double())

    @classmethod
    def fit(cls, chunks: Iterable[Tensor | NDArray[Any]], width: int) -> PcaNormalizer:
        """Fit the first `width` principal components of the vectors in chunks [n,D].

        The chunks are tensors or arrays.
        """
        mean, covariance = _moments(chunks)
        if not 1 <= width <= len(mean):
            raise ArgumentError(
                f"PcaNormalizer: width must be between 1 and the {len(mean)} dimensions of the "
                f"data; got {width}."
            )
        variances, vectors = torch.linalg.eigh(covariance)
        # In rising order of the variance.
        components = vectors.flip(-1)[:, :width].T.contiguous()
        variances = variances.flip(-1)[:width]
        # Rounding leaves tiny variances in directions in which the data do not vary.
        smallest = float(variances[0]) * 1e-12
        if not bool((variances > smallest).all()):
            raise ArgumentError(
                f"PcaNormalizer: the data vary in {int((variances > smallest).sum())} dimensions "
                f"only; got width = {width}. Take fewer components."
            )
        return cls(mean, components, variances.sqrt())

    def encode(self, x: Tensor) -> Tensor:
        centred = x.double() - self._mean.on(x.device)
        return centred @ self._components.on(x.device).T / self._scales.on(x.device)

    def decode(self, z: Tensor) -> Tensor:
        scaled = z.double() * self._scales.on(z.device)
        return scaled @ self._components.on(z.device) + self._mean.on(z.device)

    @property
    def log_volume(self) -> float | None:
        if self.width < self.data_width:
            return None
        return float(self._scales.on(torch.device("cpu")).log().sum())

    def tensors(self) -> dict[str, Tensor]:
        cpu = torch.device("cpu")
        return {
            "mean": self._mean.on(cpu),
            "components": self._components.on(cpu),
            "scales": self._scales.on(cpu),
        }


def _moments(chunks: Iterable[Tensor | NDArray[Any]]) -> tuple[Tensor, Tensor]:
    """Return mean [D] and covariance [D,D] of the vectors in chunks [n,D], read once."""
    count = 0
    mean = torch.zeros(0, dtype=torch.float64)
    scatter = torch.zeros(0, 0, dtype=torch.float64)
    for chunk in map(torch.as_tensor, chunks):
        if not bool(chunk.isfinite().all()):
            raise ArgumentError(
                "Normalizer.fit: the vectors must be finite; got NaN or infinity. Leave out the "
                "samples without a vector."
            )
        values = chunk.reshape(-1, chunk.shape[-1]).double()
        if not len(values):
            continue
        if not count:
            mean = torch.zeros(values.shape[-1], dtype=torch.float64)
            scatter = torch.zeros(values.shape[-1], values.shape[-1], dtype=torch.float64)
        # Chan et al. 1979: combine the moments of two groups without cancellation.
        own_mean = values.mean(0)
        centred = values - own_mean
        shift = own_mean - mean
        total = count + len(values)
        scatter = scatter + centred.T @ centred
        scatter = scatter + torch.outer(shift, shift) * (count * len(values) / total)
        mean = mean + shift * (len(values) / total)
        count = total
    if count < 2:
        raise ArgumentError(f"Normalizer.fit needs at least two vectors; got {count}.")
    return mean, scatter / count
