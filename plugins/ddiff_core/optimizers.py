"""Optimizers as recipe components."""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field
from torch import nn

from ddiff import (
    ComponentConfig,
    JointOptimizer,
    NonNegativeFloat,
    Optimizer,
    PositiveFloat,
    adamw,
    adamw_8bit,
    muon,
)

Decay = Annotated[float, Field(ge=0.0, lt=1.0)]
"""Decay rate of a moving average, in [0, 1)."""

# Below 1e-30 eps can round to 0 in float32, and the update of a parameter without gradient is 0/0.
Epsilon = Annotated[float, Field(ge=1e-30, le=1.0)]
"""Positive number added to the square root of the second moment, the denominator of AdamW."""


class AdamW:
    """AdamW for every parameter."""

    class Config(ComponentConfig):
        lr: PositiveFloat = 3e-3
        """Peak learning rate."""
        betas: tuple[Decay, Decay] = (0.9, 0.98)
        """Decay rates of the first and second moments."""
        weight_decay: NonNegativeFloat = 0.01
        """Decoupled weight decay."""
        eps: Epsilon = 1e-8
        """Positive number added to the square root of the second moment, the denominator."""
        decay: Literal["matrices", "all"] = "matrices"
        """Parameters with weight decay: the hidden matrices ("matrices") or all parameters."""

    @staticmethod
    def build(config: Config, *, module: nn.Module) -> torch.optim.AdamW:
        return adamw(module, **config.model_dump())


class AdamW8bit:
    """AdamW with 8-bit moments: 2 bytes per parameter instead of 8.

    Needs the package bitsandbytes (`pip install "discrete-diffusion[8bit]"`), and parameters that
    are not sharded.
    """

    Config = AdamW.Config
    moment_bytes = 2.0

    @staticmethod
    def build(config: AdamW.Config, *, module: nn.Module) -> Optimizer:
        return adamw_8bit(module, **config.model_dump())


class Muon:
    """Muon for hidden matrices; AdamW for all other parameters.

    Hidden matrices are the 2-D parameters that are not tables. Tables are embeddings, output layers
    and other parameters with one row per token or channel. AdamW trains tables, norms and biases.
    """

    class Config(ComponentConfig):
        lr: PositiveFloat = 0.02
        """Peak learning rate of Muon, for the hidden matrices."""
        momentum: Decay = 0.95
        """Momentum of Muon."""
        weight_decay: NonNegativeFloat = 0.01
        """Decoupled weight decay of the hidden matrices; AdamW's parameters have none."""
        table_lr: PositiveFloat = 3e-3
        """Peak learning rate of AdamW, for embeddings, output layers, norms and biases."""
        table_betas: tuple[Decay, Decay] = (0.9, 0.98)
        """Decay rates of the first and second moments of AdamW."""
        float32: bool = False
        """On a GPU, orthogonalize in float32 instead of bfloat16, so that results do not depend
        on sharding."""

    @staticmethod
    def build(config: Config, *, module: nn.Module) -> JointOptimizer:
        settings = config.model_dump(exclude={"float32"})
        return muon(module, **settings, precision=torch.float32 if config.float32 else None)
