"""Learning-rate schedules: functions from the step to a factor in [0, 1].

The trainer multiplies the learning rate of each parameter group by the factor. A schedule has no
state, because the step determines the factor. The cosine schedule also depends on the total number
of steps. If a run is resumed with a larger total number of steps, its learning rate therefore jumps
up at the resumption.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from ddiff.errors import ArgumentError


@dataclass(frozen=True)
class WarmupConstant:
    """Linear warm-up, then a constant learning rate.

    The factor is (step + 1) / warmup during the first `warmup` steps and 1 after them. Steps count
    from 0.
    """

    warmup: int = 0

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)

    def __call__(self, step: int) -> float:
        if self.warmup == 0:
            return 1.0
        return min(1.0, (step + 1) / self.warmup)


@dataclass(frozen=True)
class WarmupCosine:
    """Linear warm-up, then a cosine decay of the factor from 1 to `floor` at the last step.

    `steps` is the number of steps of the run. During the first `warmup` steps, the factor is
    (step + 1) / warmup. If `steps <= warmup`, there is no decay: after the warm-up the factor is 1.
    """

    steps: int
    warmup: int = 0
    floor: float = 0.1

    def __post_init__(self) -> None:
        _check_warmup(self.warmup)
        if not 0.0 <= self.floor <= 1.0:
            raise ArgumentError(
                f"floor must be a fraction of the learning rate, in [0, 1]; got {self.floor}."
            )

    def __call__(self, step: int) -> float:
        if step < self.warmup:
            return (step + 1) / self.warmup
        if self.steps <= self.warmup:
            return 1.0
        progress = (step + 1 - self.warmup) / (self.steps - self.warmup)
        angle = math.pi * min(1.0, progress)
        cosine = 0.5 * (1.0 + math.cos(angle))
        return self.floor + (1.0 - self.floor) * cosine


def _check_warmup(warmup: int) -> None:
    if warmup < 0:
        raise ArgumentError(f"warmup must be a number of steps, at least 0; got {warmup}.")
