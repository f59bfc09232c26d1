"""The engine's backends as components of a recipe."""

from __future__ import annotations

from pydantic import field_validator

from ddiff.component import ComponentConfig, PositiveInt
from ddiff.training.backend import SingleBackend


class Single:
    """One process on one device."""

    class Config(ComponentConfig):
        device: str = "auto"
        processes: PositiveInt = 1

        @field_validator("processes")
        @classmethod
        def _one_process(cls, processes: int) -> int:
            if processes != 1:
                raise ValueError(f'backend "single" runs 1 process, not {processes}: leave processes out')
            return processes

    @staticmethod
    def build(config: Config) -> SingleBackend:
        return SingleBackend(config.device)
