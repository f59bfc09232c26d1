"""Words are masked, or redrawn among all words (arXiv 2310.16834)."""

from __future__ import annotations

from typing import Annotated, Any, Literal

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
# Below and above float64 knows no noise, and no word.
LeastSigma = Annotated[float, Field(ge=1e-12, le=1.0)]
MostSigma = Annotated[float, Field(gt=0.0, le=100.0)]
PUBLISHED_FLOOR, PUBLISHED_SIGMA = 1e-3, (1e-4, 20.0)


class ScoreEntropyDiffusion:
    """The mixture q_t(.|x) = e^-sigma delta_x + (1 - e^-sigma) target; the target is the mask or uniform over words."""

    class Config(ComponentConfig):
        graph: Literal["absorb", "uniform"] = "absorb"
        """What a word turns into: the mask, or any word (then the vocabulary has mask = false)."""
        noise: Literal["loglinear", "geometric"] = "loglinear"
        """e^-sigma = 1 - (1 - floor) t, or sigma = sigma_min^(1-t) sigma_max^t."""
        floor: Floor | None = None
        """Of log-linear noise: the share of words that is left at t = 1; 0.001 if not given."""
        sigma_min: LeastSigma | None = None
        """Of geometric noise: the total noise at t = 0; 0.0001 if not given."""
        sigma_max: MostSigma | None = None
        """Of geometric noise: the total noise at t = 1; 20 if not given."""

        @model_validator(mode="after")
        def _keys_of_the_noise(self) -> ScoreEntropyDiffusion.Config:
            foreign = ("sigma_min", "sigma_max") if self.noise == "loglinear" else ("floor",)
            given = [name for name in foreign if getattr(self, name) is not None]
            if given:
                raise ValueError(f'noise = "{self.noise}" takes no {" and no ".join(given)}')
            return self

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> MixtureProcess:
        masked = config.graph == "absorb"
        if vocabulary.num_levels != int(masked):
            raise ArgumentError(
                f'The process sedd with graph = "{config.graph}" needs words {"and a mask" if masked else "alone"}; got '
                f'{vocabulary}. Use [vocabulary] kind = "flat" with mask = {str(masked).lower()}.'
            )
        dist = mask_distribution(vocabulary) if masked else token_distribution(vocabulary)
        return MixtureProcess(vocabulary, cls._schedule(config), dist)

    @staticmethod
    def _schedule(config: Config) -> Schedule:
        if config.noise == "loglinear":
            return LinearSchedule(PUBLISHED_FLOOR if config.floor is None else config.floor)
        least, most = PUBLISHED_SIGMA
        return GeometricSchedule(config.sigma_min or least, config.sigma_max or most)

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        def build(mask: bool, **keys: Any) -> ForwardProcess:
            return cls.build(cls.Config(**keys), vocabulary=FlatVocabulary(3, mask=mask))

        return [
            build(True, graph="absorb", noise="loglinear"),
            build(True, graph="absorb", noise="loglinear", floor=0.0),
            build(True, graph="absorb", noise="geometric"),
            build(False, graph="uniform", noise="loglinear"),
            build(False, graph="uniform", noise="loglinear", floor=0.0),
            build(False, graph="uniform", noise="geometric"),
            build(False, graph="uniform", noise="geometric", sigma_min=0.05, sigma_max=3.0),
        ]
