"""Candidate event times of the interpolating family, drawn without a network.

An event is a jump of the reversed chain. The rate at which the reversed chain leaves a state
depends on the network, but an upper bound of this rate does not. `CandidateEvents` draws candidate
events at a rate of at least this upper bound. `InterpolatingProcess.event` accepts each candidate
with probability (true rate) / (candidate rate), which is called thinning.

Notation: the marginal of an interpolating process is q_t(.|x) = alpha_t delta_x + b_t. The vector
b_t is the noise, the part that does not depend on the token x. The arrival rate omega_t(z) is the
rate at which the forward chain jumps from any other state into z.
"""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from ddiff.core.numerics import EARLIEST, LATEST, interior

# Number of cells of logit time, each with one rate of candidate events.
NUM_CELLS = 1024

# Factor by which the candidate rate of a cell exceeds the larger of the rates at its two edges.
# Within a cell a smooth rate exceeds this larger value by at most 0.1 percent.
MAX_RISE = 1.01


class NoiseTables(Protocol):
    """Interface of a process with tables of its noise b_t(y) and arrival rates omega_t(y).

    The marginal of a state y given the token x is q_t(y|x) = alpha_t 1[y = x] + b_t(y).
    """

    def representative(self, zt: Tensor) -> Tensor:
        """Return for each row a state y [r] whose noise equals that of z_t at all times.

        States with equal noise, b_t(y) = b_t(z_t), share one representative, so that tables have
        fewer entries.
        """

    def noise_table(self, states: Tensor, t: Tensor) -> Tensor:
        """Return the probability b_t(y) [n,m] that noise gives the states y [m] at times t [n]."""

    def arrivals_table(self, states: Tensor, t: Tensor) -> Tensor:
        """Return the arrival rates omega_t(y) [n,m] into states y [m] at times t [n].

        omega_t(y) is the rate at which the forward chain jumps from any other state into y.
        """


class CandidateEvents:
    """Candidate events (times of possible jumps) of rows whose current states are zt [r].

    The candidate rate of a row in state z is at least omega_t(z) (1 - b_t(z)) / b_t(z), where
    omega_t(z) is the rate of forward jumps into z, and b_t(z) is the part of q_t(z|x) that does not
    depend on the token x (see `NoiseTables`). This number is an upper bound of the rate at which
    the reversed chain leaves z, for every prediction of the network. The axis of logit t is divided
    into NUM_CELLS cells of equal width. Within a cell, the candidate rate per unit of logit t is
    constant.
    """

    def __init__(self, process: NoiseTables, zt: Tensor) -> None:
        ends = torch.tensor([EARLIEST, LATEST], dtype=torch.float64)
        low, high = torch.logit(ends).tolist()
        self.low = low
        self.width = (high - low) / NUM_CELLS
        # Rates grow as 1/t and 1/(1 - t) at the ends; cells of equal width in logit t resolve this.
        cells = torch.arange(NUM_CELLS + 1, dtype=torch.float64, device=zt.device)
        t = torch.sigmoid(low + self.width * cells)
        states, self.state_index = process.representative(zt).unique(return_inverse=True)
        noise = process.noise_table(states, t)
        arrivals = process.arrivals_table(states, t)
        hazard = torch.where(arrivals > 0, arrivals * (1.0 - noise) / noise, 0.0)
        hazard = hazard * (t * (1.0 - t)).unsqueeze(-1)
        # `self.rates` is [NUM_CELLS, states]
        self.rates = MAX_RISE * torch.maximum(hazard[:-1], hazard[1:])
        # `self.total` [NUM_CELLS + 1, states] is the integral from the lowest edge to each edge.
        integral = self.rates.cumsum(0) * self.width
        self.total = torch.nn.functional.pad(integral, (0, 0, 1, 0))

    def _locate(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the index of the cell of each time t [r], and the distance from its lower edge.

        Cells are the intervals of logit t that the docstring of the class describes. The distance
        [r] is the difference of logit t between t and the lower edge.
        """
        depth = torch.logit(interior(t)) - self.low
        cell = (depth / self.width).long().clamp(0, NUM_CELLS - 1)
        return cell, depth - cell * self.width

    def rate(self, t: Tensor) -> Tensor:
        """Return the rate of candidate events [r] of each row at its time t [r], per unit of t."""
        cell, _ = self._locate(t)
        return self.rates[cell, self.state_index] / (t * (1.0 - t))

    def next_time(self, t: Tensor, u: Tensor) -> Tensor:
        """Draw for each row the time s < t of its latest candidate event, from uniforms u [r].

        A candidate event is a time at which the state may change. The time s is the solution of
        P(no candidate event in (s,t]) = u. The result is 0 if s would be before the first time of
        the grid on which the rates are tabulated.
        """
        cell, offset = self._locate(t)
        total = self.total[cell, self.state_index]
        goal = total + self.rates[cell, self.state_index] * offset + u.log()
        cell = self._find_cell(goal, cell)
        rate = self.rates[cell, self.state_index]
        offset = (goal - self.total[cell, self.state_index]) / rate
        s = torch.sigmoid(self.low + cell * self.width + offset)
        exists = (goal > 0) & (rate > 0)
        return torch.where(exists, torch.minimum(s, t), 0.0)

    def _find_cell(self, goal: Tensor, last: Tensor) -> Tensor:
        """Return for each row the last cell whose integrated rate is at most `goal` [r].

        Cells are intervals of the time grid (see the class). The integrated rate of a cell is the
        integral of the candidate rate from the lowest time of the grid to the lower edge of the
        cell. Cells up to the index `last` [r] are searched, by bisection.
        """
        low = torch.zeros_like(last)
        high = last
        for _ in range(NUM_CELLS.bit_length()):
            middle = (low + high + 1) // 2
            is_below = self.total[middle, self.state_index] <= goal
            high = torch.where(is_below, high, (middle - 1).clamp(min=0))
            low = torch.where(is_below, middle, low)
        return low
