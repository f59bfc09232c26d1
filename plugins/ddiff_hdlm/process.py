"""Hierarchical diffusion (arXiv 2510.08632): tokens become clusters, then masks.

The states form a tree. Level 0 contains the tokens, the levels above contain clusters, and the
highest level L is the mask. Symbols:

    pi_l(t)    probability that a position is at level l at time t
    F_l(t)     probability that a position has reached level l by time t: pi_l + ... + pi_L
    hazard     rate at which a position at a level moves to the next higher level
    xi         probability that such a move leads to the parent of the current node, and not to
               another node of the parent's level
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field, model_validator

from ddiff import (
    ArgumentError,
    BernsteinSchedule,
    CdfClock,
    ComponentConfig,
    ForwardProcess,
    HierarchicalVocabulary,
    LevelClock,
    LogTimeClock,
    PowerSchedule,
    Probability,
    Share,
    TreeProcess,
    Vocabulary,
)

# Below 0.3 too many positions reach the mask at times that float64 does not distinguish from 1.
# Above 20 the probability of a token at late times is too small for float64.
Rate = Annotated[float, Field(ge=0.3, le=20.0)]
# The lower limit is that of Rate. Above 10 hardly any position has moved at t = 1/2.
Power = Annotated[float, Field(ge=0.3, le=10.0)]


@final
class HierarchicalDiffusion(TreeProcess):
    """Hierarchical diffusion: positions move from tokens to clusters and on to the mask.

    One of four settings gives the rates of these moves:

    - gamma: tokens become clusters at the rate gamma/(1 - t), and clusters move up at the rate
      1/(1 - t).
    - rates: states of level l move up at the rate rates[l]/(1 - t).
    - powers: a position has reached level l by time t with the probability t^p, where p is
      powers[l - 1].
    - occupancies: the same probability is a Bernstein polynomial of the values occupancies[l - 1],
      which a curve of t follows at equally spaced times.

    On a tree of tokens, clusters and the mask, gamma gives the following probabilities at time t,
    where u = 1 - t and the symbols of the paper are in brackets:

        token      u^gamma                               (alpha)
        cluster    gamma (u - u^gamma)/(gamma - 1)       (beta_c); -u ln u at gamma = 1
        mask       1 minus the two others                (beta_m)
    """

    class Config(ComponentConfig):
        gamma: Rate | None = None
        """Rate of leaving the tokens, relative to the rate of the levels above; 1 by default."""
        rates: Annotated[tuple[Rate, ...], Field(min_length=2)] | None = None
        """One rate per level, from the tokens up; the hazard of the level is rate/(1 - t)."""
        powers: tuple[Power, ...] | None = None
        """One power per level: the level is reached by time t with probability t^power."""
        occupancies: tuple[tuple[Probability, ...], ...] | None = None
        """One list of 2 to 17 values per level, rising from 0 to 1: the level is reached by time t
        with a probability that follows the values. `ddiff clock` finds such lists."""
        xi: Share | tuple[Share, ...] = 1.0
        """Probability that a node moves to its parent and not to another node of the parent's
        level: one number, or one per level."""
        decoding: Literal["bayes", "within", "between", "free"] = "bayes"
        """Rule for the reverse draw from a node to a lower level if xi < 1: from the exact
        posterior ("bayes"), only below the node ("within"), below the node with probability xi
        ("between"), or from the prediction, ignoring the node ("free")."""

        @model_validator(mode="after")
        def _check_one_clock(self) -> HierarchicalDiffusion.Config:
            given = self.model_dump(
                include={"gamma", "rates", "powers", "occupancies"}, exclude_none=True
            )
            if len(given) > 1:
                raise ValueError(
                    "only one of gamma, rates, powers and occupancies may be given, since each of "
                    f"these keys defines all rates; got {' and '.join(given)}"
                )
            return self

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> HierarchicalDiffusion:
        if vocabulary.num_levels < 2:
            raise ArgumentError(
                'The process "hdlm" needs a vocabulary with clusters between tokens and mask; '
                f"got {vocabulary}. "
                'Use [vocabulary] kind = "clusters", or [process] kind = "mdlm".'
            )
        return cls(
            vocabulary, cls._make_clock(config, vocabulary.num_levels), config.xi, config.decoding
        )

    @staticmethod
    def _make_clock(config: Config, num_levels: int) -> LevelClock:
        if config.powers is not None:
            return CdfClock([PowerSchedule(power) for power in config.powers])
        if config.rates is not None:
            return LogTimeClock(config.rates)
        if config.occupancies is not None:
            return CdfClock([BernsteinSchedule(values) for values in config.occupancies])
        above = (1.0,) * (num_levels - 1)
        return LogTimeClock((config.gamma or 1.0, *above))

    formulas: ClassVar[str] = """
        rates              a token moves to its cluster at the rate gamma/u; a cluster moves up
                           at the rate 1/u
        pi_0               u^gamma  (alpha of the paper)
        pi_1 for L = 2     gamma (u - u^gamma)/(gamma - 1),  or -u ln u at gamma = 1  (beta_c of the
                           paper)
        pi_2 for L = 2     1 - pi_0 - pi_1  (beta_m of the paper)
        integrand          (F_l'/pi_l) * ( -ln P(a_{l-1}(x) | a_l(x)) )  at a node of level l >= 1;
                           0 at tokens

        x, a_l(x)          clean token, and its ancestor at level l
        u                  1 - t
        L                  number of levels above the tokens; level L is the mask
        pi_l(t)            probability that a position is at level l at time t
        F_l                pi_l + ... + pi_L; F_l' is its derivative
        P(b | a)           predicted probability of node b below node a
        """

    example_settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {"gamma": 0.5},
        {"gamma": 1.0},
        {"gamma": 2.0, "xi": 0.9},
        {"gamma": 1.0, "xi": 0.8},
        # Nearly equal rates: a formula with differences of rates would lose all digits.
        {"rates": (1.0, 1.0001, 0.7), "xi": (0.8, 0.9)},
        {"powers": (0.8, 1.5, 3.0)},
        {"occupancies": ((0.0, 0.7, 0.9, 1.0), (0.0, 0.1, 0.8, 1.0)), "xi": 0.9},
    )

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        two = HierarchicalVocabulary([[0, 1, 0, 1, 1, 2]])
        # Clusters of unequal size, and tokens that are not sorted by cluster.
        three = HierarchicalVocabulary([[2, 0, 1, 0, 1, 2], [1, 0, 1]])
        vocabularies = (two, two, two, two, three, three, two)
        return [
            cls.build(cls.Config.model_validate(keys), vocabulary=vocabulary)
            for keys, vocabulary in zip(cls.example_settings, vocabularies, strict=True)
        ]
