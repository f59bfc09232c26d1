"""Noise schedules of Gaussian processes: z_t = a(t) x + sigma(t) eps with standard normal eps.

A schedule defines a and sigma as functions of the time t in [0,1], where t = 0 is clean and t = 1
is noise. The signal-to-noise ratio SNR = (a / sigma)^2 falls with t. Its derivative is computed by
autograd. "VP" (variance preserving) means a^2 + sigma^2 = 1.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import final

import torch
from torch import Tensor

from ddiff.core.description import SettingsRepr
from ddiff.errors import ArgumentError

# Steps of the bisection in `time_of_log_snr`: each halves the interval of 1, so the result is as
# accurate as float64 allows even near t = 0.
BISECTIONS = 200


class GaussianSchedule(SettingsRepr, ABC):
    """Signal factor a(t) and noise deviation sigma(t), both float64 in the shape of t.

    a(t) / sigma(t) must fall strictly on (0,1). A subclass should compute a accurately near t = 1
    and sigma accurately near t = 0, where they may be 0.
    """

    preserves_variance: bool = False
    """True if a^2 + sigma^2 = 1 at all times."""

    @abstractmethod
    def signal(self, t: Tensor) -> Tensor:
        """Return a(t) >= 0, the factor of the clean vector."""

    @abstractmethod
    def deviation(self, t: Tensor) -> Tensor:
        """Return sigma(t) >= 0, the standard deviation of the noise."""

    def ratio(self, t: Tensor) -> Tensor:
        """Return a(t) / sigma(t), the square root of SNR(t). It is +inf at t = 0 if sigma is 0."""
        return self.signal(t) / self.deviation(t)

    def log_snr(self, t: Tensor) -> Tensor:
        """Return the natural logarithm of SNR(t)."""
        return 2.0 * (self.signal(t).log() - self.deviation(t).log())

    def time_of_log_snr(self, log_snr: float) -> float:
        """Return the time t at which log SNR(t) has the given value, by bisection.

        Returns 0 if log SNR is smaller at every t > 0, and 1 if it is larger at every t < 1.
        """
        early = 0.0
        late = 1.0
        for _ in range(BISECTIONS):
            middle = (early + late) / 2.0
            if float(self.log_snr(torch.tensor(middle, dtype=torch.float64))) > log_snr:
                early = middle
            else:
                late = middle
        return late


@final
class CosineVP(GaussianSchedule):
    """Cosine schedule: a = cos(pi t / 2), sigma = sin(pi t / 2) (arXiv 2102.09672, without offset).

    SNR(1) = 0.
    """

    preserves_variance = True

    def signal(self, t: Tensor) -> Tensor:
        # sin((1 - t) pi/2) = cos(t pi/2) keeps its relative accuracy near t = 1.
        return torch.sin((1.0 - t) * (math.pi / 2))

    def deviation(self, t: Tensor) -> Tensor:
        return torch.sin(t * (math.pi / 2))


@final
class Flow(GaussianSchedule):
    """Straight paths of rectified flow and flow matching: a = 1 - t, sigma = t (arXiv 2209.03003).

    SNR(1) = 0. The schedule is not variance preserving.
    """

    def signal(self, t: Tensor) -> Tensor:
        return 1.0 - t

    def deviation(self, t: Tensor) -> Tensor:
        return t


@final
class LinearBetaVP(GaussianSchedule):
    """VP schedule with a noise rate that rises linearly (arXiv 2006.11239, 2011.13456).

    a^2 = exp(-(smallest t + (largest - smallest) t^2 / 2)). SNR(1) = 4.3e-5 with the default rates.

    Args:
        smallest: noise rate at t = 0, > 0.
        largest: noise rate at t = 1, >= smallest.
    """

    preserves_variance = True

    def __init__(self, smallest: float = 0.1, largest: float = 20.0) -> None:
        if not 0.0 < smallest <= largest:
            raise ArgumentError(
                "LinearBetaVP: 0 < smallest <= largest must hold for the noise rates; got "
                f"{smallest} and {largest}."
            )
        self.smallest = smallest
        self.largest = largest

    def signal(self, t: Tensor) -> Tensor:
        return torch.exp(self._log_signal_squared(t) / 2.0)

    def deviation(self, t: Tensor) -> Tensor:
        # 1 - a^2 without cancellation near t = 0.
        return (-torch.expm1(self._log_signal_squared(t))).sqrt()

    def _log_signal_squared(self, t: Tensor) -> Tensor:
        return -(self.smallest * t + (self.largest - self.smallest) * t**2 / 2.0)


@final
class SigmoidVP(GaussianSchedule):
    """VP schedule in which a^2 is a sigmoid, rescaled to fall from 1 to 0 (arXiv 2301.10972).

    a^2 = (S(span) - S(x)) / (S(span) - S(-span)) with S the logistic function and x from -span at
    t = 0 to span at t = 1. SNR(1) = 0.

    Args:
        span: largest argument of the logistic function, > 0.
    """

    preserves_variance = True

    def __init__(self, span: float = 3.0) -> None:
        if not 0.0 < span <= 30.0:
            raise ArgumentError(f"SigmoidVP: span must be in (0, 30]; got {span}.")
        self.span = span

    def signal(self, t: Tensor) -> Tensor:
        return self._share(1.0 - t).sqrt()

    def deviation(self, t: Tensor) -> Tensor:
        # The logistic function is symmetric, so 1 - a(t)^2 = a(1 - t)^2, without cancellation.
        return self._share(t).sqrt()

    def _share(self, t: Tensor) -> Tensor:
        """Return (S(x) - S(-span)) / (S(span) - S(-span)) with x = span (2 t - 1)."""
        x = self.span * (2.0 * t - 1.0)
        # S(x) - S(y) = S(x) S(-y) (1 - exp(y - x)), accurate if x is near y.
        rise = torch.sigmoid(x) * -torch.expm1(-2.0 * self.span * t)
        whole = 1.0 / (1.0 + math.exp(-self.span)) * -math.expm1(-2.0 * self.span)
        return rise / whole


@final
class ZeroTerminal(GaussianSchedule):
    """VP schedule whose signal factor is shifted and scaled to reach 0 at t = 1 (arXiv 2305.08891).

    a'(t) = (a(t) - a(1)) / (1 - a(1)) and sigma' = sqrt(1 - a'^2), for the a of `base`.

    Args:
        base: VP schedule with a(0) = 1, such as `LinearBetaVP`.
    """

    preserves_variance = True

    def __init__(self, base: GaussianSchedule) -> None:
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        first, last = base.signal(ends).tolist()
        if abs(first - 1.0) > 1e-9 or not base.preserves_variance:
            raise ArgumentError(
                "ZeroTerminal: base must be a variance-preserving schedule with a(0) = 1; got "
                f"{base} with a(0) = {first}. Schedules such as Flow reach 0 without this change."
            )
        self.base = base
        self._last = last

    def signal(self, t: Tensor) -> Tensor:
        shifted = self.base.signal(t) - self._last
        return shifted.clamp(min=0.0) / (1.0 - self._last)

    def deviation(self, t: Tensor) -> Tensor:
        # 1 - a = sigma^2 / (1 + a) without cancellation near t = 0.
        below_one = self.base.deviation(t) ** 2 / (1.0 + self.base.signal(t))
        lost = below_one / (1.0 - self._last)
        return (lost * (1.0 + self.signal(t))).sqrt()
