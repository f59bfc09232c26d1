"""The dense oracle: finite transitions of any generator, by brute force, in the right time order.

dP/dt = P Q_t is integrated by the fourth-order Magnus method on a grid that is uniform in logit t, which resolves both
ends. One exponential of the integrated generator is exact only where generators at different times commute; nothing here
relies on that.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddiff.core.numerics import interior

BLOCK = 2**20  # entries of the generators that are held at once: 8 MB


def propagate(
    generator: Callable[[Tensor], Tensor], s: Tensor, t: Tensor, num_states: int, steps: int = 200
) -> Tensor:
    """[r,S,S] the transition from s to t of the chain with generator `generator(t[n]) -> [n,S,S]`.

    s, t [r] float64, s <= t; identity where they are equal. Cost O(r steps S^3). Errors fall as steps^-4: 200 steps give
    about 1e-10 over (0.001, 0.999) (Blanes et al., Phys. Rep. 470, eq. 253, in the row convention).
    """
    first, last = torch.logit(interior(s)), torch.logit(interior(t))
    width = (last - first) / steps
    total = torch.eye(num_states, dtype=torch.float64, device=t.device).expand(len(t), -1, -1)
    # generators of many steps are made in one call: their Python overhead is what an oracle would otherwise cost
    together = max(1, BLOCK // max(1, total.numel()))
    for step in torch.arange(steps, dtype=torch.float64, device=t.device).split(together):
        for move in _moves(generator, first + (step.unsqueeze(-1) + 0.5) * width, width):
            total = total @ move
    return total


def _moves(generator: Callable[[Tensor], Tensor], middle: Tensor, width: Tensor) -> Tensor:
    """[k,r,S,S] the transitions over k steps of `width` [r] about `middle` [k,r] in logit time."""
    offset = math.sqrt(3.0) / 6.0
    early, late = (
        _in_logit_time(generator, (middle + sign * offset * width).reshape(-1)).unflatten(
            0, middle.shape
        )
        for sign in (-1.0, 1.0)
    )
    h = width[:, None, None]
    # row vectors: dP = P Q, so the commutator has the opposite sign of the column convention
    omega = h / 2 * (early + late) + h * h * math.sqrt(3.0) / 12.0 * (early @ late - late @ early)
    return torch.matrix_exp(omega)


def _in_logit_time(generator: Callable[[Tensor], Tensor], y: Tensor) -> Tensor:
    t = torch.sigmoid(y)
    return generator(t) * (t * (1.0 - t))[:, None, None]
