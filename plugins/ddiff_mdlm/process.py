"""Words are masked one by one: the tree of one level (arXiv 2406.07524)."""

from __future__ import annotations

from typing import Annotated, Literal, final

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

# Outside, words are masked before the earliest time that is read, or none at the middle of time.
Power = Annotated[float, Field(ge=0.3, le=10.0)]


@final
class MaskedDiffusion(TreeProcess):
    """q_t(.|x) = alpha_t delta_x + (1 - alpha_t) delta_mask; density (-alpha'/(1 - alpha)) (-ln p(x)) at masks."""

    class Config(ComponentConfig):
        schedule: Literal["linear", "cosine", "power"] = "linear"
        """alpha = 1 - t; 1 - sin(pi t / 2); 1 - t^power."""
        power: Power | None = None
        """Of the power schedule, which needs it."""

        @model_validator(mode="after")
        def _power_of_its_schedule(self) -> MaskedDiffusion.Config:
            if (self.power is not None) != (self.schedule == "power"):
                raise ValueError(
                    f'power and schedule = "power" need each other; got schedule = "{self.schedule}", power = {self.power}'
                )
            return self

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> MaskedDiffusion:
        if vocabulary.num_levels != 1:
            raise ArgumentError(
                f"The process mdlm needs words and a mask, nothing between; got {vocabulary}. "
                'Use [vocabulary] kind = "flat", or the process hdlm for a tree.'
            )
        schedules: dict[str, Schedule] = {"linear": LinearSchedule(), "cosine": CosineSchedule()}
        schedule = (
            schedules[config.schedule] if config.power is None else PowerSchedule(config.power)
        )
        return cls(vocabulary, CdfClock([schedule]))

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        settings = (
            {"schedule": "linear"},
            {"schedule": "cosine"},
            {"schedule": "power", "power": 2.5},
        )
        return [cls.build(cls.Config(**keys), vocabulary=FlatVocabulary(5)) for keys in settings]
