"""Objective, training losses and time rules of the engine as recipe components."""

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
    """Diffusion objective: the integrand of the NELBO, weighted by [objective] loss."""

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
    """The NELBO without reweighting: gradients are unbiased."""

    @staticmethod
    def build(config: ComponentConfig, *, process: ForwardProcess) -> ElboLoss:
        return ElboLoss()


@final
class Clip:
    """The NELBO with every row's weight clipped to a range."""

    class Config(ComponentConfig):
        smallest: NonNegativeFloat = 0.0
        """Smaller weights are raised to this."""
        largest: PositiveFloat = 2.0
        """Larger weights are lowered to this."""

    @staticmethod
    def build(config: Config, *, process: ForwardProcess) -> ClippedLoss:
        return ClippedLoss(config.smallest, config.largest)


class TauConfig(ComponentConfig):
    """Range of the training times, in tau: the share of the token's information that is lost."""

    start: Probability = 1e-3
    """Smallest tau."""
    stop: Probability = 1.0
    """Largest tau."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if not self.start < self.stop:
            raise ValueError(f"start must be before stop; got {self.start} and {self.stop}")
        return self


class PairedConfig(TauConfig):
    """Keys of rules that noise a window of positions behind a clean prefix."""

    paired: bool = True
    """Train all windows in one pass over [clean; noisy]; if false, one random window per row."""


class WindowConfig(PairedConfig):
    """Keys of rules with windows of a chosen width."""

    width: PositiveInt
    """Positions of a window; earlier positions are clean, later ones are at the prior."""


@final
class Flat:
    """One time per sequence, stratified over the global batch."""

    class Config(TauConfig):
        tokens: PositiveInt = 8
        """Sequence length for which the draw of times minimizes variance; fewer draw less noise."""

    @staticmethod
    def build(config: Config) -> FlatTimes:
        return FlatTimes(config.start, config.stop, config.tokens)


@final
class Block:
    """Block diffusion: adjacent windows, each at its own time.

    Blocks are generated in order, so that the model is autoregressive between them.
    """

    Config = WindowConfig

    @staticmethod
    def build(config: WindowConfig) -> WindowTimes:
        return WindowTimes(config.width, "block", config.paired, config.start, config.stop)


@final
class Slide:
    """Window that slides from left to right; times in it rise from its clean to its noisy side."""

    Config = WindowConfig

    @staticmethod
    def build(config: WindowConfig) -> WindowTimes:
        return WindowTimes(config.width, "slide", config.paired, config.start, config.stop)


@final
class Quenched:
    """Windows of one position, in order: autoregression with any process."""

    Config = PairedConfig

    @staticmethod
    def build(config: PairedConfig) -> WindowTimes:
        return WindowTimes(1, "block", config.paired, config.start, config.stop)
