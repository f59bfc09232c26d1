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
    """Diffusion objective: the NELBO at random times t, weighted by [objective] loss."""

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
    """Training loss without reweighting: its gradient is an unbiased gradient of the NELBO."""

    @staticmethod
    def build(config: ComponentConfig, *, process: ForwardProcess) -> ElboLoss:
        return ElboLoss()


@final
class Clip:
    """Training loss with the weight of every position clipped to a range."""

    class Config(ComponentConfig):
        smallest: NonNegativeFloat = 0.0
        """Lower limit: smaller weights are raised to this value."""
        largest: PositiveFloat = 2.0
        """Upper limit: larger weights are lowered to this value."""

    @staticmethod
    def build(config: Config, *, process: ForwardProcess) -> ClippedLoss:
        return ClippedLoss(config.smallest, config.largest)


class TauConfig(ComponentConfig):
    """Range of the training times in tau, the fraction of the information on a token that is lost.

    tau is 0 for clean tokens and 1 if the state carries no information on the token. Equal steps of
    tau are equally informative, whatever the schedule of the process.
    """

    start: Probability = 1e-3
    """Smallest tau."""
    stop: Probability = 1.0
    """Largest tau."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if not self.start < self.stop:
            raise ValueError(
                "start must be before stop, both values of tau; "
                f"got start = {self.start} and stop = {self.stop}"
            )
        return self


class PairedConfig(TauConfig):
    """Keys of time rules that noise a window of positions after a clean prefix."""

    paired: bool = True
    """Train all windows in one pass over [clean; noisy] tokens; false: a random window per row."""


class WindowConfig(PairedConfig):
    """Keys of time rules with windows of a chosen width."""

    width: PositiveInt
    """Number of positions in a window; positions before it are clean, after it at the prior."""


@final
class Flat:
    """Time rule with one noise time per sequence, stratified over the global batch."""

    class Config(TauConfig):
        tokens: PositiveInt = 8
        """Sequence length for which the times have least variance; smaller means less noise."""

    @staticmethod
    def build(config: Config) -> FlatTimes:
        return FlatTimes(config.start, config.stop, config.tokens)


@final
class Block:
    """Block diffusion: adjacent windows, each with a separate noise time.

    Blocks are generated in order, so that the model is autoregressive between blocks.
    """

    Config = WindowConfig

    @staticmethod
    def build(config: WindowConfig) -> WindowTimes:
        return WindowTimes(config.width, "block", config.paired, config.start, config.stop)


@final
class Slide:
    """Window that slides from left to right.

    Noise times rise within the window, from the clean tokens on the left to the prior on the right.
    """

    Config = WindowConfig

    @staticmethod
    def build(config: WindowConfig) -> WindowTimes:
        return WindowTimes(config.width, "slide", config.paired, config.start, config.stop)


@final
class Quenched:
    """Windows of one position, from left to right: autoregression with any process."""

    Config = PairedConfig

    @staticmethod
    def build(config: PairedConfig) -> WindowTimes:
        return WindowTimes(1, "block", config.paired, config.start, config.stop)
