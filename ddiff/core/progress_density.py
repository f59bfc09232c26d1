"""Densities of the progress of a field, from which times on a path are drawn."""

from __future__ import annotations

from typing import Protocol, final

import torch
from torch import Tensor

# Newton steps of `LeastVariance.quantile`; the convergence is quadratic from a close start.
NEWTON_STEPS = 12


class ProgressDensity(Protocol):
    """Density of the progress p in [0,1] of a field."""

    def density(self, p: Tensor) -> Tensor:
        """Return the density at p, in the shape of p."""

    def quantile(self, v: Tensor) -> Tensor:
        """Return the p at which the distribution function is v."""


@final
class LeastVariance:
    """Density of the progress p in [0,1] of least variance for a field of `tokens` tokens.

    At progress p about a share p of the tokens is noise, and the terms at these tokens are
    proportional to 1/p. The density sqrt(1 + 1/(n p)), normalized, then has the least variance. It
    is the density of `InformationTime.draw` for a share p.
    """

    def __init__(self, tokens: int) -> None:
        self.tokens = tokens
        self._total = self._mass(torch.tensor(float(tokens), dtype=torch.float64))

    def density(self, p: Tensor) -> Tensor:
        """Return the density at p; it is infinite at p = 0."""
        n = self.tokens
        # p = 0 has probability 0, but rounding may draw it.
        p = p.clamp(min=torch.finfo(p.dtype).tiny)
        return n * (1.0 + 1.0 / (n * p)).sqrt() / self._total.to(p.device)

    def quantile(self, v: Tensor) -> Tensor:
        """Return the p in (0,1] at which the distribution function is v."""
        target = v.clamp(min=2.0**-54) * self._total.to(v.device)
        # The mass is at most u + 2 sqrt(u), whose inverse is a start left of the solution. The
        # mass is concave, so Newton's method then converges without overshooting.
        u = (target / ((1.0 + target).sqrt() + 1.0)) ** 2
        for _ in range(NEWTON_STEPS):
            u = u + (target - self._mass(u)) / (1.0 + 1.0 / u).sqrt()
        return (u / self.tokens).clamp(max=1.0)

    @staticmethod
    def _mass(u: Tensor) -> Tensor:
        """Return the integral of sqrt(1 + 1/w) over w from 0 to u."""
        return (u * (u + 1.0)).sqrt() + torch.asinh(u.sqrt())


@final
class UniformDensity:
    """Uniform density of the progress p, for fields that are noise at every time."""

    def density(self, p: Tensor) -> Tensor:
        """Return the density 1."""
        return torch.ones_like(p)

    def quantile(self, v: Tensor) -> Tensor:
        """Return p = v."""
        return v
