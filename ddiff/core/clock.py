"""Level clocks: when a position climbs from one level of the tree to the next.

A position starts at level 0 (its word) and climbs through levels 1..L; level L is the root. pi_l(t) is the probability
of level l, F_l = sum_{j>=l} pi_j that of having climbed at least so far, lambda_l the hazard of leaving level l upwards:
pi_l' = lambda_{l-1} pi_{l-1} - lambda_l pi_l and F_l' = lambda_{l-1} pi_{l-1}.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from functools import cached_property
from typing import final

import numpy as np
import torch
from torch import Tensor

from ddiff.core.description import SettingsRepr
from ddiff.core.numerics import EARLIEST, LATEST, interior
from ddiff.core.oracle import propagate
from ddiff.core.schedule import Schedule
from ddiff.errors import ArgumentError

LOWEST, HIGHEST = math.log(EARLIEST / (1.0 - EARLIEST)), math.log(LATEST / (1.0 - LATEST))
CELLS = 2048  # of logit time, on which the entry rates are integrated; a cubic between their ends leaves 1e-9
CELL = (HIGHEST - LOWEST) / CELLS
MAX_RATE = 20.0  # keeps exp(-rate * 27.6) above the smallest float64


class LevelClock(SettingsRepr, ABC):
    """Occupation of L levels above the words. Times are float64 [r]."""

    num_levels: int
    closes_at_clean: bool = True
    closes_at_prior: bool = True

    @abstractmethod
    def pi(self, t: Tensor) -> Tensor:
        """[r, L+1] probability of each level; exact at t = 0 and t = 1."""

    @abstractmethod
    def inflow(self, t: Tensor) -> Tensor:
        """[r, L] F_l'(t) for l = 1..L: the flow into level l from below, per unit time."""

    @abstractmethod
    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        """[r, L+1, L+1] P(level j at t | level i at s), s <= t, upper triangular."""

    def hazard(self, t: Tensor) -> Tensor:
        """[r, L] lambda_l for l = 0..L-1: the rate of leaving level l, F_{l+1}' / pi_l."""
        return self.inflow(t) / self.pi(interior(t))[:, :-1]

    def cdf(self, t: Tensor) -> Tensor:
        """[r, L] F_l(t) for l = 1..L."""
        return self.pi(t).flip(-1).cumsum(-1).flip(-1)[:, 1:]

    def entry_time(self, level: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """[r] the time s < t at which a row found at `level` >= 1 at t entered it; 0 where that is before 1e-12, or never.

        P(still at level at s | at level at t) = pi_l(s) K_ll(s,t) / pi_l(t) = exp(-int_s^t F_l'/pi_l) = u.
        """
        goal = self._entered(level, t) + u.log() + self._entered_last(level, t)
        totals, cell = self._entry_table[0].to(t.device), torch.zeros_like(level)
        for l in range(1, self.num_levels + 1):
            rows = level == l
            cell[rows] = (
                torch.searchsorted(totals[:, l - 1].contiguous(), goal[rows], right=True) - 1
            )
        cell = cell.clamp(0, CELLS - 1)
        into = torch.full_like(t, 0.5)
        for _ in range(6):  # Newton on a nearly straight line: cells are narrow
            total, rate = self._within(level, cell, into)
            into = into + torch.where(rate > 0, (goal - total) / rate, 0.0).clamp(-1.0, 1.0)
        s = torch.sigmoid(LOWEST + CELL * (cell + into))
        return torch.where(goal > 0, torch.minimum(s, t), 0.0)

    def _entry_rates(self, t: Tensor) -> Tensor:
        """[r,L] F_l'/pi_l per unit of logit t: the rate at which the chain run backwards leaves level l."""
        rates = self.inflow(t) / self.pi(t)[:, 1:] * (t * (1.0 - t)).unsqueeze(-1)
        return rates.nan_to_num(0.0, 0.0, 0.0)  # at the very ends pi may be lost to rounding

    @cached_property
    def _entry_table(self) -> tuple[Tensor, Tensor]:
        """[CELLS+1,L] at the edges of the cells: the integral of the entry rates from 1e-12, and the rates."""
        nodes, weights = (torch.from_numpy(part) for part in np.polynomial.legendre.leggauss(4))
        edges = LOWEST + CELL * torch.arange(CELLS + 1, dtype=torch.float64)
        inside = torch.sigmoid(edges[:-1].unsqueeze(-1) + CELL * (nodes + 1.0) / 2.0)
        rates = self._entry_rates(inside.reshape(-1)).reshape(CELLS, len(nodes), -1)
        cells = (rates * (CELL / 2.0 * weights).unsqueeze(-1)).sum(1)
        return torch.nn.functional.pad(cells.cumsum(0), (0, 0, 1, 0)), self._entry_rates(
            torch.sigmoid(edges)
        )

    def _entered(self, level: Tensor, t: Tensor) -> Tensor:
        """[r] the integral of a level's entry rate from 1e-12 to t."""
        depth = (torch.logit(interior(t)) - LOWEST) / CELL
        cell = depth.long().clamp(0, CELLS - 1)
        return self._within(level, cell, depth - cell)[0]

    def _entered_last(self, level: Tensor, t: Tensor) -> Tensor:
        """[r] what a slow clock still sends to the root after the last interior time, for rows at t = 1."""
        root = self.pi(torch.tensor([LATEST, 1.0], dtype=torch.float64, device=t.device))[
            :, -1
        ].log()
        return torch.where((t > LATEST) & (level == self.num_levels), root[1] - root[0], 0.0)

    def _within(self, level: Tensor, cell: Tensor, into: Tensor) -> tuple[Tensor, Tensor]:
        """[r] the integral and its slope `into` a cell (0..1), by the cubic through both ends and their slopes."""
        totals, rates = (part.to(into.device) for part in self._entry_table)
        left, right = totals[cell, level - 1], totals[cell + 1, level - 1]
        first, last = CELL * rates[cell, level - 1], CELL * rates[cell + 1, level - 1]
        bend, twist = 3.0 * (right - left) - 2.0 * first - last, first + last - 2.0 * (right - left)
        total = left + into * (first + into * (bend + into * twist))
        return total, first + into * (2.0 * bend + 3.0 * into * twist)

    def generator(self, t: Tensor) -> Tensor:
        """[r, L+1, L+1] the generator of the level chain."""
        hazard = self.hazard(t)
        zero = torch.zeros_like(hazard[:, :1])
        return torch.diag_embed(hazard, offset=1) - torch.diag_embed(torch.cat([hazard, zero], -1))


@final
class LogTimeClock(LevelClock):
    """Hazards g_l / (1 - t): in log-time tau = -ln(1-t) the level chain is homogeneous with rates g_0..g_{L-1}.

    `rates` must be positive and at most 20; equal and nearly equal ones are welcome. (1,) is linear masking, (gamma, 1) the
    two-level clock of arXiv 2510.08632. exp(tau A) is computed by uniformisation, a series of positive terms, so every
    entry keeps its relative accuracy (1e-10 for t >= 1e-6), where partial fractions and "root = the rest" cancel.
    """

    def __init__(self, rates: Sequence[float]) -> None:
        rates = tuple(float(rate) for rate in rates)
        if not rates or not all(0.0 < rate <= MAX_RATE for rate in rates):
            raise ArgumentError(
                f"LogTimeClock: rates must be one number in (0, {MAX_RATE:g}] per level above the words; got {rates}."
            )
        self.rates = rates
        self.num_levels = len(rates)
        self._speed = max(rates)
        self._powers = self._matrix_powers()

    def _matrix_powers(self) -> Tensor:
        """[K, L+1, L+1] powers of I + A/q, enough for the latest interior time."""
        size = self.num_levels + 1
        rates = torch.tensor((*self.rates, 0.0), dtype=torch.float64)
        step = torch.diag(1.0 - rates / self._speed) + torch.diag(rates[:-1] / self._speed, 1)
        longest = -self._speed * math.log1p(-LATEST)
        count = int(longest + 12.0 * math.sqrt(longest) + 40.0)
        powers = [torch.eye(size, dtype=torch.float64)]
        for _ in range(count):
            powers.append(powers[-1] @ step)
        return torch.stack(powers)

    def _exponential(self, tau: Tensor, row: int | None = None) -> Tensor:
        """exp(tau A): sum_k Poisson(k; q tau) (I + A/q)^k; only one row of it when asked."""
        powers = self._powers.to(tau.device)
        powers = powers if row is None else powers[:, row]
        count = len(powers)
        times, place = torch.unique(
            tau, return_inverse=True
        )  # the rows of a sequence, or of a step, share their times
        scaled = (self._speed * times).unsqueeze(-1)
        ratios = scaled / torch.arange(1, count, dtype=tau.dtype, device=tau.device)
        weights = torch.cat([torch.ones_like(scaled), ratios.cumprod(-1)], -1) * (-scaled).exp()
        return (weights @ powers.reshape(count, -1)).reshape(len(times), *powers.shape[1:])[place]

    def _at_root(self, like: Tensor) -> Tensor:
        root = torch.zeros_like(like)
        root[..., -1] = 1.0
        return root

    def pi(self, t: Tensor) -> Tensor:
        levels = self._exponential(-torch.log1p(-t.clamp(max=LATEST)), row=0)
        return torch.where((t >= 1.0).unsqueeze(-1), self._at_root(levels), levels)

    def hazard(self, t: Tensor) -> Tensor:
        rates = torch.tensor(self.rates, dtype=t.dtype, device=t.device)
        return rates / (1.0 - interior(t)).unsqueeze(-1)

    def inflow(self, t: Tensor) -> Tensor:
        return self.hazard(t) * self.pi(interior(t))[:, :-1]

    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        elapsed = torch.log1p(-s.clamp(max=LATEST)) - torch.log1p(-t.clamp(max=LATEST))
        levels = self._exponential(elapsed)
        ended = ((t >= 1.0) & (s < 1.0))[:, None, None]
        return torch.where(ended, self._at_root(levels), levels)


@final
class CdfClock(LevelClock):
    """F_l given directly, one schedule per level: F_l = 1 - alpha_l with F_1 > F_2 > ... on (0,1).

    pi_l = F_l - F_{l+1}. With one level the finite step is closed; with more it is a time-ordered product over 400
    fourth-order Magnus steps (8e-13 measured for powers .8, 1.5, 3).
    """

    steps = 400

    def __init__(self, schedules: Sequence[Schedule]) -> None:
        if not schedules:
            raise ArgumentError(
                "CdfClock: schedules must hold one schedule per level above the words; got none."
            )
        self.schedules = tuple(schedules)
        self.num_levels = len(schedules)
        self.closes_at_clean = all(schedule.closes_at_clean for schedule in schedules)
        self.closes_at_prior = all(schedule.closes_at_prior for schedule in schedules)
        near = torch.logspace(
            -6, -2, 9, dtype=torch.float64
        )  # two schedules may cross in the last hundredth
        inside = self.cdf(
            torch.cat([near, torch.linspace(0.02, 0.98, 97, dtype=torch.float64), 1.0 - near])
        )
        ends = self.cdf(torch.tensor([0.0, 1.0], dtype=torch.float64))  # where they may touch
        unordered = (
            (inside[:, :-1] <= inside[:, 1:]).any(0) | (ends[:, :-1] < ends[:, 1:]).any(0)
        ).nonzero()
        if len(unordered):
            level = int(unordered[0]) + 1
            raise ArgumentError(
                f"CdfClock: every level must be reached before the next, F_{level}(t) > F_{level + 1}(t) on (0,1), but "
                f"schedules {level - 1} and {level} do not keep that order. Give the higher level a slower schedule."
            )

    def cdf(self, t: Tensor) -> Tensor:
        return torch.stack([schedule.one_minus_alpha(t) for schedule in self.schedules], -1)

    def pi(self, t: Tensor) -> Tensor:
        climbed = self.cdf(t)
        word = self.schedules[0].alpha(t).unsqueeze(-1)
        return torch.cat([word, climbed[:, :-1] - climbed[:, 1:], climbed[:, -1:]], -1)

    def inflow(self, t: Tensor) -> Tensor:
        return torch.stack([-schedule.d_alpha(interior(t)) for schedule in self.schedules], -1)

    def transition(self, s: Tensor, t: Tensor) -> Tensor:
        if self.num_levels == 1:
            alpha = self.schedules[0].alpha
            stay = torch.where(s < t, alpha(t) / alpha(torch.minimum(s, t)), torch.ones_like(t))
            return torch.stack(
                [
                    torch.stack([stay, 1.0 - stay], -1),
                    torch.tensor([0.0, 1.0]).to(t).expand(len(t), 2),
                ],
                1,
            )
        pairs, inverse = torch.unique(torch.stack([s, t], -1), dim=0, return_inverse=True)
        moved = propagate(self.generator, pairs[:, 0], pairs[:, 1], self.num_levels + 1, self.steps)
        if self.closes_at_prior:
            ended = ((pairs[:, 1] >= 1.0) & (pairs[:, 0] < 1.0))[:, None, None]
            root = torch.zeros_like(moved)
            root[..., -1] = 1.0
            moved = torch.where(ended, root, moved)
        return moved[inverse]
