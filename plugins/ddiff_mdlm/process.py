"""Masked diffusion (arXiv 2406.07524): a tree process with one level, the mask, above the tokens.

alpha_t = q_t(x | x) is the probability that a token is still unmasked at time t.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, final

from pydantic import Field, model_validator

from ddiff import (
    ArgumentError,
    CdfClock,
    ComponentConfig,
    CosineSchedule,
    FlatVocabulary,
    ForwardProcess,
    LinearSchedule,
    PowerSchedule,
    Schedule,
    TreeProcess,
    Vocabulary,
)

# Below 0.3 too many tokens are masked before the earliest evaluated time, t = 1e-12. Above 10
# hardly any token is masked at t = 1/2.
Power = Annotated[float, Field(ge=0.3, le=10.0)]


@final
class MaskedDiffusion(TreeProcess):
    """Masked diffusion process, q_t(.|x) = alpha_t delta_x + (1 - alpha_t) delta_mask.

    alpha_t, the masking schedule, is the probability that a token is still clean at time t. The
    NELBO is an integral over t. Its integrand is (-alpha'/(1 - alpha)) (-ln p(x)) at a mask and 0
    at a token, where alpha' is the derivative of alpha_t, and p is the predicted distribution of
    the clean token x.
    """

    class Config(ComponentConfig):
        schedule: Literal["linear", "cosine", "power"] = "linear"
        """Schedule alpha_t, the unmasked fraction of the tokens: 1 - t (linear),
        1 - sin(pi t / 2) (cosine) or 1 - t^power (power)."""
        power: Power | None = None
        """Exponent of the schedule "power", which requires this key; no other schedule has it."""

        @model_validator(mode="after")
        def _check_power(self) -> MaskedDiffusion.Config:
            if (self.power is not None) != (self.schedule == "power"):
                raise ValueError(
                    'power must be given if and only if schedule = "power"; '
                    f'got schedule = "{self.schedule}" and power = {self.power}'
                )
            return self

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> MaskedDiffusion:
        if vocabulary.num_levels != 1:
            raise ArgumentError(
                'The process "mdlm" needs a vocabulary of tokens and a mask, without clusters; '
                f"got {vocabulary}. "
                'Use [vocabulary] kind = "flat", or [process] kind = "hdlm".'
            )
        schedules: dict[str, Schedule] = {"linear": LinearSchedule(), "cosine": CosineSchedule()}
        if config.power is not None:
            schedules["power"] = PowerSchedule(config.power)
        return cls(vocabulary, CdfClock([schedules[config.schedule]]))

    formulas: ClassVar[str] = """
        marginal    q_t(.|x) = alpha_t delta_x + (1 - alpha_t) delta_mask
        rate        token -> mask at -alpha'/alpha
        integrand   (-alpha'/(1 - alpha)) * ( -ln p(x) )  at masks; 0 at tokens
        step        from t to s < t: a mask stays a mask with probability
                    (1 - alpha_s)/(1 - alpha_t), and else becomes a draw from p; tokens do not
                    change

        x           clean token
        alpha_t     probability that the token is still unmasked at time t; alpha' is its derivative
        p           predicted distribution of x
        """

    example_settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {"schedule": "linear"},
        {"schedule": "cosine"},
        {"schedule": "power", "power": 2.5},
    )

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        return [
            cls.build(cls.Config(**keys), vocabulary=FlatVocabulary(5))
            for keys in cls.example_settings
        ]
