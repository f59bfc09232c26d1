"""Step grids: the times that a stepped sampler visits, from 1 down to 0."""

from __future__ import annotations

import math
from typing import Literal, Protocol, final, get_args

from ddiff.errors import ArgumentError, suggest

Spacing = Literal["uniform", "cosine", "log"]


class Steps(Protocol):
    """Times of `steps` steps: steps + 1 numbers that do not rise, the first 1.0, the last 0.0."""

    steps: int

    def times(self) -> list[float]:
        """[steps + 1] from 1 to 0."""


@final
class Grid:
    """`steps` >= 1 steps from t = 1 to t = 0, k = 0..steps, N = steps.

    uniform: t = 1 - k/N. cosine: t = cos(pi k / 2N), short steps first (arXiv 2202.04200). log: even in u = -ln(1 - t),
    the clock of trees; u is infinite at t = 1, so the first step is uniform's, 1 to 1 - 1/N, and the others share ln N.
    """

    def __init__(self, spacing: Spacing = "uniform", steps: int = 64) -> None:
        if spacing not in get_args(Spacing):
            raise ArgumentError(
                f"Grid: spacing must be one of {', '.join(get_args(Spacing))}; got {spacing!r}."
                + suggest(spacing, get_args(Spacing))
            )
        self.spacing, self.steps = spacing, _checked(steps)

    def times(self) -> list[float]:
        share = [k / self.steps for k in range(self.steps + 1)]
        if self.spacing == "uniform":
            return [1.0 - x for x in share]
        if self.spacing == "cosine":
            return [math.cos(math.pi / 2 * x) for x in share[:-1]] + [0.0]
        left = [(self.steps - k) / max(self.steps - 1, 1) for k in range(1, self.steps + 1)]
        return [1.0] + [-math.expm1(-x * math.log(self.steps)) for x in left]


@final
class LoopGrid:
    """Down to `hold`, a pause there, then on to 0: steps for remasking to work in (arXiv 2503.00307, "loop").

    With tau = 1 - k/N: tau from 1 to `on` goes from t = 1 to `hold`, from `on` to `off` t rests, from `off` to 0 it ends.
    """

    def __init__(
        self, steps: int = 64, on: float = 0.55, off: float = 0.05, hold: float = 0.1
    ) -> None:
        if not 0.0 < off < on < 1.0 or not 0.0 < hold < 1.0:
            raise ArgumentError(
                f"LoopGrid: need 0 < off < on < 1 and hold in (0, 1); got off = {off}, on = {on}, hold = {hold}."
            )
        self.steps, self.on, self.off, self.hold = _checked(steps), on, off, hold

    def times(self) -> list[float]:
        return [self._time(1.0 - k / self.steps) for k in range(self.steps)] + [0.0]

    def _time(self, tau: float) -> float:
        if tau >= self.on:
            return 1.0 - (1.0 - self.hold) * (1.0 - tau) / (1.0 - self.on)
        return self.hold * min(tau / self.off, 1.0)


def _checked(steps: int) -> int:
    if steps < 1:
        raise ArgumentError(
            f"Grid: steps must be at least 1, each a move towards t = 0; got {steps}."
        )
    return steps
