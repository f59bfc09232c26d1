"""Learning rates as functions of the step: a multiplier in (0, 1] of each parameter group's own rate.

Nothing of it needs storing, since the step says all. A run that is continued with a larger number of steps follows the
cosine of the *new* total from there on, so its rate goes up again where the shorter run had come to its end.
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
        if self.warmup < 0:
            raise ArgumentError(f"warmup must be a number of steps, at least 0; got {self.warmup}.")

    def __call__(self, step: int) -> float:
        return min(1.0, (step + 1) / self.warmup) if self.warmup else 1.0


@dataclass(frozen=True)
class WarmupCosine:
    """Warm-up as above, then half a cosine from 1 down to `floor`, which the last of `steps` steps has.

    A run that is no longer than its warm-up is warm-up all through.
    """

    steps: int
    warmup: int = 0
    floor: float = 0.1

    def __post_init__(self) -> None:
        if self.warmup < 0:
            raise ArgumentError(f"warmup must be a number of steps, at least 0; got {self.warmup}.")
        if not 0.0 <= self.floor <= 1.0:
            raise ArgumentError(
                f"floor must be a share of the learning rate in [0, 1]; got {self.floor}."
            )

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        passed = (step + 1 - self.warmup) / (self.steps - self.warmup)
        return self.floor + (1.0 - self.floor) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, passed)))
