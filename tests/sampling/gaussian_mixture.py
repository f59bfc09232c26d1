"""Exact predictions for a number from a mixture of two normals under a Gaussian process."""

from __future__ import annotations

import zlib
from typing import Any

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.gaussian import GaussianProcess, PredictedMean
from ddiff.core.process import Query
from ddiff.core.rng import CounterRng
from ddiff.core.times import Noisy
from ddiff.sampling.gaussian import GaussianSampler
from ddiff.sampling.loop import Canvas

SHARE = torch.tensor([0.35, 0.65], dtype=torch.float64)
MEAN = torch.tensor([-1.1, 0.6], dtype=torch.float64)
SPREAD = torch.tensor([0.3, 0.5], dtype=torch.float64)


def network_of_means(process: GaussianProcess, predict: Any) -> Network:
    """Make a network from predict(z [r,d], a [r,1], sigma [r,1]) -> x_hat [r,d]."""

    def network(noisy: Noisy) -> Query:
        def query(rows: Tensor, node: Tensor, fn: Any, *per_row: Tensor) -> Any:
            z = noisy.zt.flatten(0, 1)[rows]
            t = noisy.t.reshape(-1)[rows]
            a = process.signal(t).unsqueeze(-1)
            sigma = process.deviation(t).unsqueeze(-1)
            return fn(PredictedMean(predict(z, a, sigma)), *per_row)

        return query

    return network


def mixture_mean(z: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
    """Return E[x | z] [r,1] for x from the mixture."""
    variance = a**2 * SPREAD**2 + sigma**2
    distance = z - a * MEAN
    log_weight = SHARE.log() - 0.5 * (distance**2 / variance + variance.log())
    means = MEAN + a * SPREAD**2 / variance * distance
    return (log_weight.softmax(-1) * means).sum(-1, keepdim=True)


def transport(process: GaussianProcess, z1: Tensor) -> Tensor:
    """Return z_0 / a_0 [r] at the end of the probability flow from z1 [r] at t = 1.

    In one dimension the flow keeps the quantiles of the marginals.
    """
    ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
    a = process.signal(ends)
    sigma = process.deviation(ends)

    def cdf(z: Tensor, end: int) -> Tensor:
        deviation = (a[end] ** 2 * SPREAD**2 + sigma[end] ** 2).sqrt()
        return (SHARE * torch.special.ndtr((z.unsqueeze(-1) - a[end] * MEAN) / deviation)).sum(-1)

    target = cdf(z1, 1)
    low = torch.full_like(z1, -6.0)
    high = torch.full_like(z1, 6.0)
    for _ in range(60):
        middle = (low + high) / 2.0
        is_below = cdf(middle, 0) < target
        low = torch.where(is_below, middle, low)
        high = torch.where(is_below, high, middle)
    return (low + high) / 2.0 / a[0]


def sample_from(
    sampler: GaussianSampler, process: GaussianProcess, network: Network, z1: Tensor
) -> Tensor:
    """Return the samples [r,d] that start from the states z1 [r,d] at t = 1."""
    index = torch.arange(len(z1))
    free = torch.ones(len(z1), 1, dtype=torch.bool)
    start = Canvas(z1.unsqueeze(1), free.double(), ~free, free)
    canvases = list(sampler.run(process, network, start, lambda k: BatchRng(0, k, index, 1)))
    return canvases[-1].zt[:, 0]


class BatchRng(CounterRng):
    """Generator that draws a whole batch at once, to draw many samples quickly."""

    def derive(self, purpose: str, length: int) -> BatchRng:
        return BatchRng(self.seed, self.step, self.index, length, purpose)

    def _draw_channel(self, channel: str, length: int) -> Tensor:
        key = zlib.crc32(f"{self.seed} {self.step} {self.purpose} {channel}".encode())
        generator = torch.Generator().manual_seed(key)
        return torch.rand(len(self.index), length, dtype=torch.float64, generator=generator)
