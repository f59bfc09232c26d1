"""Score entropy diffusion: tokens are masked or replaced by random tokens (arXiv 2310.16834).

sigma(t) is the total noise up to time t: with probability alpha = e^-sigma a token has not been
noised by time t.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, model_validator

from ddiff import (
    ArgumentError,
    ComponentConfig,
    FlatVocabulary,
    ForwardProcess,
    GeometricSchedule,
    LinearSchedule,
    MixtureProcess,
    Schedule,
    Vocabulary,
    mask_distribution,
    token_distribution,
)

Floor = Annotated[float, Field(ge=0.0, lt=1.0)]
# Below 1e-12 alpha would round to 1 at t = 0. Above 100 alpha would be 0 long before t = 1.
LeastSigma = Annotated[float, Field(ge=1e-12, le=1.0)]
MostSigma = Annotated[float, Field(gt=0.0, le=100.0)]
PUBLISHED_FLOOR = 1e-3
PUBLISHED_SIGMA_MIN = 1e-4
PUBLISHED_SIGMA_MAX = 20.0


class ScoreEntropyDiffusion:
    """Score entropy diffusion: q_t(.|x) = e^-sigma delta_x + (1 - e^-sigma) noise distribution.

    `graph` selects the noise distribution: the mask, or the uniform distribution over the tokens.
    `noise` selects the schedule sigma(t).
    """

    class Config(ComponentConfig):
        graph: Literal["absorb", "uniform"] = "absorb"
        """Target of the noise: the mask, or a uniform token ([vocabulary] mask = false)."""
        noise: Literal["loglinear", "geometric"] = "loglinear"
        """Schedule: e^-sigma = 1 - (1 - floor) t, or sigma = sigma_min^(1-t) sigma_max^t."""
        floor: Floor | None = None
        """For log-linear noise: e^-sigma at t = 1; 0.001 by default."""
        sigma_min: LeastSigma | None = None
        """For geometric noise: sigma at t = 0; 0.0001 by default."""
        sigma_max: MostSigma | None = None
        """For geometric noise: sigma at t = 1; 20 by default."""

        @model_validator(mode="after")
        def _check_keys_of_noise(self) -> ScoreEntropyDiffusion.Config:
            if self.noise == "loglinear":
                foreign = {"sigma_min": self.sigma_min, "sigma_max": self.sigma_max}
            else:
                foreign = {"floor": self.floor}
            # The defaults are None, so that a key of the other schedule is noticed.
            given = [name for name, value in foreign.items() if value is not None]
            if given:
                raise ValueError(f'noise = "{self.noise}" takes no {" and no ".join(given)}')
            return self

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> MixtureProcess:
        masked = config.graph == "absorb"
        # Levels above the tokens: one (the mask) or none.
        if vocabulary.num_levels != int(masked):
            raise ArgumentError(
                f'The process sedd with graph = "{config.graph}" needs tokens '
                f"{'and a mask' if masked else 'without a mask'}; got {vocabulary}. "
                f'Use [vocabulary] kind = "flat" with mask = {str(masked).lower()}.'
            )
        dist = mask_distribution(vocabulary) if masked else token_distribution(vocabulary)
        return MixtureProcess(vocabulary, cls._schedule(config), dist)

    @staticmethod
    def _schedule(config: Config) -> Schedule:
        if config.noise == "loglinear":
            return LinearSchedule(PUBLISHED_FLOOR if config.floor is None else config.floor)
        return GeometricSchedule(
            config.sigma_min or PUBLISHED_SIGMA_MIN, config.sigma_max or PUBLISHED_SIGMA_MAX
        )

    formulas: ClassVar[str] = """
        marginal    q_t(.|x) = alpha delta_x + (1 - alpha) target
        rates       Q[y,z] = sigma' target(z)  for y != z
        integrand   sum_{y != z} Q[y,z] ( s_theta(y) - s(y) ln s_theta(y) + K(s(y)) ),
                    where K(r) = r(ln r - 1)

        x, z        clean token, and state of its position at time t
        y           any other state
        sigma, alpha   total noise up to time t, and alpha = e^-sigma
        target      distribution of a state after a jump: the mask, or uniform over the tokens
        Q[y,z]      rate of jumps from y to z
        s(y), s_theta(y)   true score q_t(y|x)/q_t(z|x); output of the network
        """

    example_settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {"graph": "absorb", "noise": "loglinear"},
        {"graph": "absorb", "noise": "loglinear", "floor": 0.0},
        {"graph": "absorb", "noise": "geometric"},
        {"graph": "uniform", "noise": "loglinear"},
        {"graph": "uniform", "noise": "loglinear", "floor": 0.0},
        {"graph": "uniform", "noise": "geometric"},
        {"graph": "uniform", "noise": "geometric", "sigma_min": 0.05, "sigma_max": 3.0},
    )

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        configs = [cls.Config(**keys) for keys in cls.example_settings]
        return [
            cls.build(config, vocabulary=FlatVocabulary(3, mask=config.graph == "absorb"))
            for config in configs
        ]
