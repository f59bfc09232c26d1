"""Samplers as recipe components.

Samplers of tokens accept `temperature`, `top_k`, `top_p` and `min_p`. They are applied to the
predicted distribution of the token; on a tree, to the distribution over the children of each node.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Literal, final

from pydantic import Field

from ddiff import (
    AdaptiveCorrectionSampler,
    AnalyticSampler,
    AncestralSampler,
    BlockwiseSampler,
    CapRemasking,
    ComponentConfig,
    ConfidenceRemasking,
    DdimSampler,
    EntropyBoundSampler,
    EulerMaruyamaSampler,
    EulerSampler,
    FirstHittingSampler,
    ForwardBackward,
    Grid,
    HeunSampler,
    HyperscheduleSampler,
    InformationGrid,
    LogSnrGrid,
    LoopGrid,
    LoopRemasking,
    NonNegativeFloat,
    OneLevelSampler,
    PositiveFloat,
    PositiveInt,
    PredictorCorrectorSampler,
    Probability,
    PsiSampler,
    RescaleRemasking,
    Sampler,
    SelfCorrectingSampler,
    Share,
    TauLeapingSampler,
    TrapezoidalSampler,
    UnmaskingSampler,
    WindowTimes,
    shape_sampler,
)

Spacing = Literal["uniform", "cosine", "log"]


class ShapingConfig(ComponentConfig):
    """Temperature and filters of the predicted distribution; the defaults change nothing.

    On a tree, they apply to the distribution over the children of each node.
    """

    temperature: NonNegativeFloat = 1.0
    """Probabilities are raised to the power 1/temperature; 0 takes the most likely entry."""
    top_k: PositiveInt | None = None
    """Draw only from the k most likely entries."""
    top_p: Share = 1.0
    """Draw only from the smallest set of most likely entries with this total probability."""
    min_p: Probability = 0.0
    """Draw only from entries of at least this fraction of the largest probability."""


class GridConfig(ShapingConfig):
    """Settings of samplers that take `[sample] steps` steps on a grid of times."""

    grid: Spacing = "uniform"
    """Spacing of times: uniform in t, cosine (short steps first), or uniform in -ln(1 - t)."""


def shape(config: ShapingConfig, sampler: Sampler) -> Sampler:
    """Apply the temperature and filters of `config` to the predictions that `sampler` receives."""
    return shape_sampler(sampler, config.temperature, config.top_k, config.top_p, config.min_p)


@final
class Ancestral:
    """Ancestral sampler: draws from the exact reverse transition at every step."""

    class Config(GridConfig):
        last: Literal["draw", "argmax"] = "draw"
        """In the last step, draw each token or take the most likely token."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shape(config, AncestralSampler(Grid(config.grid, steps), config.last))


@final
class TauLeaping:
    """Tau-leaping sampler: keeps the reverse rates constant during each step."""

    Config = GridConfig

    @staticmethod
    def build(config: GridConfig, *, steps: int) -> Sampler:
        return shape(config, TauLeapingSampler(Grid(config.grid, steps)))


@final
class Analytic:
    """Analytic (Tweedie) sampler: reverse transition in closed form, from distribution or score."""

    Config = GridConfig

    @staticmethod
    def build(config: GridConfig, *, steps: int) -> Sampler:
        return shape(config, AnalyticSampler(Grid(config.grid, steps)))


@final
class Trapezoidal:
    """Theta-trapezoidal sampler: two tau-leaps per step, the second with extrapolated rates."""

    class Config(GridConfig):
        theta: Probability = 0.5
        """Fraction of the step after which the second stage starts."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shape(config, TrapezoidalSampler(Grid(config.grid, steps), config.theta))


@final
class FirstHitting:
    """First-hitting sampler: exact; positions change one after the other at random times.

    The network is evaluated once for each time at which a position may change. `steps` has no
    effect.
    """

    class Config(ShapingConfig):
        until: PositiveFloat = 1e-3
        """Only for uniform noise: average number of positions that are drawn in one step at each
        end of time; the error in total variation is at most until^2 / 2."""

    @staticmethod
    def build(config: Config) -> Sampler:
        return shape(config, FirstHittingSampler(config.until))


@final
class Confidence:
    """Confidence sampler: reveals first the positions with the most confident predictions."""

    class Config(GridConfig):
        by: Literal["confidence", "top", "entropy"] = "confidence"
        """Confidence of a position: probability of the drawn token ("confidence") or of the most
        likely token ("top"), or the negative entropy ("entropy")."""
        noise: NonNegativeFloat = 0.0
        """Scale of the Gumbel noise added to the confidence; the noise is multiplied by the time
        after the step, so that it ends at 0."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shape(config, UnmaskingSampler(Grid(config.grid, steps), config.by, config.noise))


@final
class Margin:
    """Margin sampler: reveals first the positions with the largest margin.

    The margin is the difference of the probabilities of the two most likely tokens.
    """

    class Config(GridConfig):
        noise: NonNegativeFloat = 0.0
        """Scale of the Gumbel noise added to the margin; the noise is multiplied by the time after
        the step, so that it ends at 0."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shape(config, UnmaskingSampler(Grid(config.grid, steps), "margin", config.noise))


@final
class EntropyBound:
    """Entropy-bound sampler: reveals first the positions of lowest entropy.

    A step reveals as many positions as the limit `bound` on their total entropy allows. The number
    of steps therefore depends on the predictions, and the setting `steps` has no effect.
    """

    class Config(ShapingConfig):
        bound: NonNegativeFloat = 0.1
        """Limit, in nats, on the sum of the entropies of the positions of one step. The largest
        entropy does not count."""

    @staticmethod
    def build(config: Config) -> Sampler:
        return shape(config, EntropyBoundSampler(config.bound))


@final
class Psi:
    """Psi sampler: ancestral step with probability kappa, else predict a token and noise it."""

    class Config(GridConfig):
        kappa: Probability = 0.9
        """Probability of the posterior step: 1 is ancestral sampling; at 0 every position is
        redrawn in every step."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shape(config, PsiSampler(Grid(config.grid, steps), config.kappa))


REMASKING = {
    "cap": CapRemasking,
    "rescale": RescaleRemasking,
    "confidence": ConfidenceRemasking,
    "loop": LoopRemasking,
}


@final
class Remasking:
    """Remasking sampler (ReMDM): each step noises each token again with probability sigma."""

    class Config(GridConfig):
        setting: Literal["cap", "rescale", "confidence", "loop"] = "cap"
        """Rule for sigma. "loop" ignores `grid`: its time stays at `hold` for part of the steps,
        in which tokens are remasked."""
        eta: Probability | None = None
        """Strength of the remasking; by default 0.008 (cap), 0.015 (rescale), 1 (confidence) or
        0.02 (loop)."""
        hold: Share = 0.1
        """Only for "loop": the time t during the remasking steps."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        rule = REMASKING[config.setting]
        kappa = rule() if config.eta is None else rule(config.eta)
        if config.setting == "loop":
            return shape(config, PsiSampler(LoopGrid(steps, hold=config.hold), kappa))
        return shape(config, PsiSampler(Grid(config.grid, steps), kappa))


@final
class AdaptiveCorrection:
    """Adaptive correction sampler: ancestral steps in which some tokens are drawn again."""

    class Config(GridConfig):
        eta: Probability = 0.25
        """Largest probability per step that a token is redrawn."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shape(config, AdaptiveCorrectionSampler(Grid(config.grid, steps), config.eta))


@final
class SelfCorrection:
    """Self-correcting sampler: ancestral sampling, then correction of the finished tokens.

    Each correction round proposes a token at every position and accepts the most likely changes.
    The correction of a sequence ends when no token changes, or after more than `patience` rounds
    without improvement.
    """

    class Config(GridConfig):
        rounds: PositiveInt = 128
        """Largest number of correction rounds."""
        commit: PositiveInt = 1
        """Number of changes per sequence in a round."""
        sharpness: NonNegativeFloat = 0.1
        """Temperature at which tokens are proposed; 0 proposes the most likely token."""
        at: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
        """Time t on which the network is conditioned in the correction rounds."""
        patience: PositiveInt = 32
        """Number of rounds without improvement after which a sequence stops."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        inner = AncestralSampler(Grid(config.grid, steps))
        sampler = SelfCorrectingSampler(
            inner,
            rounds=config.rounds,
            commit=config.commit,
            temperature=config.sharpness,
            at=config.at,
            patience=config.patience,
        )
        return shape(config, sampler)


@final
class PredictorCorrector:
    """Predictor-corrector sampler (discrete flow matching): corrects after every ancestral step."""

    class Config(GridConfig):
        rounds: PositiveInt = 1
        """Corrector rounds per step: each round is a forward step and the reverse step back."""
        share: PositiveFloat = 1.0
        """Length of the corrector's forward step, as a multiple of the ancestral step."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        inner = AncestralSampler(Grid(config.grid, steps))
        corrector = ForwardBackward(config.share)
        return shape(config, PredictorCorrectorSampler(inner, corrector, config.rounds))


@final
class OneLevel:
    """Sampler of the hierarchical diffusion paper: moves at most one level of the tree per step."""

    Config = GridConfig

    @staticmethod
    def build(config: GridConfig, *, steps: int) -> Sampler:
        return shape(config, OneLevelSampler(Grid(config.grid, steps)))


WITH_GRID = {
    "ancestral": AncestralSampler,
    "tau_leaping": TauLeapingSampler,
    "confidence": UnmaskingSampler,
    "psi": PsiSampler,
}
# Samplers that choose their own times.
WITHOUT_GRID: dict[str, Callable[[], Sampler]] = {
    "first_hitting": FirstHittingSampler,
    "entropy": EntropyBoundSampler,
}


@final
class Blockwise:
    """Blockwise sampler: draws one window of positions after the other, from left to right.

    `steps` is the number of steps per window.
    """

    class Config(GridConfig):
        width: PositiveInt = 16
        """Number of positions of a window."""
        inner: Literal[
            "ancestral", "tau_leaping", "confidence", "psi", "first_hitting", "entropy"
        ] = "ancestral"
        """Sampler inside a window, with its default settings."""
        sight: Literal["blocks", "all"] = "blocks"
        """Attend to the current and earlier windows ("blocks"), or to all windows ("all")."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        inner: Sampler
        if config.inner in WITHOUT_GRID:
            inner = WITHOUT_GRID[config.inner]()
        else:
            inner = WITH_GRID[config.inner](Grid(config.grid, steps))
        return shape(config, BlockwiseSampler(inner, config.width, config.sight))


@final
class Hyperschedule:
    """Hyperschedule sampler: denoises positions in a window that moves from left to right.

    `steps` is the number of steps for the whole sequence.
    """

    class Config(GridConfig):
        width: PositiveInt = 16
        """Number of positions of the window."""
        shape: Literal["slide", "block"] = "slide"
        """Path of the window: "slide" moves it continuously along the positions; "block" finishes
        one window before the next window starts."""
        inner: Literal["ancestral", "tau_leaping", "psi"] = "ancestral"
        """Sampler that moves the positions of the window, with its default settings."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        inner = WITH_GRID[config.inner](Grid(config.grid, steps))
        # A path visits every window; paired times are for training.
        rule = WindowTimes(config.width, config.shape, paired=False)
        return shape(config, HyperscheduleSampler(inner, rule))


# ---------------------------------------------------------------------- vectors


class VectorConfig(ComponentConfig):
    """Settings of samplers of vectors with `[sample] steps` steps on a grid of times."""

    grid: Literal["uniform", "information", "log_snr"] = "uniform"
    """Spacing of times: uniform in t, in information time, or in the log signal-to-noise ratio."""
    last: Literal["draw", "mean"] = "draw"
    """At t = 0, draw each vector from the decoder, or take the mean of the decoder."""


def make_vector_grid(config: VectorConfig, steps: int) -> Grid | InformationGrid | LogSnrGrid:
    """Return the grid of a sampler of vectors."""
    if config.grid == "information":
        return InformationGrid(steps)
    if config.grid == "log_snr":
        return LogSnrGrid(steps)
    return Grid("uniform", steps)


@final
class Ddim:
    """DDIM for vectors: steps along the predicted noise, deterministic by default."""

    states = frozenset({"vectors"})

    class Config(VectorConfig):
        eta: Probability = 0.0
        """Share of the noise of the reverse process that is drawn in each step: 1 is DDPM."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return DdimSampler(make_vector_grid(config, steps), config.eta, config.last)


@final
class Ddpm:
    """DDPM for vectors: draw from the exact reverse transition given the predicted mean."""

    states = frozenset({"vectors"})

    Config = VectorConfig

    @staticmethod
    def build(config: VectorConfig, *, steps: int) -> Sampler:
        return DdimSampler(make_vector_grid(config, steps), 1.0, config.last)


@final
class Euler:
    """Euler steps for vectors on the probability flow."""

    states = frozenset({"vectors"})

    Config = VectorConfig

    @staticmethod
    def build(config: VectorConfig, *, steps: int) -> Sampler:
        return EulerSampler(make_vector_grid(config, steps), config.last)


@final
class Heun:
    """Heun steps for vectors on the probability flow, with two network evaluations per step."""

    states = frozenset({"vectors"})

    Config = VectorConfig

    @staticmethod
    def build(config: VectorConfig, *, steps: int) -> Sampler:
        return HeunSampler(make_vector_grid(config, steps), config.last)


@final
class ReverseSde:
    """Euler-Maruyama steps for vectors on the reverse stochastic differential equation."""

    states = frozenset({"vectors"})

    Config = VectorConfig

    @staticmethod
    def build(config: VectorConfig, *, steps: int) -> Sampler:
        return EulerMaruyamaSampler(make_vector_grid(config, steps), config.last)
