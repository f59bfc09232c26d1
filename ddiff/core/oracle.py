"""Transition matrices of any time-dependent generator, by numerical integration.

dP/dt = P Q_t is integrated by the fourth-order Magnus method on a grid that is uniform in logit t,
which has many points near t = 0 and t = 1. One exponential of the integrated generator would be
exact only if generators at different times commute. No formula in this module relies on this
property.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from ddiff.core.numerics import interior

Generator = Callable[[Tensor], Tensor]
"""Function t [n] -> Q_t [n,S,S], the rate matrices at times t."""

# Largest number of entries of generators in memory at once; they take 8 MB.
CHUNK_ENTRIES = 2**20


def propagate(
    generator: Generator,
    s: Tensor,
    t: Tensor,
    num_states: int,
    steps: int = 200,
) -> Tensor:
    """Return the transition matrices [r,S,S] from times s to times t.

    The cost is O(r steps S^3). Errors fall as steps^-4: 200 steps give an error of about 1e-10 from
    s = 0.001 to t = 0.999. The formula is eq. 253 of Blanes et al., Phys. Rep. 470, here for
    transition matrices that multiply row vectors.

    Args:
        generator: function t [n] -> Q_t [n,S,S].
        s, t: float64 [r], s <= t. Equal times give the identity.
        num_states: the number S.
        steps: number of integration steps from s to t.
    """
    first = torch.logit(interior(s))
    last = torch.logit(interior(t))
    width = (last - first) / steps
    identity = torch.eye(num_states, dtype=torch.float64, device=t.device)
    total = identity.expand(len(t), -1, -1)
    # The generators of many steps are computed in one call, to reduce the Python overhead.
    steps_per_chunk = max(1, CHUNK_ENTRIES // max(1, total.numel()))
    all_steps = torch.arange(steps, dtype=torch.float64, device=t.device)
    for step in all_steps.split(steps_per_chunk):
        middle = first + (step.unsqueeze(-1) + 0.5) * width
        for move in _step_transitions(generator, middle, width):
            total = total @ move
    return total


def _step_transitions(generator: Generator, middle: Tensor, width: Tensor) -> Tensor:
    """Return the transition matrices [k,r,S,S] of k integration steps for each of r rows.

    Steps have equal lengths in logit t: a step of row i has the length `width`[i]. `middle` [k,r]
    holds the values of logit t in the middles of the steps.
    """
    # Evaluating the generator at the two Gauss-Legendre points of a step gives order four.
    offset = math.sqrt(3.0) / 6.0
    early = _generator_in_logit_time(generator, middle - offset * width)
    late = _generator_in_logit_time(generator, middle + offset * width)
    h = width[:, None, None]
    # P multiplies Q from the left (dP = P Q), so the commutator has the opposite sign of the
    # formula for column vectors.
    commutator = early @ late - late @ early
    exponent = h / 2 * (early + late) + h * h * math.sqrt(3.0) / 12.0 * commutator
    return torch.matrix_exp(exponent)


def _generator_in_logit_time(generator: Generator, logit_t: Tensor) -> Tensor:
    """Return the generators per unit of logit t, Q_t t (1 - t), a tensor [k,r,S,S].

    `logit_t` [k,r] are the logits of the times t.
    """
    t = torch.sigmoid(logit_t.reshape(-1))
    # Chain rule, dt / dlogit(t) = t (1 - t): rates that diverge as 1/t stay bounded.
    rates = generator(t) * (t * (1.0 - t))[:, None, None]
    return rates.unflatten(0, logit_t.shape)
