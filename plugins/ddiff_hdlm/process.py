"""Words climb to their cluster, clusters to coarser ones, the last to the mask (arXiv 2510.08632)."""

from __future__ import annotations

from typing import Annotated, Literal, final

from pydantic import Field, model_validator

from ddiff import (
    ArgumentError,
    CdfClock,
    ComponentConfig,
    ForwardProcess,
    HierarchicalVocabulary,
    LevelClock,
    LogTimeClock,
    PowerSchedule,
    Share,
    TreeProcess,
    Vocabulary,
)

# Slower than .3, a position reaches the mask so late that float64 times cannot tell: q_1 would not be the prior.
Rate = Annotated[float, Field(ge=0.3, le=20.0)]
Power = Annotated[float, Field(ge=0.3, le=10.0)]  # likewise, and no later than the middle of time


@final
class HierarchicalDiffusion(TreeProcess):
    """TreeProcess with the clock of the paper: hazard gamma/(1-t) from word to cluster, 1/(1-t) above.

    alpha = (1-t)^gamma; with two levels beta_c = gamma ((1-t) - (1-t)^gamma)/(gamma - 1), its limit -(1-t) ln(1-t) at
    gamma = 1, and beta_m the rest. `rates` gives every level's own hazard instead, `powers` gives F_l = t^power_l.
    """

    class Config(ComponentConfig):
        gamma: Rate | None = None
        """Hazard of leaving the words, in units of the hazard above them; 1 unless rates or powers are given."""
        rates: Annotated[tuple[Rate, ...], Field(min_length=2)] | None = None
        """One hazard per level above the words, from the words up; instead of gamma."""
        powers: tuple[Power, ...] | None = None
        """One power per level: a position has climbed to level l by t with probability t^power; instead of gamma."""
        xi: Share | tuple[Share, ...] = 1.0
        """Probability of climbing to one's own parent; one number, or one per level."""
        decoding: Literal["bayes", "within", "between", "free"] = "bayes"
        """How a step draws below a node when xi < 1."""

        @model_validator(mode="after")
        def _one_clock(self) -> HierarchicalDiffusion.Config:
            given = [
                name for name in ("gamma", "rates", "powers") if getattr(self, name) is not None
            ]
            if len(given) > 1:
                raise ValueError(
                    f"only one of gamma, rates and powers may be given; got {' and '.join(given)}"
                )
            return self

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> HierarchicalDiffusion:
        if vocabulary.num_levels < 2:
            raise ArgumentError(
                f"The process hdlm needs a vocabulary with clusters between words and mask; got {vocabulary}. "
                'Use [vocabulary] kind = "clusters", or the process mdlm for a flat one.'
            )
        return cls(
            vocabulary, cls._clock(config, vocabulary.num_levels), config.xi, config.decoding
        )

    @staticmethod
    def _clock(config: Config, num_levels: int) -> LevelClock:
        if config.powers is not None:
            return CdfClock([PowerSchedule(power) for power in config.powers])
        return LogTimeClock(config.rates or (config.gamma or 1.0, *(1.0,) * (num_levels - 1)))

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        two = HierarchicalVocabulary([[0, 1, 0, 1, 1, 2]])
        three = HierarchicalVocabulary([[2, 0, 1, 0, 1, 2], [1, 0, 1]])
        build = lambda vocabulary, **keys: cls.build(cls.Config(**keys), vocabulary=vocabulary)  # noqa: E731
        return [
            build(two, gamma=0.5),
            build(two, gamma=1.0),
            build(two, gamma=2.0, xi=0.9),
            build(two, gamma=1.0, xi=0.8),
            build(three, rates=(1.0, 1.0001, 0.7), xi=(0.8, 0.9)),
            build(three, powers=(0.8, 1.5, 3.0)),
        ]
