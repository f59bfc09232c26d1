"""Time grids of samplers: decreasing times from t = 1 to t = 0."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, Literal, final, get_args

import torch

from ddiff.core.field import FieldProcess
from ddiff.errors import ArgumentError, suggest

Spacing = Literal["uniform", "cosine", "log"]


class Steps(ABC):
    """Base class of time grids: a number of steps, and the times at which they start and end."""

    steps: int

    @abstractmethod
    def times_of(self, process: FieldProcess) -> list[float]:
        """Return steps + 1 times that never increase; the first is 1.0, the last 0.0."""


class FixedSteps(Steps):
    """Base class of time grids whose times do not depend on the process."""

    @abstractmethod
    def times(self) -> list[float]:
        """Return steps + 1 times that never increase; the first is 1.0, the last 0.0."""

    def times_of(self, process: FieldProcess) -> list[float]:
        """Return the times of the grid, which are the same for all processes."""
        return self.times()


@final
class Grid(FixedSteps):
    """Grid of N = `steps` steps between the times t_0 = 1, t_1, ..., t_N = 0.

    `spacing` selects the times:

    - "uniform": t_k = 1 - k/N.
    - "cosine": t_k = cos(pi k / 2N), with short steps first (arXiv 2202.04200).
    - "log": steps of equal length in u = -ln(1 - t), the time in which tree processes jump at
      constant rates by default. u is infinite at t = 1. The first step therefore goes to
      t_1 = 1 - 1/N, where u = ln N, and the other N - 1 steps go from u = ln N to u = 0.
    """

    def __init__(self, spacing: Spacing = "uniform", steps: int = 64) -> None:
        if spacing not in get_args(Spacing):
            raise ArgumentError(
                f"Grid: spacing must be one of {', '.join(get_args(Spacing))}; got {spacing!r}."
                + suggest(spacing, get_args(Spacing))
            )
        _check_steps(steps)
        self.spacing = spacing
        self.steps = steps

    def times(self) -> list[float]:
        """Return the steps + 1 times of the grid, from 1 to 0."""
        fractions = [k / self.steps for k in range(self.steps + 1)]
        if self.spacing == "uniform":
            return [1.0 - x for x in fractions]
        if self.spacing == "cosine":
            # cos(pi/2) is 6e-17 in floating point, so the last time is set to exactly 0.
            return [math.cos(math.pi / 2 * x) for x in fractions[:-1]] + [0.0]
        # A grid of one step has no second step to divide; max() avoids 0/0.
        divisor = max(self.steps - 1, 1)
        remaining = [(self.steps - k) / divisor for k in range(1, self.steps + 1)]
        # t = 1 - exp(-u); expm1 keeps the digits of small t.
        return [1.0] + [-math.expm1(-x * math.log(self.steps)) for x in remaining]


@final
class InformationGrid(Steps):
    """Grid of `steps` >= 1 equal steps of the information time of the process.

    Every step removes the same share of the noise, measured in nats (`ddiff.core.information`).
    """

    def __init__(self, steps: int = 64) -> None:
        _check_steps(steps)
        self.steps = steps

    def times_of(self, process: FieldProcess) -> list[float]:
        """Return the steps + 1 times of the grid, from 1 to 0."""
        tau = torch.tensor(Grid("uniform", self.steps).times(), dtype=torch.float64)
        times: list[float] = process.information_time.at(tau)[0].tolist()
        # The information time may begin and end at the interior times next to 0 and 1.
        return [1.0, *times[1:-1], 0.0]


@final
class LogSnrGrid(Steps):
    """Grid of a Gaussian process with equal steps of log SNR.

    The grid covers log SNR from `smallest`, or from its value at t = 1 if this is larger, to its
    value at t = 0. If log SNR is smaller at t = 1, for example -inf on a schedule of zero terminal
    SNR, the first of the N = `steps` steps goes from t = 1 to `smallest`. The error of this step is
    proportional to exp(smallest), which is 1 / (2 N)^2 by default.
    """

    def __init__(self, steps: int = 64, smallest: float | None = None) -> None:
        _check_steps(steps)
        self.steps = steps
        self.smallest = -2.0 * math.log(2.0 * steps) if smallest is None else smallest

    def times_of(self, process: Any) -> list[float]:
        """Return the steps + 1 times of the grid, from 1 to 0. Refuses a process of tokens."""
        if process.states != "vectors":
            raise ArgumentError(
                "LogSnrGrid: only Gaussian processes have a signal-to-noise ratio; got "
                f"{type(process).__name__}. Use Grid or InformationGrid."
            )
        ends = torch.tensor([0.0, 1.0], dtype=torch.float64)
        last, first = process.snr(ends).log().tolist()
        values = []
        count = self.steps
        if first < self.smallest:
            first = self.smallest
            values.append(first)
            # A grid of one step has no second step to divide; max() avoids 0/0.
            count = max(self.steps - 1, 1)
        values += [first + (last - first) * k / count for k in range(1, count)]
        inner = torch.tensor(values[: self.steps - 1], dtype=torch.float64)
        return [1.0, *process.times_of_log_snr(inner).tolist(), 0.0]


@final
class LoopGrid(FixedSteps):
    """Grid that stays at the time `hold` for many steps, for remasking (arXiv 2503.00307, "loop").

    After k of N = `steps` steps, tau = 1 - k/N is the fraction of steps that remain. The time t is
    a piecewise linear function of tau:

        tau from 1 to `on`        t falls from 1 to `hold`
        tau from `on` to `off`    t = `hold`
        tau from `off` to 0       t falls from `hold` to 0
    """

    def __init__(
        self,
        steps: int = 64,
        on: float = 0.55,
        off: float = 0.05,
        hold: float = 0.1,
    ) -> None:
        if not 0.0 < off < on < 1.0 or not 0.0 < hold < 1.0:
            raise ArgumentError(
                "LoopGrid: need 0 < off < on < 1 and hold in (0, 1); "
                f"got off = {off}, on = {on}, hold = {hold}."
            )
        _check_steps(steps)
        self.steps = steps
        self.on = on
        self.off = off
        self.hold = hold

    def times(self) -> list[float]:
        """Return the steps + 1 times of the grid, from 1 to 0."""
        return [self._time(1.0 - k / self.steps) for k in range(self.steps)] + [0.0]

    def _time(self, tau: float) -> float:
        """Return the time t at which a fraction `tau` of the steps remains."""
        if tau >= self.on:
            return 1.0 - (1.0 - self.hold) * (1.0 - tau) / (1.0 - self.on)
        return self.hold * min(tau / self.off, 1.0)


def _check_steps(steps: int) -> None:
    """Raise ArgumentError unless the number of steps is at least 1."""
    if steps < 1:
        raise ArgumentError(f"Grid: steps must be at least 1; got {steps}.")
