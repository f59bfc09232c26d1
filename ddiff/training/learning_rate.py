"""Learning-rate schedules: step -> factor in (0, 1] of each parameter group's own rate.

A schedule has no state, since the step determines it. A run that is resumed with a larger number of
steps follows the cosine of the new total from there on, so its rate rises again where the shorter
run had reached its end.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddiff.errors import ArgumentError


@dataclass(frozen=True)
class WarmupConstant:
    """(step + 1) / warmup during the first `warmup` steps, then 1. Steps count from 0."""

    warmup: int = 0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)

    def __call__(self, step: int) -> float:
        if self.warmup == 0:
            return 1.0
        return min(1.0, (step + 1) / self.warmup)


@dataclass(frozen=True)
class WarmupCosine:
    """Warm-up as in `WarmupConstant`, then half a cosine from 1 down to `floor` at the last step.

    A run that is not longer than its warm-up only warms up.
    """

    steps: int
    warmup: int = 0
    floor: float = 0.1

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)
        if not 0.0 <= self.floor <= 1.0:
            raise ArgumentError(
                f"floor must be a share of the learning rate in [0, 1]; got {self.floor}."
            )

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        progress = (step + 1 - self.warmup) / (self.steps - self.warmup)
        angle = math.pi * min(1.0, progress)
        cosine = 0.5 * (1.0 + math.cos(angle))
        return self.floor + (1.0 - self.floor) * cosine


def _check_warmup(warmup: int) -> None:
    if warmup < 0:
        raise ArgumentError(f"warmup must be a number of steps, at least 0; got {warmup}.")
