"""Level clocks: distributions of the time at which a position moves from level to level.

In the tree of the vocabulary, a position starts at level 0 (its token) and moves through levels
1..L. Level L is the root. pi_l(t) is the probability of level l at time t, F_l = sum_{j>=l} pi_j
the probability of having reached level l, and lambda_l the rate (hazard) of leaving level l
upwards:

    pi_l' = lambda_{l-1} pi_{l-1} - lambda_l pi_l,    F_l' = lambda_{l-1} pi_{l-1}.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from ddiff.core.description import SettingsRepr
from ddiff.core.numerics import EARLIEST, LATEST, evaluate_per_time, interior
from ddiff.core.oracle import propagate
from ddiff.core.schedule import Schedule
from ddiff.errors import ArgumentError

# Logits of the first and of the last interior time.
LOWEST = math.log(EARLIEST / (1.0 - EARLIEST))
HIGHEST = math.log(LATEST / (1.0 - LATEST))

# Number of cells of logit time on which the entry rates are integrated. With this number the cubic
# within a cell has an error of 1e-9.
CELLS = 2048
CELL = (HIGHEST - LOWEST) / CELLS

# Largest rate: exp(-rate * 27.6) at the last interior time stays above the smallest float64.
MAX_RATE = 20.0


class LevelClock(SettingsRepr, ABC):
    """Distribution over time of the level of a position, for L levels above the tokens.

    A position starts at its token (level 0) and only rises; level L is the root. A subclass defines
    `pi`, `inflow` and `transition`. Times are float64 tensors [r], one time per row.

    Attributes:
        num_levels: the number L.
        closes_at_clean: whether every position is at level 0 at t = 0.
        closes_at_prior: whether every position is at the root at t = 1.
    """

    num_levels: int
    closes_at_clean: bool = True
    closes_at_prior: bool = True

    @abstractmethod
    def pi(self, t: Tensor) -> Tensor:
        """Return pi_l(t) [r,L+1], the probability of being at level l, for l = 0..L.

        The values are exact at t = 0 and t = 1.
        """

    @abstractmethod
    def inflow(self, t: Tensor) -> Tensor:
        """Return the derivatives F_l'(t) [r,L] for the levels l = 1..L.

        F_l(t) is the probability of having reached level l, so F_l' is the probability per unit of
        time that flows from level l - 1 into level l.
        """

    @abstractmethod
    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        """Return K_ij(s,t) = P(level j at t | level i at s), [r,L+1,L+1], for s <= t.

        The matrices are upper triangular, since the level of a position never falls.
        """

    def per_time(self, values: Callable[[Tensor], Tensor], t: Tensor) -> Tensor:
        """Return values(t) [r,...] of a method of this clock, once for equal neighbouring times.

        A clock with other probabilities in every row overrides this method.
        """
        return evaluate_per_time(values, t)

    def hazard(self, t: Tensor) -> Tensor:
        """Return the rates lambda_l [r,L] at which positions leave level l, for l = 0..L-1.

        lambda_l = F_{l+1}' / pi_l, where F_{l+1}' is the flow into the next level (`inflow`) and
        pi_l the probability of being at level l.
        """
        below = self.pi(interior(t))[:, :-1]
        return self.inflow(t) / below

    def cdf(self, t: Tensor) -> Tensor:
        """Return F_l(t) [r,L] for l = 1..L, the probability of having reached level l by time t."""
        from_root = self.pi(t).flip(-1).cumsum(-1)
        return from_root.flip(-1)[:, 1:]

    def generator(self, t: Tensor) -> Tensor:
        """Return the generator (rate matrix) [r,L+1,L+1] of the Markov chain of levels at t."""
        hazard = self.hazard(t)
        zero = torch.zeros_like(hazard[:, :1])
        outflow = torch.diag_embed(torch.cat([hazard, zero], -1))
        return torch.diag_embed(hazard, offset=1) - outflow

    # ------------------------------------------------------------------ entry times

    def entry_time(self, level: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw for each row the time s < t at which the row reached its current level.

        The time s is the solution of

            u = P(at level l at s | at level l at t) = exp(-int_s^t F_l'/pi_l),

        where l is the level at time t, pi_l the probability of level l, and F_l' the flow into
        level l (`inflow`). The result is 0 if s would be below 1e-12.

        Args:
            level: [r] level l >= 1 of each row at time t.
            t: [r] times.
            u: [r] uniforms.
        """
        reached = self._integral_to(level, t)
        goal = reached + u.log() + self._inflow_at_end(level, t)
        cell = self._find_cell(level, goal)
        position = torch.full_like(t, 0.5)
        # Newton's method. Cells are narrow, so the integral is nearly linear within a cell.
        for _ in range(6):
            total, rate = self._interpolate_integral(level, cell, position)
            newton_step = torch.where(rate > 0, (goal - total) / rate, 0.0)
            # A full step may leave the cell if the rate is small at one end.
            position = position + newton_step.clamp(-1.0, 1.0)
        s = torch.sigmoid(LOWEST + CELL * (cell + position))
        return torch.where(goal > 0, torch.minimum(s, t), 0.0)

    def _find_cell(self, level: Tensor, goal: Tensor) -> Tensor:
        """Return the index [r] of the cell of logit t in which Lambda_l(t) reaches `goal` [r].

        l is the level `level` [r] of each row. Lambda_l(t) is the integral of the entry rate of
        level l from 1e-12 to t (see `_entry_rates`).
        """
        totals = self._entry_table[0].to(goal.device)
        cell = torch.zeros_like(level)
        for l in range(1, self.num_levels + 1):
            rows = level == l
            edges = totals[:, l - 1].contiguous()
            cell[rows] = torch.searchsorted(edges, goal[rows], right=True) - 1
        return cell.clamp(0, CELLS - 1)

    def _entry_rates(self, t: Tensor) -> Tensor:
        """Return the entry rates F_l'/pi_l [r,L] of the levels l = 1..L, per unit of logit t.

        F_l' is the flow from level l - 1 into level l (`inflow`), and pi_l the probability of level
        l. The reversed chain moves from level l to level l - 1 at the entry rate of level l.
        """
        dt_dlogit = (t * (1.0 - t)).unsqueeze(-1)
        rates = self.inflow(t) / self.pi(t)[:, 1:] * dt_dlogit
        # Near the ends, rounding may make pi 0, and the rate would be infinite or NaN.
        return rates.nan_to_num(0.0, 0.0, 0.0)

    @cached_property
    def _entry_table(self) -> tuple[Tensor, Tensor]:
        """Tabulate the integrals Lambda_l of the entry rates, and the entry rates, at cell edges.

        Lambda_l(t) is the integral of the entry rate of level l from 1e-12 to t (see
        `_entry_rates`). The edges divide the axis of logit t into CELLS equal cells. Returns two
        tensors [CELLS+1,L]: Lambda_l at the edges, and the entry rates at the edges.
        """
        gauss_nodes, gauss_weights = np.polynomial.legendre.leggauss(4)
        nodes = torch.from_numpy(gauss_nodes)
        weights = torch.from_numpy(gauss_weights)
        edges = LOWEST + CELL * torch.arange(CELLS + 1, dtype=torch.float64)
        offsets = CELL * (nodes + 1.0) / 2.0
        inside = torch.sigmoid(edges[:-1].unsqueeze(-1) + offsets)
        rates = self._entry_rates(inside.reshape(-1))
        rates = rates.reshape(CELLS, len(nodes), -1)
        scaled_weights = (CELL / 2.0 * weights).unsqueeze(-1)
        per_cell = (rates * scaled_weights).sum(1)
        # The first row is the integral at the lowest edge, which is 0.
        totals = torch.nn.functional.pad(per_cell.cumsum(0), (0, 0, 1, 0))
        return totals, self._entry_rates(torch.sigmoid(edges))

    def _integral_to(self, level: Tensor, t: Tensor) -> Tensor:
        """Return Lambda_l(t) [r], the integral of the entry rate of level l from 1e-12 to t.

        l is the level `level` [r] of each row. The entry rate is the rate at which the reversed
        chain moves from level l to level l - 1 (see `_entry_rates`).
        """
        depth = (torch.logit(interior(t)) - LOWEST) / CELL
        cell = depth.long().clamp(0, CELLS - 1)
        return self._interpolate_integral(level, cell, depth - cell)[0]

    def _inflow_at_end(self, level: Tensor, t: Tensor) -> Tensor:
        """Return the integral from t = 1 - 1e-12 to t = 1 of the rate at which the root is entered.

        Rates are not evaluated after t = 1 - 1e-12. The integral is positive, because with low
        rates some positions reach the root only after this time. The result is 0 for rows with
        t < 1 and for rows with `level` below the root.
        """
        ends = torch.tensor([LATEST, 1.0], dtype=torch.float64, device=t.device)
        log_root = self.pi(ends)[:, -1].log()
        is_root_at_end = (t > LATEST) & (level == self.num_levels)
        return torch.where(is_root_at_end, log_root[1] - log_root[0], 0.0)

    def _interpolate_integral(
        self,
        level: Tensor,
        cell: Tensor,
        position: Tensor,
    ) -> tuple[Tensor, Tensor]:
        """Interpolate Lambda_l(t) at one point per row, and return its value and its derivative.

        Lambda_l(t) is the integral from 1e-12 to t of the entry rate of level l, the rate at which
        the reversed chain moves from level l to level l - 1 (see `_entry_rates`). Within a cell,
        the interpolant is the cubic with the values and slopes of `_entry_table` at both edges.

        Args:
            level: [r] level l of each row, from 1 to L.
            cell: [r] index of the cell of logit t that contains the point.
            position: [r] position of the point in its cell, 0 at the lower edge and 1 at the upper
                edge.

        Returns:
            Two tensors [r]: Lambda_l, and its derivative with respect to `position`.
        """
        totals = self._entry_table[0].to(position.device)
        rates = self._entry_table[1].to(position.device)
        left = totals[cell, level - 1]
        right = totals[cell + 1, level - 1]
        first = CELL * rates[cell, level - 1]
        last = CELL * rates[cell + 1, level - 1]
        quadratic = 3.0 * (right - left) - 2.0 * first - last
        cubic = first + last - 2.0 * (right - left)
        total = left + position * (first + position * (quadratic + position * cubic))
        slope = first + position * (2.0 * quadratic + 3.0 * position * cubic)
        return total, slope


@final
class LogTimeClock(LevelClock):
    """Level clock that leaves level l at the rate g_l / (1 - t).

    In log-time tau = -ln(1 - t), the rates are the constants g_l. `rates` are g_0..g_{L-1},
    positive and at most 20. Equal and nearly equal rates are allowed. The rates (1,) give linear
    masking, and (gamma, 1) give the two-level clock of arXiv 2510.08632.

    The transition over a log-time tau is exp(tau A), where A is the generator of the levels in
    log-time. exp(tau A) is computed by uniformization. This is a series of positive terms, so every
    entry keeps its relative accuracy (1e-10 for t >= 1e-6). Two other methods would lose digits by
    cancellation: partial fractions, and the computation of the root's probability as 1 minus the
    probabilities of the other levels.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        rates = tuple(float(rate) for rate in rates)
        if not rates or not all(0.0 < rate <= MAX_RATE for rate in rates):
            raise ArgumentError(
                f"LogTimeClock: rates must be one number in (0, {MAX_RATE:g}] per level above the "
                f"tokens; got {rates}."
            )
        self.rates = rates
        self.num_levels = len(rates)
        self._max_rate = max(rates)
        self._powers = self._matrix_powers()

    def _matrix_powers(self) -> Tensor:
        """Return the powers (I + A/q)^k [K,L+1,L+1] for k = 0..K-1, with q = max(rates).

        A is the generator of the levels in log-time. The number K of powers is large enough for the
        series of `_exponential` at every time t <= 1 - 1e-12.
        """
        size = self.num_levels + 1
        rates = torch.tensor((*self.rates, 0.0), dtype=torch.float64)
        stay = torch.diag(1.0 - rates / self._max_rate)
        step = stay + torch.diag(rates[:-1] / self._max_rate, 1)
        longest = -self._max_rate * math.log1p(-LATEST)
        # Number of terms of the Poisson series: its mean plus 12 standard deviations.
        count = int(longest + 12.0 * math.sqrt(longest) + 40.0)
        powers = [torch.eye(size, dtype=torch.float64)]
        for _ in range(count):
            powers.append(powers[-1] @ step)
        return torch.stack(powers)

    def _exponential(self, tau: Tensor, row: int | None = None) -> Tensor:
        """Return exp(tau A) [r,L+1,L+1], or only its row number `row` [r,L+1].

        A is the generator of the levels in log-time -ln(1 - t), and tau [r] the elapsed log-time.
        The series is sum_k Poisson(k; q tau) (I + A/q)^k, with q = max(rates).
        """
        powers = self._powers.to(tau.device)
        if row is not None:
            powers = powers[:, row]
        count = len(powers)
        # Many rows have the same time, since positions of a sequence mostly share it.
        times, time_index = torch.unique(tau, return_inverse=True)
        mean = (self._max_rate * times).unsqueeze(-1)
        k = torch.arange(1, count, dtype=tau.dtype, device=tau.device)
        # mean^k / k!, as products of ratios
        powers_of_mean = (mean / k).cumprod(-1)
        series = torch.cat([torch.ones_like(mean), powers_of_mean], -1)
        weights = series * (-mean).exp()
        exponential = weights @ powers.reshape(count, -1)
        return exponential.reshape(len(times), *powers.shape[1:])[time_index]

    def pi(self, t: Tensor) -> Tensor:
        # log1p is accurate for small t; log-time is infinite at t = 1.
        log_time = -torch.log1p(-t.clamp(max=LATEST))
        levels = self._exponential(log_time, row=0)
        has_ended = (t >= 1.0).unsqueeze(-1)
        return torch.where(has_ended, _all_at_root(levels), levels)

    def hazard(self, t: Tensor) -> Tensor:
        rates = torch.tensor(self.rates, dtype=t.dtype, device=t.device)
        return rates / (1.0 - interior(t)).unsqueeze(-1)

    def inflow(self, t: Tensor) -> Tensor:
        return self.hazard(t) * self.pi(interior(t))[:, :-1]

    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        start = torch.log1p(-s.clamp(max=LATEST))
        stop = torch.log1p(-t.clamp(max=LATEST))
        levels = self._exponential(start - stop)
        has_ended = ((t >= 1.0) & (s < 1.0))[:, None, None]
        return torch.where(has_ended, _all_at_root(levels), levels)


@final
class CdfClock(LevelClock):
    """Level clock with one schedule alpha_l(t) for each level l = 1..L.

    The probability of having reached level l is F_l = 1 - alpha_l. F_1 > F_2 > ... must hold on
    (0,1). The probability of being at level l is pi_l = F_l - F_{l+1}. With one level, the
    transition has a closed form. With more levels, the transition is a time-ordered product over
    400 fourth-order Magnus steps. Its error is 8e-13 for power schedules with powers .8, 1.5 and 3.
    On a clock of `ddiff clock`, transitions from s = 0 have errors up to 3e-5; no bound and no
    sampler uses them.
    """

    steps = 400

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        if not schedules:
            raise ArgumentError(
                "CdfClock: schedules must hold one schedule per level above the tokens; got none."
            )
        self.schedules = tuple(schedules)
        self.num_levels = len(schedules)
        self.closes_at_clean = all(schedule.closes_at_clean for schedule in schedules)
        self.closes_at_prior = all(schedule.closes_at_prior for schedule in schedules)
        self._check_order()

    def _check_order(self) -> None:
        """Raise ArgumentError if positions could reach some level before the level below it."""
        # Two schedules may cross in the last hundredth, so times are dense at both ends.
        near = torch.logspace(-6, -2, 9, dtype=torch.float64)
        middle = torch.linspace(0.02, 0.98, 97, dtype=torch.float64)
        # `pi` is exact near t = 1, where several F round to 1.
        between = self.pi(torch.cat([near, middle, 1.0 - near]))[:, 1:-1]
        # At the ends themselves F may be equal.
        ends = self.cdf(torch.tensor([0.0, 1.0], dtype=torch.float64))
        inside_fails = (between <= 0.0).any(0)
        ends_fail = (ends[:, :-1] < ends[:, 1:]).any(0)
        unordered = (inside_fails | ends_fail).nonzero()
        if len(unordered):
            level = int(unordered[0]) + 1
            raise ArgumentError(
                "CdfClock: every level must be reached before the next, "
                f"F_{level}(t) > F_{level + 1}(t) on (0,1), but schedules {level - 1} and {level} "
                "do not keep that order. Give the higher level a slower schedule."
            )

    def cdf(self, t: Tensor) -> Tensor:
        return torch.stack([schedule.one_minus_alpha(t) for schedule in self.schedules], -1)

    def pi(self, t: Tensor) -> Tensor:
        cdf = self.cdf(t)
        alpha = torch.stack([schedule.alpha(t) for schedule in self.schedules], -1)
        # F_l - F_{l+1} = alpha_{l+1} - alpha_l. Near t = 1, F rounds to 1, and the first difference
        # to 0, with which rates would be infinite.
        early = cdf[:, :-1] - cdf[:, 1:]
        late = alpha[:, 1:] - alpha[:, :-1]
        between = torch.where(cdf[:, :-1] < 0.5, early, late)
        return torch.cat([alpha[:, :1], between, cdf[:, -1:]], -1)

    def inflow(self, t: Tensor) -> Tensor:
        return torch.stack([-schedule.d_alpha(interior(t)) for schedule in self.schedules], -1)

    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        if self.num_levels == 1:
            return self._one_level_transition(s, t)
        both = torch.stack([s, t], -1)
        pairs, pair_index = torch.unique(both, dim=0, return_inverse=True)
        start = pairs[:, 0]
        stop = pairs[:, 1]
        moved = propagate(self.generator, start, stop, self.num_levels + 1, self.steps)
        if self.closes_at_prior:
            has_ended = ((stop >= 1.0) & (start < 1.0))[:, None, None]
            moved = torch.where(has_ended, _all_at_root(moved), moved)
        return moved[pair_index]

    def _one_level_transition(self, s: Tensor, t: Tensor) -> Tensor:
        alpha = self.schedules[0].alpha
        ratio = alpha(t) / alpha(torch.minimum(s, t))
        # For s = t the ratio may be 0 / 0.
        stay = torch.where(s < t, ratio, torch.ones_like(t))
        from_token = torch.stack([stay, 1.0 - stay], -1)
        from_root = torch.tensor([0.0, 1.0]).to(t)
        from_root = from_root.expand(len(t), 2)
        return torch.stack([from_token, from_root], 1)


def _all_at_root(like: Tensor) -> Tensor:
    """Return level probabilities in the shape of `like` [...,L+1]: 1 at the root, 0 elsewhere."""
    root = torch.zeros_like(like)
    root[..., -1] = 1.0
    return root
