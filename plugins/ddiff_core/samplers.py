"""Samplers as components. All take `temperature`, `top_k`, `top_p` and `min_p`, applied to each conditional drawn from."""

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
    EntropyBoundSampler,
    FirstHittingSampler,
    ForwardBackward,
    Grid,
    HyperscheduleSampler,
    LoopGrid,
    LoopRemasking,
    MinP,
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
    ShapedSampler,
    Share,
    TauLeapingSampler,
    Temperature,
    TopK,
    TopP,
    TrapezoidalSampler,
    UnmaskingSampler,
    WindowTimes,
)

Spacing = Literal["uniform", "cosine", "log"]


class Shapes(ComponentConfig):
    """What each conditional passes through before it is drawn from; the defaults change nothing."""

    temperature: NonNegativeFloat = 1.0
    """p^(1/temperature); 0 is greedy."""
    top_k: PositiveInt | None = None
    """The k likeliest alone."""
    top_p: Share = 1.0
    """The likeliest that hold this mass together."""
    min_p: Probability = 0.0
    """Those of at least this share of the likeliest one's probability."""


class Steps(Shapes):
    """`[sample] steps` on a grid."""

    grid: Spacing = "uniform"
    """Times even in t, by the cosine (short steps first), or even in -ln(1 - t)."""


def shaped(config: Shapes, sampler: Sampler) -> Sampler:
    shapers = [
        shaper
        for shaper, used in (
            (Temperature(config.temperature), config.temperature != 1.0),
            (TopK(config.top_k or 1), config.top_k is not None),
            (TopP(config.top_p), config.top_p < 1.0),
            (MinP(config.min_p), config.min_p > 0.0),
        )
        if used
    ]
    return ShapedSampler(sampler, shapers) if shapers else sampler


@final
class Ancestral:
    """The exact reverse transition, step by step."""

    class Config(Steps):
        last: Literal["draw", "argmax"] = "draw"
        """The last step draws like the others, or takes the likeliest word."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shaped(config, AncestralSampler(Grid(config.grid, steps), config.last))


@final
class TauLeaping:
    """Reverse rates held still over each step."""

    Config = Steps

    @staticmethod
    def build(config: Steps, *, steps: int) -> Sampler:
        return shaped(config, TauLeapingSampler(Grid(config.grid, steps)))


@final
class Analytic:
    """The reverse transition in closed form, from a law or a score."""

    Config = Steps

    @staticmethod
    def build(config: Steps, *, steps: int) -> Sampler:
        return shaped(config, AnalyticSampler(Grid(config.grid, steps)))


@final
class Trapezoidal:
    """Two stages a step, the second with extrapolated rates."""

    class Config(Steps):
        theta: Probability = 0.5
        """Where in the step the second stage begins."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shaped(config, TrapezoidalSampler(Grid(config.grid, steps), config.theta))


@final
class FirstHitting:
    """From event to event, exact; takes as many network calls as there are candidate events, whatever `steps` says."""

    class Config(Shapes):
        until: PositiveFloat = 1e-3
        """Where tokens are noise: how many positions change at once at either end of time. The error is until^2 / 2."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shaped(config, FirstHittingSampler(config.until))


@final
class Surest:
    """Positions whose draw, or whose likeliest child, has the highest probability are revealed first."""

    class Config(Steps):
        by: Literal["confidence", "top", "entropy"] = "confidence"
        """Probability of what was drawn, of the likeliest, or low entropy."""
        noise: NonNegativeFloat = 0.0
        """Gumbel noise on ln p, fading with time."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shaped(config, UnmaskingSampler(Grid(config.grid, steps), config.by, config.noise))


@final
class Margin:
    """Positions whose two likeliest children lie furthest apart are revealed first."""

    class Config(Steps):
        noise: NonNegativeFloat = 0.0
        """Gumbel noise on the margin, fading with time."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shaped(config, UnmaskingSampler(Grid(config.grid, steps), "margin", config.noise))


@final
class EntropyBound:
    """As many positions a step as their entropies allow; ends when all are done, whatever `steps` says."""

    class Config(Shapes):
        bound: NonNegativeFloat = 0.1
        """Nats that the positions of one step may hold together, beside the largest."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shaped(config, EntropyBoundSampler(config.bound))


@final
class Psi:
    """The posterior step with probability kappa, otherwise a clean draw noised again."""

    class Config(Steps):
        kappa: Probability = 0.9
        """1 is ancestral, 0 predictor-corrector alone."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shaped(config, PsiSampler(Grid(config.grid, steps), config.kappa))


@final
class Remasking:
    """Words go back to noise with probability sigma a step."""

    class Config(Steps):
        setting: Literal["cap", "rescale", "confidence", "loop"] = "cap"
        """How sigma is set; `loop` rests at `hold` and has a grid of its own."""
        eta: Probability | None = None
        """Strength; by default 0.008 (cap), 0.015 (rescale), 1 (confidence), 0.02 (loop)."""
        hold: Share = 0.1
        """The time at which a loop rests."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        rule = {
            "cap": CapRemasking,
            "rescale": RescaleRemasking,
            "confidence": ConfidenceRemasking,
            "loop": LoopRemasking,
        }[config.setting]
        kappa = rule() if config.eta is None else rule(config.eta)
        grid = (
            LoopGrid(steps, hold=config.hold)
            if config.setting == "loop"
            else Grid(config.grid, steps)
        )
        return shaped(config, PsiSampler(grid, kappa))


@final
class Correcting:
    """Visible words are overwritten on the way (ACS)."""

    class Config(Steps):
        eta: Probability = 0.25
        """How often, in proportion to what is not revealed."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        return shaped(config, AdaptiveCorrectionSampler(Grid(config.grid, steps), config.eta))


@final
class SelfCorrecting:
    """Ancestral sampling, then rounds in which the surest changes are made until nothing is gained."""

    class Config(Steps):
        rounds: PositiveInt = 128
        """At most."""
        commit: PositiveInt = 1
        """Changes a round."""
        sharpness: NonNegativeFloat = 0.1
        """The temperature of the proposals."""
        at: Annotated[float, Field(gt=0.0, lt=1.0)] = 0.01
        """The time that the network is told."""
        patience: PositiveInt = 32
        """Rounds without gain."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        inner = AncestralSampler(Grid(config.grid, steps))
        return shaped(
            config,
            SelfCorrectingSampler(
                inner, config.rounds, config.commit, config.sharpness, config.at, config.patience
            ),
        )


@final
class Returning:
    """Ancestral steps, each followed by a way up and back (the corrector of discrete flow matching)."""

    class Config(Steps):
        rounds: PositiveInt = 1
        """Ways up and back after a step."""
        share: PositiveFloat = 1.0
        """How far up, in steps."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        inner = AncestralSampler(Grid(config.grid, steps))
        return shaped(
            config, PredictorCorrectorSampler(inner, ForwardBackward(config.share), config.rounds)
        )


@final
class OneLevel:
    """One level of the tree a step, as the published hierarchical sampler goes."""

    Config = Steps

    @staticmethod
    def build(config: Steps, *, steps: int) -> Sampler:
        return shaped(config, OneLevelSampler(Grid(config.grid, steps)))


INNER = {
    "ancestral": AncestralSampler,
    "tau_leaping": TauLeapingSampler,
    "confidence": UnmaskingSampler,
    "psi": PsiSampler,
}


@final
class Blockwise:
    """Windows from left to right, each from noise to words in `steps` steps."""

    class Config(Steps):
        width: PositiveInt = 16
        """Positions of a window."""
        inner: Literal[
            "ancestral", "tau_leaping", "confidence", "psi", "first_hitting", "entropy"
        ] = "ancestral"
        """What moves inside a window, with its defaults."""
        sight: Literal["blocks", "all"] = "blocks"
        """Nobody sees later windows, or the network sees them wait."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        events: dict[str, Callable[[], Sampler]] = {
            "first_hitting": FirstHittingSampler,
            "entropy": EntropyBoundSampler,
        }
        build = events.get(config.inner)
        inner = build() if build else INNER[config.inner](Grid(config.grid, steps))
        return shaped(config, BlockwiseSampler(inner, config.width, config.sight))


@final
class Hyperschedule:
    """Along the path of a window: positions settle at its one side while others begin at the other; `steps` in all."""

    class Config(Steps):
        width: PositiveInt = 16
        """Positions of the window."""
        shape: Literal["slide", "block"] = "slide"
        """The window glides, or gives way to the next one as a whole."""
        inner: Literal["ancestral", "tau_leaping", "psi"] = "ancestral"
        """What moves positions, with its defaults."""

    @staticmethod
    def build(config: Config, *, steps: int) -> Sampler:
        inner = INNER[config.inner](Grid(config.grid, steps))
        return shaped(
            config,
            HyperscheduleSampler(inner, WindowTimes(config.width, config.shape, paired=False)),
        )
