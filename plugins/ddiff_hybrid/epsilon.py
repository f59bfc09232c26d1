"""Epsilon-hybrid: some tokens are replaced at t = 0, then all are masked (arXiv 2504.06416).

At t = 0 a token is shuffled with probability epsilon: a uniformly drawn token replaces it. Later it
is masked as in masked diffusion. p = 1 - alpha_t is the probability of a mask at time t, where
alpha_t is the masking schedule.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ddiff import (
    ArgumentError,
    ComponentConfig,
    ComponentProcess,
    CosineSchedule,
    FlatVocabulary,
    ForwardProcess,
    LinearSchedule,
    PowerSchedule,
    Schedule,
    TrainedPart,
    Vocabulary,
    mask_distribution,
    token_distribution,
)

# At 1 every token is replaced and nothing can be learned.
Shuffled = Annotated[float, Field(ge=0.0, lt=1.0)]
# Below 0.3 too many tokens are masked before the earliest evaluated time, t = 1e-12. Above 20
# no token is masked at t = 1/2.
Power = Annotated[float, Field(ge=0.3, le=20.0)]


@final
class EpsilonHybrid(ComponentProcess):
    """Epsilon-hybrid process: tokens are shuffled at t = 0 and only masked afterwards.

    Shuffling replaces a token, with probability epsilon, by a uniformly drawn token:

    q_t(.|x) = (1 - p) [ (1 - epsilon) delta_x + epsilon Unif ] + p delta_mask, where p is the
    probability of a mask at time t, and Unif is the uniform distribution over the tokens.

    Reverse steps reveal the shuffled token. The last sampling step then draws the clean token x
    given the shuffled sequence z. The bound has a separate term -ln P(x | z) for this step, the
    decoding term.
    """

    class Config(ComponentConfig):
        epsilon: Shuffled = 0.01
        """Fraction of tokens that are replaced by a uniform token, possibly the same, in [0, 1)."""
        schedule: Literal["linear", "cosine", "power"] = "linear"
        """Schedule alpha_t, the unmasked fraction of the tokens: 1 - t (linear),
        1 - sin(pi t / 2) (cosine) or 1 - t^power (power)."""
        power: Power | None = None
        """Exponent of the schedule "power", which requires this key; no other schedule has it."""

        @model_validator(mode="after")
        def _check_power(self) -> EpsilonHybrid.Config:
            if (self.power is not None) != (self.schedule == "power"):
                raise ValueError(
                    'power must be given if and only if schedule = "power"; '
                    f'got schedule = "{self.schedule}" and power = {self.power}'
                )
            return self

    def __init__(self, vocabulary: Vocabulary, schedule: Schedule, epsilon: float) -> None:
        require_tokens_and_mask(vocabulary, "hybrid_epsilon")
        if not 0.0 <= epsilon < 1.0:
            raise ArgumentError(
                "EpsilonHybrid: epsilon, the fraction of tokens that are replaced by uniform "
                f"tokens, must be in [0, 1); got {epsilon}."
            )
        self.schedule = schedule
        self.epsilon = epsilon
        super().__init__(
            vocabulary, [token_distribution(vocabulary), mask_distribution(vocabulary)]
        )

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> EpsilonHybrid:
        schedules: dict[str, Schedule] = {"linear": LinearSchedule(), "cosine": CosineSchedule()}
        if config.power is not None:
            schedules["power"] = PowerSchedule(config.power)
        return cls(vocabulary, schedules[config.schedule], config.epsilon)

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - self.epsilon) * self.schedule.alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return (1.0 - self.epsilon) * self.schedule.d_alpha(t)

    def coefficients(self, t: Tensor) -> Tensor:
        return torch.stack(
            [self.epsilon * self.schedule.alpha(t), self.schedule.one_minus_alpha(t)], -1
        )

    def d_coefficients(self, t: Tensor) -> Tensor:
        d_alpha = self.schedule.d_alpha(t)
        return torch.stack([self.epsilon * d_alpha, -d_alpha], -1)

    def trained_part(self, zt: Tensor) -> Tensor:
        """Return for each row which part of the prediction the bound trains (`TrainedPart`).

        The part is ALL at masks, and at tokens if epsilon > 0; otherwise it is NONE. At tokens only
        the decoding term of the bound, -ln P(x | z) at t = 0, trains the prediction.
        """
        at_token = TrainedPart.ALL if self.epsilon > 0.0 else TrainedPart.NONE
        return torch.where(zt == self.vocabulary.root, int(TrainedPart.ALL), int(at_token))

    formulas: ClassVar[str] = """
        marginal        q_t(.|x) = (1 - p) [ (1 - e) delta_x + e Unif ] + p delta_mask
        rate            token -> mask at p'/(1 - p)
        integrand       (p'/p) KL( (1 - e) delta_x + e Unif || (1 - e) p_theta + e Unif )  at masks;
                        0 at tokens
        decoding term   -ln [ p_theta(x) q(z|x) / q-bar(z) ] = -ln P(x | z)  at t = 0
        step            a mask stays a mask with probability p_s/p_t, and else becomes a draw from
                        (1 - e) p_theta + e Unif; tokens do not change
        final step      a token z is kept with probability
                        (1 - e) p_theta(z) / ( (1 - e) p_theta(z) + e/V ),
                        and else replaced by a draw from p_theta

        x, z            clean token, and state of its position at time t
        e, V            epsilon, and the number of tokens
        p               probability of a mask at time t; p' is its derivative
        p_theta         predicted distribution of x, given the other positions
        Unif            uniform distribution over the tokens
        q(z|x), q-bar(z)   probability of z at t = 0, given x or if x is drawn from p_theta
        """

    example_settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {"epsilon": 0.0},
        {"epsilon": 0.01},
        {"epsilon": 0.3},
        {"epsilon": 0.3, "schedule": "cosine"},
        {"epsilon": 0.01, "schedule": "power", "power": 2.5},
    )

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        return [
            cls.build(cls.Config.model_validate(keys), vocabulary=FlatVocabulary(4))
            for keys in cls.example_settings
        ]


def require_tokens_and_mask(vocabulary: Vocabulary, process: str) -> None:
    if vocabulary.num_levels != 1:
        raise ArgumentError(
            f'The process "{process}" needs a vocabulary of tokens and a mask, without clusters; '
            f'got {vocabulary}. Use [vocabulary] kind = "flat".'
        )
