"""Diffusion objective, training losses and time rules as recipe components."""

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
    OccupancyTimes,
    PositiveFloat,
    PositiveInt,
    Probability,
    Share,
    TimeRule,
    TrainingLoss,
    WindowTimes,
)


@final
class Nelbo:
    """Diffusion objective: the NELBO, estimated at random noise times t.

    The key `times` selects the rule that draws t. The key `loss` selects a training loss, which may
    weight positions differently from the NELBO; evaluation always reports the NELBO.
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
    """Training loss that is the NELBO itself, so that gradients are unbiased."""

    states = frozenset({"tokens", "vectors"})

    @staticmethod
    def build(config: ComponentConfig, *, process: ForwardProcess) -> ElboLoss:
        return ElboLoss()


@final
class Clip:
    """Training loss that clips the weight of every position in the NELBO to a range."""

    states = frozenset({"tokens", "vectors"})

    class Config(ComponentConfig):
        smallest: NonNegativeFloat = 0.0
        """Lower limit: smaller weights are raised to this value."""
        largest: PositiveFloat = 2.0
        """Upper limit: larger weights are lowered to this value."""

    @staticmethod
    def build(config: Config, *, process: ForwardProcess) -> ClippedLoss:
        return ClippedLoss(config.smallest, config.largest)


class TauConfig(ComponentConfig):
    """Range of the noise times in training, given as values of tau.

    tau is the fraction of the information about the clean token that noise has destroyed: 0 for
    clean tokens, 1 if the noisy state has no information about the token. Each process converts tau
    to its time t, so that the range has the same meaning for every noise schedule.
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
    """Keys of time rules that add noise in a window of positions and keep earlier tokens clean."""

    paired: bool = True
    """true: train all windows of a row in one forward pass over its clean and its noisy tokens;
    false: train one random window per row."""


class WindowConfig(PairedConfig):
    """Keys of time rules that add noise in a window of `width` positions."""

    width: PositiveInt
    """Number of positions in a window. Positions before the window are clean, and positions after
    the window are at the prior."""


@final
class Flat:
    """Time rule that draws one noise time per sequence, stratified over the global batch."""

    class Config(TauConfig):
        tokens: PositiveInt = 8
        """Sequence length for which the random times give the least variance; a smaller number
        draws small t more often."""

    @staticmethod
    def build(config: Config) -> FlatTimes:
        return FlatTimes(config.start, config.stop, config.tokens)


@final
class Occupancy:
    """Time rule of trees that also trains near the path of the level clock.

    Each sequence has other shares of its positions at the levels of the tree. The network can then
    be evaluated with other clocks, and `ddiff clock` can find the best one.
    """

    class Config(Flat.Config):
        spread: Share = 0.5
        """Largest share of an extreme path in the level occupancies of a sequence. On an extreme
        path, the levels are reached one after the other or together."""

    @staticmethod
    def build(config: Config) -> OccupancyTimes:
        return OccupancyTimes(config.spread, config.start, config.stop, config.tokens)


@final
class Block:
    """Time rule of block diffusion: each block of `width` positions has a separate noise time.

    Blocks are generated from left to right, so that the model is autoregressive between blocks.
    """

    Config = WindowConfig

    @staticmethod
    def build(config: WindowConfig) -> WindowTimes:
        return WindowTimes(config.width, "block", config.paired, config.start, config.stop)


@final
class Slide:
    """Time rule of a sliding window, in which noise times increase from left to right.

    Positions to the left of the window are clean, positions to the right are at the prior.
    """

    Config = WindowConfig

    @staticmethod
    def build(config: WindowConfig) -> WindowTimes:
        return WindowTimes(config.width, "slide", config.paired, config.start, config.stop)


@final
class Quenched:
    """Time rule with blocks of one position, for generation of one token after the other.

    Any process can be trained in this way.
    """

    Config = PairedConfig

    @staticmethod
    def build(config: PairedConfig) -> WindowTimes:
        return WindowTimes(1, "block", config.paired, config.start, config.stop)
