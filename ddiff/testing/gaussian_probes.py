"""Inputs on which laws of Gaussian processes are tested: quadrature nodes and data distributions.

All inputs are the same at every call. Shapes: r rows, width d of a vector.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ddiff.core.elbo import NelboTerms, nelbo
from ddiff.core.gaussian import GaussianProcess, PredictedMean
from ddiff.core.information import TimeChange
from ddiff.core.numerics import EARLIEST, LATEST
from ddiff.core.process import Query
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy, Times
from ddiff.errors import ArgumentError
from ddiff.testing.probes import logit_ends, logit_nodes, num_panels, product, times

MAX_WIDTH = 3
HERMITE = 64  # nodes for a smooth function of one standard normal number
FINE = 801  # equidistant nodes for the logarithm of a mixture of separate values
# Beyond 8 deviations the uniform of a normal number rounds to 0 or 1. Nodes beyond this reach have
# a total weight of 1e-14.
REACH = 7.9

Predict = Callable[[Tensor, Tensor], Tensor]
"""Prediction as a function: (zt [r,d], t [r]) -> x_hat [r,d]."""


def require_narrow(process: object) -> GaussianProcess:
    """Return the process. Raises ArgumentError for other objects, and for a width above 3."""
    if not isinstance(process, GaussianProcess):
        raise ArgumentError(
            f"check_gaussian: process must be a GaussianProcess; got {process!r}. For a process of "
            "tokens use check_process."
        )
    if process.width > MAX_WIDTH:
        raise ArgumentError(
            f"check_gaussian: process must have a width of at most {MAX_WIDTH}, because the laws "
            f"are checked by quadrature; got {process.width}."
        )
    return process


def normal_nodes(count: int = HERMITE) -> tuple[Tensor, Tensor]:
    """Return Gauss-Hermite nodes h and weights for the mean over a standard normal number.

    Nodes beyond `REACH` are left out, and the weights sum to 1.
    """
    h, weight = (torch.from_numpy(values) for values in np.polynomial.hermite_e.hermegauss(count))
    inside = h.abs() < REACH
    return h[inside], weight[inside] / weight[inside].sum()


def nodes_for(process: GaussianProcess) -> tuple[Tensor, Tensor]:
    """Return normal nodes for the logarithm of the distribution of z_t, with data `data_of`.

    For data on a grid of values the logarithm is steep between two values. Equidistant nodes then
    need a smaller number than Gauss-Hermite nodes, which are dense at 0.
    """
    if process.decoder.values is None:
        return normal_nodes()
    h = torch.linspace(-REACH, REACH, FINE, dtype=torch.float64)
    weight = torch.exp(-0.5 * h**2)
    return h, weight / weight.sum()


def normal_grid(width: int, count: int = 12) -> tuple[Tensor, Tensor]:
    """Return nodes [r,width] and weights [r] for the mean over a standard normal vector."""
    h, weight = normal_nodes(count)
    index = torch.stack(product(*[torch.arange(len(h))] * width), -1)
    return h[index], weight[index].prod(-1)


def vectors(process: GaussianProcess, count: int = 3) -> Tensor:
    """Return clean vectors [count,d], which are different in every dimension.

    If the decoder has a grid of values, the numbers are values of the grid.
    """
    place = torch.arange(count * process.width).reshape(count, process.width)
    values = process.decoder.values
    if values is not None:
        return values[place % len(values)]
    return torch.linspace(-1.7, 1.3, place.numel(), dtype=torch.float64)[place]


# ------------------------------------------------------------------ distributions of the data


class Mixture(NamedTuple):
    """Distribution of one number: a mixture of normals, or of single values if `spread` is 0.

    Attributes:
        weight: probabilities [k] of the components.
        mean: means [k].
        spread: deviations [k].
    """

    weight: Tensor
    mean: Tensor
    spread: Tensor

    def log_noisy(self, z: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
        """Return ln q_t(z), the log-density of z_t = a x + sigma eps, in the shape of z."""
        return self._log_parts(z, a, sigma).logsumexp(-1)

    def clean_mean(self, z: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x | z_t = z] in the shape of z, the exact prediction."""
        return (self.shares(z, a, sigma) * self.mean_given(z, a, sigma)).sum(-1)

    def shares(self, z: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
        """Return P(component k | z_t = z) [...,k]."""
        return self._log_parts(z, a, sigma).softmax(-1)

    def mean_given(self, z: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
        """Return E[x | z_t = z, component k] [...,k]."""
        a = a.unsqueeze(-1)
        variance = a**2 * self.spread**2 + sigma.unsqueeze(-1) ** 2
        gain = a * self.spread**2 / variance
        return self.mean + gain * (z.unsqueeze(-1) - a * self.mean)

    def log_density(self, x: Tensor) -> Tensor:
        """Return ln p(x): a density, or the probability of a value if the spreads are 0."""
        if bool((self.spread == 0).all()):
            place = (x.unsqueeze(-1) - self.mean).abs().argmin(-1)
            return self.weight.log()[place]
        zeros = torch.zeros_like(x)
        return self.log_noisy(x, zeros + 1.0, zeros)

    def vectors(self, process: GaussianProcess) -> Tensor:
        """Return clean vectors [3,d] with positive probability."""
        if not bool((self.spread == 0).all()):
            return vectors(process)
        place = torch.arange(3 * process.width).reshape(3, process.width)
        return self.mean[place % len(self.mean)]

    def _log_parts(self, z: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
        a = a.unsqueeze(-1)
        variance = a**2 * self.spread**2 + sigma.unsqueeze(-1) ** 2
        distance = z.unsqueeze(-1) - a * self.mean
        log_normal = -0.5 * (distance**2 / variance + (2.0 * math.pi * variance).log())
        return self.weight.log() + log_normal


def data_of(process: GaussianProcess) -> Mixture:
    """Return a distribution of the numbers of a clean vector, which are independent.

    It is a mixture of two normals. If the decoder has a grid of values, it is a distribution over
    at most three of them.
    """
    values = process.decoder.values
    if values is None:
        return Mixture(times((0.4, 0.6)), times((-1.1, 0.8)), times((0.5, 0.7)))
    kept = values[:: max(1, (len(values) - 1) // 2)][:3]
    weight = times((0.5, 0.3, 0.2))[: len(kept)]
    return Mixture(weight / weight.sum(), kept, torch.zeros_like(kept))


def exact_prediction(process: GaussianProcess, data: Mixture) -> Predict:
    """Return the prediction E[x | z_t] for independent numbers of the distribution `data`."""

    def predict(zt: Tensor, t: Tensor) -> Tensor:
        a, sigma = coefficients(process, t, zt)
        return data.clean_mean(zt, a, sigma)

    return predict


def coefficients(process: GaussianProcess, t: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    """Return a(t) and sigma(t) in the shape of `like` [r,d], for t [r]."""
    a = process.signal(t).unsqueeze(-1).expand_as(like)
    return a, process.deviation(t).unsqueeze(-1).expand_as(like)


# ------------------------------------------------------------------ the bound with exact means


class Expectation(NamedTuple):
    """Exact expectations [m] in nats of the three terms of the bound, for m clean vectors."""

    closing: Tensor
    diffusion: Tensor
    decoding: Tensor

    @property
    def total(self) -> Tensor:
        return self.closing + self.diffusion + self.decoding


class _NodeRng(CounterRng):
    """Random generator whose uniforms are given numbers [B,d], the same in every channel."""

    def __init__(self, uniforms: Tensor) -> None:
        super().__init__(0, 0, torch.arange(len(uniforms)), 1)
        self.uniforms = uniforms

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        return self.uniforms


class _NodeTimes:
    """Time rule that returns given times and speeds [B,1], and the interior ends of [0,1]."""

    def __init__(self, t: Tensor, speed: Tensor) -> None:
        self.t = t
        self.speed = speed

    def draw(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> Times:
        return Times(self.t, self.speed, torch.zeros_like(self.t, dtype=torch.bool))

    def ends(
        self, clock: TimeChange, rng: CounterRng, slot: Tensor, slots: int | Tensor, length: int
    ) -> tuple[Times, Times]:
        ones = torch.ones_like(self.t)
        nowhere = torch.zeros_like(self.t, dtype=torch.bool)
        return Times(EARLIEST * ones, ones, nowhere), Times(LATEST * ones, ones, nowhere)


def expected_nelbo(
    process: GaussianProcess, predict: Predict, x: Tensor, finer: int = 1
) -> Expectation:
    """Return the exact expectation of the bound, as `core.elbo.nelbo` assembles it.

    The draws of the noise and of the time are replaced by quadrature nodes. All dimensions have the
    same node, which is exact if the prediction of a dimension depends on its own state only.

    Args:
        predict: (zt [r,d], t [r]) -> x_hat [r,d].
        x: clean vectors [m,d].
    """
    _, y, time_weight = logit_nodes(0.0, 1.0, num_panels(0.0, 1.0, finer))
    first, last = logit_ends(0.0, 1.0)
    h, normal_weight = nodes_for(process)
    sample, k, j = product(torch.arange(len(x)), torch.arange(len(y)), torch.arange(len(h)))
    t = torch.sigmoid(y)
    speed = t * (1.0 - t) * (last - first)
    rule = _NodeTimes(t[k].unsqueeze(-1), speed[k].unsqueeze(-1))
    uniforms = torch.special.ndtr(h[j]).unsqueeze(-1).expand(-1, process.width)
    terms: NelboTerms = nelbo(
        process,
        network_of_vectors(predict),
        x[sample].unsqueeze(1),
        torch.ones(len(sample), 1, dtype=torch.bool),
        rule,
        _NodeRng(uniforms),
        torch.zeros_like(sample),
        1,
    )
    weight = (time_weight[k] * normal_weight[j]).reshape(len(x), -1)
    means = []
    for term in (terms.closing, terms.diffusion, terms.decoding):
        means.append((term.reshape(len(x), -1) * weight).sum(-1))
    return Expectation(*means)


def network_of_vectors(predict: Predict) -> Callable[[Noisy], Query]:
    """Make a `Network` from a function (zt [r,d], t [r]) -> x_hat [r,d]."""

    def network(noisy: Noisy) -> Query:
        flat = noisy.zt.flatten(0, 1)
        return VectorQuery(predict(flat, noisy.t.reshape(-1)))

    return network


class VectorQuery:
    """Query that returns fixed predictions mean [n,d], and counts its calls.

    `self.queried` holds the row numbers of the latest call.
    """

    def __init__(self, mean: Tensor) -> None:
        self.mean = mean
        self.calls = 0
        self.queried = torch.empty(0, dtype=torch.long)

    def __call__(self, rows: Tensor, node: Tensor, fn: Callable[..., Any], *per_row: Tensor) -> Any:
        self.calls += 1
        self.queried = rows
        return fn(PredictedMean(self.mean[rows]), *per_row)
