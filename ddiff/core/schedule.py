"""Schedules: alpha_t, the probability that a token is still clean at time t.

A schedule defines one function, alpha. The derivative of alpha is computed by autograd. A subclass
may override the derivative with a closed form for speed; the conformance kit compares it with
autograd.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from itertools import pairwise
from typing import final

import torch
from torch import Tensor

from ddiff.core.description import SettingsRepr
from ddiff.core.numerics import Constant
from ddiff.errors import ArgumentError


class Schedule(SettingsRepr, ABC):
    """Probability alpha(t) that a token is still clean at time t, decreasing on [0,1].

    `closes_at_clean` declares alpha(0) = 1, and `closes_at_prior` declares alpha(1) = 0. The
    conformance kit tests both.
    """

    closes_at_clean: bool = True
    closes_at_prior: bool = True

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha(t), float64, in the shape of t."""

    def d_alpha(self, t: Tensor) -> Tensor:
        """Return d alpha / dt <= 0, by autograd of `alpha`.

        A subclass may override this method with a closed form.
        """
        with torch.enable_grad():
            time = t.detach().requires_grad_()
            return torch.autograd.grad(self.alpha(time).sum(), time)[0]

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        """Return 1 - alpha(t).

        A subclass may override this method to avoid cancellation if alpha is near 1.
        """
        return 1.0 - self.alpha(t)


@final
class LinearSchedule(Schedule):
    """Linear schedule, alpha = 1 - (1 - floor) t, with floor = alpha(1) in [0,1).

    For floor = 0 this is the log-linear noise of arXiv 2310.16834 and 2406.07524.
    """

    def __init__(self, floor: float = 0.0) -> None:
        if not 0.0 <= floor < 1.0:
            raise ArgumentError(f"LinearSchedule: floor = alpha(1) must be in [0, 1); got {floor}.")
        self.floor = floor
        self.closes_at_prior = floor == 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - t) + self.floor * t

    def d_alpha(self, t: Tensor) -> Tensor:
        return torch.full_like(t, self.floor - 1.0)

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return (1.0 - self.floor) * t


@final
class CosineSchedule(Schedule):
    """Cosine schedule, alpha = 1 - sin(pi t / 2), of Chang et al. (arXiv 2202.04200).

    At t = 0 all tokens are clean.
    """

    def alpha(self, t: Tensor) -> Tensor:
        # 1 - sin(x) = 2 sin^2((pi/2 - x)/2) keeps its relative accuracy if alpha is near 0.
        return 2.0 * torch.sin((1.0 - t) * (math.pi / 4)) ** 2

    def d_alpha(self, t: Tensor) -> Tensor:
        return -(math.pi / 2) * torch.sin((1.0 - t) * (math.pi / 2))

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))


@final
class PowerSchedule(Schedule):
    """Power schedule, alpha = 1 - t^power, with power > 0.

    With a large power most tokens are lost near t = 1, with a small power near t = 0.
    """

    def __init__(self, power: float = 1.0) -> None:
        if not power > 0:
            raise ArgumentError(f"PowerSchedule: power must be > 0; got {power}.")
        self.power = power

    def alpha(self, t: Tensor) -> Tensor:
        # -expm1(p ln t) keeps its relative accuracy if alpha is near 0.
        return -torch.expm1(self.power * torch.log(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        return -self.power * t ** (self.power - 1.0)

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return t**self.power


@final
class GeometricSchedule(Schedule):
    """Geometric schedule, alpha = exp(-sigma), sigma = sigma_min^(1-t) sigma_max^t.

    0 < sigma_min < sigma_max. This is the geometric noise of arXiv 2310.16834. A token is noise
    already at t = 0 with probability 1 - exp(-sigma_min), and still clean at t = 1 with probability
    exp(-sigma_max).
    """

    closes_at_clean = False
    closes_at_prior = False

    def __init__(self, sigma_min: float = 1e-4, sigma_max: float = 20.0) -> None:
        if not 0.0 < sigma_min < sigma_max:
            raise ArgumentError(
                f"GeometricSchedule: 0 < sigma_min < sigma_max must hold; got {sigma_min} and "
                f"{sigma_max}."
            )
        self.sigma_min = sigma_min
        self.sigma_max = sigma_max

    def sigma(self, t: Tensor) -> Tensor:
        """Return the total noise -ln alpha(t)."""
        return self.sigma_min * torch.exp(self._growth * t)

    def alpha(self, t: Tensor) -> Tensor:
        return torch.exp(-self.sigma(t))

    def d_alpha(self, t: Tensor) -> Tensor:
        sigma = self.sigma(t)
        return -self._growth * sigma * torch.exp(-sigma)

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        # 1 - exp(-sigma) without cancellation for small sigma.
        return -torch.expm1(-self.sigma(t))

    @property
    def _growth(self) -> float:
        return math.log(self.sigma_max / self.sigma_min)


# Polynomials of higher degree vary so quickly that numerical transitions (`ddiff.core.clock`) and
# quadratures of the conformance kit lose accuracy.
MOST_VALUES = 17


@final
class BernsteinSchedule(Schedule):
    """Schedule through a table: 1 - alpha is the Bernstein polynomial of rising values.

    With n + 1 values v_0 = 0 <= v_1 <= ... <= v_n = 1,

        1 - alpha(t) = sum_k v_k C(n,k) t^k (1 - t)^(n - k).

    The polynomial follows the values at the times k/n and smooths them. It rises, and stays inside
    (0,1) for t in (0,1). If no value of one table is below that of another table of equal length,
    the polynomials are ordered in the same way, strictly if the tables differ. A polynomial of
    degree at most n has a table of which it is the polynomial, but the values of this table may
    fall.

    Args:
        values: 2 to 17 values at equally spaced times, from 0 at t = 0 to 1 at t = 1.
    """

    def __init__(self, values: Sequence[float]) -> None:
        values = tuple(float(value) for value in values)
        rises = all(first <= second for first, second in pairwise(values))
        if not 2 <= len(values) <= MOST_VALUES or not rises or (values[0], values[-1]) != (0, 1):
            raise ArgumentError(
                f"BernsteinSchedule: values must be 2 to {MOST_VALUES} numbers that rise from 0 to "
                f"1; got {values}."
            )
        self.values = values
        degree = len(values) - 1
        self._clean = _scale_by_binomials([1.0 - value for value in values])
        self._noise = _scale_by_binomials(values)
        slopes = [degree * (second - first) for first, second in pairwise(values)]
        self._slopes = _scale_by_binomials(slopes)

    def alpha(self, t: Tensor) -> Tensor:
        return _evaluate_bernstein(self._clean, t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return -_evaluate_bernstein(self._slopes, t)

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return _evaluate_bernstein(self._noise, t)


def _scale_by_binomials(values: Sequence[float]) -> Constant:
    """Return the constants v_k C(n,k) of n + 1 values v_k."""
    degree = len(values) - 1
    scaled = [value * math.comb(degree, k) for k, value in enumerate(values)]
    return Constant(torch.tensor(scaled, dtype=torch.float64))


def _evaluate_bernstein(scaled: Constant, t: Tensor) -> Tensor:
    """Return sum_k scaled[k] t^k (1 - t)^(n-k) in the shape of t.

    No term is negative, so the sum keeps its relative accuracy near t = 0 and t = 1.
    """
    coefficients = scaled.on(t.device)
    k = torch.arange(len(coefficients), dtype=torch.float64, device=t.device)
    time = t.unsqueeze(-1)
    terms = coefficients * time**k * (1.0 - time) ** k.flip(0)
    return terms.sum(-1)
