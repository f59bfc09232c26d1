"""The one numerics policy of the engine.

Formulas hold no epsilon. Marginals are exact at t = 0 and t = 1. Rates and weights, which may diverge at an end where
the state that they belong to has probability zero, are read at the nearest interior time instead. Times and per-row
weights are float64; what has the width of the vocabulary keeps the law's own dtype.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddiff.errors import NonFiniteError

EARLIEST = 1e-12
LATEST = 1.0 - 1e-12
FLOOR = 1e-14  # of its share in a score a token keeps at least so much where the score says that it has no probability


def interior(t: Tensor) -> Tensor:
    """`t` moved into [1e-12, 1 - 1e-12], where every rate and weight is finite."""
    return t.clamp(EARLIEST, LATEST)


def to_column(values: Tensor, wide: Tensor) -> Tensor:
    """Per-row values [r] as a column [r,1] in the dtype of `wide`, so that nothing of width S turns float64."""
    return values.to(wide.dtype).unsqueeze(-1)


def safe_log(mass: Tensor) -> Tensor:
    """ln mass; -inf where the mass is 0, and no gradient there (the plain log gives 0/0 = NaN to all that it sums)."""
    return torch.where(mass == 0, 1.0, mass).log().masked_fill(mass == 0, -torch.inf)


def log_normalize(log_mass: Tensor) -> Tensor:
    """[r,n] log of the shares of masses; even where a row has no mass at all."""
    empty = log_mass.isneginf().all(-1, keepdim=True)
    return log_mass.masked_fill(empty, 0.0).log_softmax(-1)


def where_or_zero(read: Tensor, values: Tensor) -> Tensor:
    """`values` where they are read, 0 elsewhere; for the input of a formula whose result is dropped there.

    To drop the result alone is not enough: where it is infinite, its gradient is 0 * inf = NaN.
    """
    return torch.where(read, values, 0.0)


def apply_temperature(log_p: Tensor, temperature: float) -> Tensor:
    """Log-weights of p^(1/T) along the last dimension, for T >= 0; 0 keeps only the first of the likeliest entries.

    The largest log p is subtracted before the division, so that every T > 0 is finite at the likeliest entry.
    """
    largest, first = log_p.max(-1, keepdim=True)
    if temperature == 0.0:
        return torch.full_like(log_p, -torch.inf).scatter(-1, first, 0.0)
    # a T below the smallest normal number is that number: 1/T would be infinite, and 0 * inf is NaN
    scale = max(temperature, torch.finfo(log_p.dtype).tiny)
    return torch.where(log_p == largest, 0.0, (log_p - largest) / scale)


def evaluate_per_time(values: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """values(t) [r,...] for t [r], read once for neighbours of the same time: the positions of a sequence mostly are.

    On a device, which would have to be asked how many there are, it is read for every row.
    """
    if t.device.type != "cpu":
        return values(t)
    distinct, place = t.unique_consecutive(return_inverse=True)
    return values(distinct)[place]


def may_be_true(condition: Tensor) -> bool:
    """Whether any entry is true, as far as the host can say: a device is not waited for, and there one may be."""
    return condition.device.type != "cpu" or bool(condition.any())


class Constant:
    """A tensor that is copied once to each device that reads it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copies = {tensor.device: tensor}
        self._first = tensor

    def on(self, device: torch.device) -> Tensor:
        if device not in self._copies:
            self._copies[device] = self._first.to(device)
        return self._copies[device]


def draw_index(weights: Tensor, u: Tensor) -> Tensor:
    """Inverse-CDF draw: the first index whose cumulative weight exceeds u * total. weights [r,n] >= 0, u [r] -> [r].

    Sums are float64; the index is clamped to the last positive weight, so rounding at u -> 1 never names an impossible one.
    NonFiniteError where a row's weights have no positive finite sum.
    """
    cdf = weights.double().cumsum(-1)
    drawable = (cdf[:, -1] > 0) & (cdf[:, -1] < torch.inf)
    if not bool(drawable.all()):
        raise NonFiniteError(
            f"draw_index: weights must have a positive, finite sum in every row; got {cdf[~drawable, -1][0]}. Either the "
            "predicted distribution holds NaN (the network's weights or inputs are not finite: go back to an earlier "
            "checkpoint), or it gives no probability to anything below the state that a row is in."
        )
    target = (u * cdf[:, -1]).unsqueeze(-1)
    index = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    last = weights.shape[-1] - 1 - (weights > 0).flip(-1).int().argmax(-1)
    return torch.minimum(index, last)
