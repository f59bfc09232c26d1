"""Training losses of the published code (arXiv 2510.08632). The reported bound never uses them."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    ComponentConfig,
    ForwardProcess,
    NonNegativeFloat,
    Prediction,
    TrainingLoss,
    TreeProcess,
)


def _require_tree(process: ForwardProcess, name: str, levels: int | None = None) -> None:
    is_tree = isinstance(process, TreeProcess)
    if is_tree and levels in (None, process.vocabulary.num_levels):
        return
    shape = f" of {levels} levels above the tokens" if levels else ""
    raise ArgumentError(
        f'[objective] loss = "{name}" needs a tree process{shape}; got {type(process).__name__} '
        f'on {process.vocabulary}. Use loss = "elbo" or "clip".'
    )


@final
class Empirical(TrainingLoss[ForwardProcess]):
    """Fitted weights of the paper: t^2 - t + 3 at masks, 3 - 2t at clusters.

    They replace the weight of the bound; the divergence is that of the bound.
    """

    @classmethod
    def build(cls, config: ComponentConfig, *, process: ForwardProcess) -> Empirical:
        _require_tree(process, "empirical", levels=2)
        return cls()

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return torch.where(zt == process.vocabulary.root, t * t - t + 3.0, 3.0 - 2.0 * t)


@final
class HardTokens(TrainingLoss[ForwardProcess]):
    """Hard tokens: the clipped weight of the bound times -ln P(token | node), at every level."""

    class Config(ComponentConfig):
        largest: NonNegativeFloat = 2.0
        """Larger weights are lowered to this."""

    def __init__(self, largest: float) -> None:
        self.largest = largest

    @classmethod
    def build(cls, config: Config, *, process: ForwardProcess) -> HardTokens:
        _require_tree(process, "hard")
        return cls(config.largest)

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return process.weight(x0, zt, t).clamp(max=self.largest)

    def divergence(
        self, process: ForwardProcess, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        return process.decode_nll(prediction, x0, zt, t)
