"""Numerical conventions of ddiff, and helpers that implement them.

- Formulas contain no epsilon, and marginals are exact at t = 0 and t = 1.
- A rate or weight may diverge at t = 0 or t = 1, if the state has probability zero there. Rates and
  weights are therefore evaluated at the nearest interior time, in [1e-12, 1 - 1e-12].
- Times and per-row weights are float64. Tensors with an entry per token or state keep the dtype of
  the predicted distribution.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from ddiff.errors import NonFiniteError

EARLIEST = 1e-12
LATEST = 1.0 - 1e-12

# Smallest probability that `tweedie` gives to a token, as a fraction of its entry of the score.
FLOOR = 1e-14


def interior(t: Tensor) -> Tensor:
    """Clamp t to the interior times [1e-12, 1 - 1e-12], at which rates and weights are finite."""
    return t.clamp(EARLIEST, LATEST)


def to_column(values: Tensor, wide: Tensor) -> Tensor:
    """Turn per-row values [r] into a column [r,1] in the dtype of `wide` [r,S].

    The product of the column and `wide` then keeps the dtype of `wide` instead of float64.
    """
    return values.to(wide.dtype).unsqueeze(-1)


def safe_log(mass: Tensor) -> Tensor:
    """Return the logarithm of `mass`: -inf without a gradient where the mass is 0.

    With `torch.log`, the gradient could be 0/0 = NaN there.
    """
    is_zero = mass == 0
    log_mass = torch.where(is_zero, 1.0, mass).log()
    return log_mass.masked_fill(is_zero, -torch.inf)


def log_normalize(log_mass: Tensor) -> Tensor:
    """Normalize masses [r,n] that are given by their logs, and return the logs.

    A row without any mass gives the uniform distribution.
    """
    is_empty = log_mass.isneginf().all(-1, keepdim=True)
    return log_mass.masked_fill(is_empty, 0.0).log_softmax(-1)


def where_or_zero(condition: Tensor, values: Tensor) -> Tensor:
    """Return `values` where the condition is true, else 0.

    Use this function on the input of a formula that may be infinite where the condition is false.
    If only the result of the formula were masked, its gradient would be 0 * inf = NaN.
    """
    return torch.where(condition, values, 0.0)


def multiply_by_weight(weight: Tensor, values: Tensor) -> Tensor:
    """Return weight * values, with value 0 and gradient 0 at every position of weight 0.

    The values at these positions may be infinite. `weight` must not be negative.
    """
    is_weighted = weight > 0
    return torch.where(is_weighted, weight * where_or_zero(is_weighted, values), 0.0)


def apply_temperature(log_p: Tensor, temperature: float) -> Tensor:
    """Return log-weights of p^(1/T) along the last dimension, for temperature T >= 0.

    `log_p` is ln p. T = 0 keeps only the most likely entry, the first one if several are equal. The
    largest log p is subtracted before the division, so that the most likely entry is finite for
    every T > 0.
    """
    largest, first = log_p.max(-1, keepdim=True)
    if temperature == 0.0:
        return torch.full_like(log_p, -torch.inf).scatter(-1, first, 0.0)
    # Below the smallest normal number 1/T would be infinite, and 0 * inf is NaN.
    scale = max(temperature, torch.finfo(log_p.dtype).tiny)
    return torch.where(log_p == largest, 0.0, (log_p - largest) / scale)


def find_rows(condition: Tensor) -> Tensor:
    """Return the indices [k] of the true entries of a bool tensor [r].

    The function synchronizes an accelerator with the CPU.
    """
    return condition.nonzero().squeeze(-1)


def pick(values: Tensor, index: Tensor) -> Tensor:
    """Return one entry per row, `values[i, index[i]]`, for each row i of values [r,n]."""
    return values.gather(-1, index.unsqueeze(-1)).squeeze(-1)


def evaluate_per_time(values: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
    """Return values(t) [r,...], with one evaluation for equal neighbouring times.

    `values` maps times [n] to a tensor [n,...]. Positions of a sequence mostly share their time. On
    an accelerator every row is evaluated, since finding the number of distinct times would need a
    synchronization.
    """
    if t.device.type != "cpu":
        return values(t)
    times, time_index = t.unique_consecutive(return_inverse=True)
    return values(times)[time_index]


def may_be_true(condition: Tensor) -> bool:
    """Return whether any entry of a bool tensor may be true.

    On an accelerator the result is always True, since the exact answer would synchronize the
    device.
    """
    return condition.device.type != "cpu" or bool(condition.any())


class Constant:
    """Tensor that is copied once to each device that uses it."""

    def __init__(self, tensor: Tensor) -> None:
        self._copies = {tensor.device: tensor}
        self._original = tensor

    def on(self, device: torch.device) -> Tensor:
        """Return the copy of the tensor on `device`. The first call for a device makes the copy."""
        if device not in self._copies:
            self._copies[device] = self._original.to(device)
        return self._copies[device]


def draw_index(weights: Tensor, u: Tensor) -> Tensor:
    """Draw an index [r] per row by inverse CDF, from weights [r,n] >= 0 and uniforms u [r].

    The result is the first index whose cumulative weight exceeds u * total. Sums are float64. The
    index is clamped to the last positive weight, so that rounding at u near 1 never draws an index
    of weight 0. Raises NonFiniteError if the weights of a row have no positive finite sum.
    """
    # A float32 cumulative sum would lose the small weights of a large vocabulary.
    cdf = weights.double().cumsum(-1)
    total = cdf[:, -1]
    drawable = (total > 0) & (total < torch.inf)
    if not bool(drawable.all()):
        raise NonFiniteError(
            "draw_index: weights must have a positive, finite sum in every row; got "
            f"{cdf[~drawable, -1][0]}. Either the predicted distribution holds NaN (the network's "
            "weights or inputs are not finite: go back to an earlier checkpoint), or it gives no "
            "probability to anything below the state of a row."
        )
    target = (u * total).unsqueeze(-1)
    index = torch.searchsorted(cdf, target, right=True).squeeze(-1)
    from_the_end = (weights > 0).flip(-1).int().argmax(-1)
    last = weights.shape[-1] - 1 - from_the_end
    return torch.minimum(index, last)
