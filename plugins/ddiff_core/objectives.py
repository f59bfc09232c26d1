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
    """Diffusion objective: the NELBO at random times t.

    [objective] loss replaces the weights or the divergence of the NELBO in the training loss, and
    [objective] times draws t.
    """

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
    """Training loss: the NELBO with the weight of every position clipped to a range."""

    class Config(ComponentConfig):
        smallest: NonNegativeFloat = 0.0
        """Lower limit: smaller weights are raised to this value."""
        largest: PositiveFloat = 2.0
        """Upper limit: larger weights are lowered to this value."""

    @staticmethod
    def build(config: Config, *, process: ForwardProcess) -> ClippedLoss:
        return ClippedLoss(config.smallest, config.largest)


class TauConfig(ComponentConfig):
    """Range of the noise times in training, in units of tau (information time).

    tau is the lost fraction of the information about the token: 0 for clean tokens, 1 if the noisy
    state has no information about the token. Equal steps of tau lose equal information, for every
    schedule of the process.
    """

    start: Probability = 1e-3
    """Smallest tau."""
    stop: Probability = 1.0
    """Largest tau."""

    @model_validator(mode="after")
    def _check_range(self) -> Self:
        if not self.start < self.stop:
            raise ValueError(
                "start and stop are values of tau, and start must be less than stop; "
                f"got start = {self.start} and stop = {self.stop}"
            )
        return self


class PairedConfig(TauConfig):
    """Keys of time rules with noise in one window of positions after a clean prefix."""

    paired: bool = True
    """true: train all windows of a row in one forward pass over its clean and its noisy tokens;
    false: train one random window per row."""


class WindowConfig(PairedConfig):
    """Keys of time rules with windows of a chosen width."""

    width: PositiveInt
    """Number of positions in a window. Positions before the window are clean, and positions after
    the window are at the prior."""


@final
class Flat:
    """Time rule with one noise time per sequence, stratified over the global batch."""

    class Config(TauConfig):
        tokens: PositiveInt = 8
        """Sequence length for which the random times give the least variance; a smaller number
        draws small t more often."""

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
    """Sliding window: noise times increase from left to right within the window.

    Positions to the left of the window are clean, positions to the right are at the prior.
    """

    Config = WindowConfig

    @staticmethod
    def build(config: WindowConfig) -> WindowTimes:
        return WindowTimes(config.width, "slide", config.paired, config.start, config.stop)


@final
class Quenched:
    """Windows of one position: any process is trained to generate one token after the other."""

    Config = PairedConfig

    @staticmethod
    def build(config: PairedConfig) -> WindowTimes:
        return WindowTimes(1, "block", config.paired, config.start, config.stop)
