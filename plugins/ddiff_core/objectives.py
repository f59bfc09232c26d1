"""The objective, training losses and time rules that come with the engine, as components."""

from __future__ import annotations

from typing import Self, final

from pydantic import model_validator

from ddiff import (
    ClippedLoss,
    ComponentConfig,
    Denoiser,
    DiffusionObjective,
    ElboLoss,
    FlatTimes,
    ForwardProcess,
    NonNegativeFloat,
    PositiveFloat,
    PositiveInt,
    Probability,
    TimeRule,
    TrainingLoss,
    WindowTimes,
)


@final
class Nelbo:
    """Train on the bound's densities, as [objective] loss weighs them."""

    @staticmethod
    def build(
        config: ComponentConfig,
        *,
        process: ForwardProcess,
        denoiser: Denoiser,
        loss: TrainingLoss,
        times: TimeRule,
    ) -> DiffusionObjective:
        return DiffusionObjective(process, denoiser, loss, times)


@final
class Elbo:
    """The bound itself."""

    @staticmethod
    def build(config: ComponentConfig, *, process: ForwardProcess) -> ElboLoss:
        return ElboLoss()


@final
class Clip:
    """The bound with its weights held in a range."""

    class Config(ComponentConfig):
        smallest: NonNegativeFloat = 0.0
        largest: PositiveFloat = 2.0

    @staticmethod
    def build(config: Config, *, process: ForwardProcess) -> ClippedLoss:
        return ClippedLoss(config.smallest, config.largest)


class Window(ComponentConfig):
    """The window of tau, the share of the information that is lost, in which every position is trained."""

    start: Probability = 1e-3
    stop: Probability = 1.0

    @model_validator(mode="after")
    def _is_a_window(self) -> Self:
        if not self.start < self.stop:
            raise ValueError(f"start must be before stop; got {self.start} and {self.stop}")
        return self


class Alone(Window):
    """Windows of positions, read in one pass or one at a time."""

    paired: bool = True
    """All windows in one pass over twice the positions, each beside the clean words before it; else one, drawn."""


class Width(Alone):
    """Windows of so many positions."""

    width: PositiveInt
    """Positions that are noisy together; those before them are settled, those after them wait."""


@final
class Flat:
    """One time per sequence, stratified over the global batch."""

    class Config(Window):
        tokens: PositiveInt = 8
        """Times are drawn with the least variance for sequences of so many tokens; fewer: more draws at little noise."""

    @staticmethod
    def build(config: Config) -> FlatTimes:
        return FlatTimes(config.start, config.stop, config.tokens)


@final
class Block:
    """Windows side by side, each at one time of its own: autoregression from block to block."""

    Config = Width

    @staticmethod
    def build(config: Width) -> WindowTimes:
        return WindowTimes(config.width, "block", config.paired, config.start, config.stop)


@final
class Slide:
    """A window that glides from left to right, its times rising from the settled side to the waiting one."""

    Config = Width

    @staticmethod
    def build(config: Width) -> WindowTimes:
        return WindowTimes(config.width, "slide", config.paired, config.start, config.stop)


@final
class Quenched:
    """One position at a time, from left to right: autoregression by any process."""

    Config = Alone

    @staticmethod
    def build(config: Alone) -> WindowTimes:
        return WindowTimes(1, "block", config.paired, config.start, config.stop)
