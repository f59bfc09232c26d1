"""Sampler that divides every step of the grid into two ancestral steps."""

from __future__ import annotations

from torch import Tensor

from ddiff import (
    AncestralSampler,
    Canvas,
    ComponentConfig,
    CounterRng,
    ForwardProcess,
    Grid,
    GridSampler,
    Network,
    Sampler,
    Share,
)


class TwoHalves(GridSampler):
    """First-order sampler with two ancestral steps, and network evaluations, per step of the grid.

    The error is that of the ancestral sampler with twice as many steps.

    Args:
        steps: number of steps of the grid.
        middle: place of the time between the two steps, as a power: (s/t)^middle of the time t.
    """

    order = 1  # the error falls as 1/steps; `ddiff check plugin_name` measures it

    def __init__(self, steps: int, middle: float) -> None:
        super().__init__(Grid("uniform", steps))
        self.middle = middle
        self._inner = AncestralSampler(steps)

    def move(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        """Move the free positions from their times t to the times s, by way of a time between."""
        between = canvas.t * (s / canvas.t).pow(self.middle)
        # the two steps need different random numbers
        first = rng.derive("first half", s.shape[1])
        canvas = self._inner.move(process, network, canvas, between, first)
        return self._inner.move(process, network, canvas, s, rng)


class PluginName:
    """Ancestral sampler with two steps per step of the grid."""

    class Config(ComponentConfig):
        middle: Share = 0.5
        """Place of the time between the two steps; 1/2 is the geometric mean of both ends."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return TwoHalves(steps, config.middle)
