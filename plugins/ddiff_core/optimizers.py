"""The engine's optimizers as components of a recipe."""

from __future__ import annotations

from typing import Literal

import torch
from torch import nn

from ddiff import ComponentConfig, JointOptimizer, NonNegativeFloat, PositiveFloat, adamw, muon


class AdamW:
    """AdamW for every parameter."""

    class Config(ComponentConfig):
        lr: PositiveFloat = 3e-3
        betas: tuple[float, float] = (0.9, 0.98)
        weight_decay: NonNegativeFloat = 0.01
        eps: PositiveFloat = 1e-8
        decay: Literal["matrices", "all"] = "matrices"
        """What decays: hidden matrices alone, or tables, norms and biases too."""

    @staticmethod
    def build(config: Config, *, module: nn.Module) -> torch.optim.AdamW:
        return adamw(module, **config.model_dump())


class Muon:
    """Muon for hidden matrices, AdamW for tables, norms and biases."""

    class Config(ComponentConfig):
        lr: PositiveFloat = 0.02
        momentum: NonNegativeFloat = 0.95
        weight_decay: NonNegativeFloat = 0.01
        table_lr: PositiveFloat = 3e-3
        table_betas: tuple[float, float] = (0.9, 0.98)
        float32: bool = False
        """Orthogonalise in float32 on a GPU too, where bfloat16 is the rule: the same numbers for any layout."""

    @staticmethod
    def build(config: Config, *, module: nn.Module) -> JointOptimizer:
        settings = config.model_dump(exclude={"float32"})
        return muon(module, **settings, precision=torch.float32 if config.float32 else None)
