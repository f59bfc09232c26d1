"""The epsilon-hybrid: some words are shuffled at once, then all are masked one by one (arXiv 2504.06416)."""

from __future__ import annotations

from typing import Annotated, Literal, final

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
    Informed,
    LinearSchedule,
    PowerSchedule,
    Schedule,
    Vocabulary,
    mask_distribution,
    token_distribution,
)

# Of everything shuffled nothing could be learnt.
Shuffled = Annotated[float, Field(ge=0.0, lt=1.0)]
# Outside, words are masked before the earliest time that is read, or none at the middle of time.
Power = Annotated[float, Field(ge=0.3, le=20.0)]


@final
class EpsilonHybrid(ComponentProcess):
    """q_t(.|x) = (1 - p) [ (1 - epsilon) delta_x + epsilon Unif ] + p delta_mask, p = 1 - alpha_t of the schedule.

    As a chain: shuffled at t = 0, from then on only masked. The density is that of masked diffusion, about the shuffled
    word; the shuffling is undone by the last draw alone, whose term -ln P(x | z) belongs to the bound.
    """

    class Config(ComponentConfig):
        epsilon: Shuffled = 0.01
        """Share of the words that are replaced by one drawn evenly (by itself, too); in [0, 1)."""
        schedule: Literal["linear", "cosine", "power"] = "linear"
        """Share without a mask: 1 - t; 1 - sin(pi t / 2); 1 - t^power."""
        power: Power | None = None
        """Of the power schedule, which needs it."""

        @model_validator(mode="after")
        def _power_of_its_schedule(self) -> EpsilonHybrid.Config:
            if (self.power is not None) != (self.schedule == "power"):
                raise ValueError(
                    f'power and schedule = "power" need each other; got schedule = "{self.schedule}", power = {self.power}'
                )
            return self

    def __init__(self, vocabulary: Vocabulary, schedule: Schedule, epsilon: float) -> None:
        require_words_and_mask(vocabulary, "hybrid_epsilon")
        if not 0.0 <= epsilon < 1.0:
            raise ArgumentError(
                f"EpsilonHybrid: epsilon must be in [0, 1), the share that is shuffled; got {epsilon}."
            )
        self.schedule, self.epsilon = schedule, epsilon
        super().__init__(
            vocabulary, [token_distribution(vocabulary), mask_distribution(vocabulary)]
        )

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> EpsilonHybrid:
        schedules: dict[str, Schedule] = {"linear": LinearSchedule(), "cosine": CosineSchedule()}
        schedule = (
            schedules[config.schedule] if config.power is None else PowerSchedule(config.power)
        )
        return cls(vocabulary, schedule, config.epsilon)

    def alpha(self, t: Tensor) -> Tensor:
        return (1.0 - self.epsilon) * self.schedule.alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return (1.0 - self.epsilon) * self.schedule.d_alpha(t)

    def coefficients(self, t: Tensor) -> Tensor:
        return torch.stack([self.epsilon * self.schedule.alpha(t), self.schedule.noised(t)], -1)

    def d_coefficients(self, t: Tensor) -> Tensor:
        fading = self.schedule.d_alpha(t)
        return torch.stack([self.epsilon * fading, -fading], -1)

    def informed(self, zt: Tensor) -> Tensor:
        """At words the bound reads the law for the last draw, if anything was shuffled."""
        words = Informed.ALL if self.epsilon > 0.0 else Informed.NONE
        return torch.where(zt == self.vocabulary.root, int(Informed.ALL), int(words))

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        settings: tuple[dict[str, object], ...] = (
            {"epsilon": 0.0},
            {"epsilon": 0.01},
            {"epsilon": 0.3},
            {"epsilon": 0.3, "schedule": "cosine"},
            {"epsilon": 0.01, "schedule": "power", "power": 2.5},
        )
        return [
            cls.build(cls.Config.model_validate(keys), vocabulary=FlatVocabulary(4))
            for keys in settings
        ]


def require_words_and_mask(vocabulary: Vocabulary, process: str) -> None:
    if vocabulary.num_levels != 1:
        raise ArgumentError(
            f"The process {process} needs words and a mask, nothing between; got {vocabulary}. "
            'Use [vocabulary] kind = "flat".'
        )
