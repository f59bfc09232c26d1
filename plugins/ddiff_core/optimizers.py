"""The engine's optimizers as components of a recipe."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from ddiff import ComponentConfig, JointOptimizer, NonNegativeFloat, PositiveFloat, adamw, muon

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""The share of a moving average that stays, in [0, 1)."""

Epsilon = Annotated[float, Field(ge=1e-30, le=1.0)]
"""What is added to a root before it divides; below 1e-30 it is 0 in float32, and 0/0 is NaN."""


class AdamW:
    """AdamW for every parameter."""

    class Config(ComponentConfig):
        lr: PositiveFloat = 3e-3
        betas: tuple[Decay, Decay] = (0.9, 0.98)
        weight_decay: NonNegativeFloat = 0.01
        eps: Epsilon = 1e-8
        decay: Literal["matrices", "all"] = "matrices"
        """What decays: hidden matrices alone, or tables, norms and biases too."""

    @staticmethod
    def build(config: Config, *, module: nn.Module) -> torch.optim.AdamW:
        return adamw(module, **config.model_dump())


class Muon:
    """Muon for hidden matrices, AdamW for tables, norms and biases."""

    class Config(ComponentConfig):
        lr: PositiveFloat = 0.02
        momentum: Decay = 0.95
        weight_decay: NonNegativeFloat = 0.01
        table_lr: PositiveFloat = 3e-3
        table_betas: tuple[Decay, Decay] = (0.9, 0.98)
        float32: bool = False
        """Orthogonalise in float32 on a GPU too, where bfloat16 is the rule: the same numbers for any layout."""

    @staticmethod
    def build(config: Config, *, module: nn.Module) -> JointOptimizer:
        settings = config.model_dump(exclude={"float32"})
        return muon(module, **settings, precision=torch.float32 if config.float32 else None)
