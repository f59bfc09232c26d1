"""Hierarchical diffusion (arXiv 2510.08632): tokens become clusters, coarser clusters, the mask.

Levels count from the tokens (0) to the mask (L). pi_l(t) is the probability of level l at time t,
F_l = pi_l + ... + pi_L that of having reached level l, and the hazard of a level is the rate of
leaving it for the next one. xi is the probability of moving to the node's own parent.
"""

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

# Below 0.3 a position reaches the mask so late that float64 times cannot resolve it, and q_1 is
# not the prior. Above 20 the probability of a token at late times leaves float64.
Rate = Annotated[float, Field(ge=0.3, le=20.0)]
# As for Rate; above 10 hardly any position has moved at t = 1/2.
Power = Annotated[float, Field(ge=0.3, le=10.0)]


@final
class HierarchicalDiffusion(TreeProcess):
    """Tree process with the clock of the paper: hazard gamma/(1-t) of tokens, 1/(1-t) above.

    With u = 1 - t, pi_0 = u^gamma (alpha of the paper). With two levels the share of clusters is
    pi_1 = gamma (u - u^gamma)/(gamma - 1) (beta_c), its limit -u ln u at gamma = 1, and pi_2 is
    the rest (beta_m). `rates` sets the hazard of every level instead, `powers` sets
    F_l = t^power_l.
    """

    class Config(ComponentConfig):
        gamma: Rate | None = None
        """Hazard of leaving the tokens, relative to the levels above; 1 by default."""
        rates: Annotated[tuple[Rate, ...], Field(min_length=2)] | None = None
        """One hazard per level, from the tokens up; replaces gamma."""
        powers: tuple[Power, ...] | None = None
        """One power per level: level l is reached by t with probability t^power; replaces gamma."""
        xi: Share | tuple[Share, ...] = 1.0
        """Probability of moving to the node's own parent: one number, or one per level."""
        decoding: Literal["bayes", "within", "between", "free"] = "bayes"
        """Rule by which a reverse step draws below a node if xi < 1; "bayes" is exact."""

        @model_validator(mode="after")
        def _check_one_clock(self) -> HierarchicalDiffusion.Config:
            clocks = {"gamma": self.gamma, "rates": self.rates, "powers": self.powers}
            given = [name for name, value in clocks.items() if value is not None]
            if len(given) > 1:
                raise ValueError(
                    f"only one of gamma, rates and powers may be given; got {' and '.join(given)}"
                )
            return self

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> HierarchicalDiffusion:
        if vocabulary.num_levels < 2:
            raise ArgumentError(
                "The process hdlm needs a vocabulary with clusters between tokens and mask; "
                f"got {vocabulary}. "
                'Use [vocabulary] kind = "clusters", or the process mdlm for a flat one.'
            )
        clock = cls._make_clock(config, vocabulary.num_levels)
        return cls(vocabulary, clock, config.xi, config.decoding)

    @staticmethod
    def _make_clock(config: Config, num_levels: int) -> LevelClock:
        if config.powers is not None:
            return CdfClock([PowerSchedule(power) for power in config.powers])
        if config.rates is not None:
            return LogTimeClock(config.rates)
        above = (1.0,) * (num_levels - 1)
        return LogTimeClock((config.gamma or 1.0, *above))

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        two = HierarchicalVocabulary([[0, 1, 0, 1, 1, 2]])
        three = HierarchicalVocabulary([[2, 0, 1, 0, 1, 2], [1, 0, 1]])
        settings: list[tuple[HierarchicalVocabulary, dict[str, object]]] = [
            (two, {"gamma": 0.5}),
            (two, {"gamma": 1.0}),
            (two, {"gamma": 2.0, "xi": 0.9}),
            (two, {"gamma": 1.0, "xi": 0.8}),
            # Nearly equal rates, for which partial fractions would cancel.
            (three, {"rates": (1.0, 1.0001, 0.7), "xi": (0.8, 0.9)}),
            (three, {"powers": (0.8, 1.5, 3.0)}),
        ]
        return [
            cls.build(cls.Config.model_validate(keys), vocabulary=vocabulary)
            for vocabulary, keys in settings
        ]
