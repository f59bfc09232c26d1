"""Training losses of the published code of hierarchical diffusion (arXiv 2510.08632).

The reported bound does not use these losses.
"""

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
    """Training loss with fitted weights of the paper: t^2 - t + 3 at masks, 3 - 2t at clusters.

    These weights replace the weights of the bound; the divergence is that of the bound. The tree
    must have two levels above the tokens.
    """

    @classmethod
    def build(cls, config: ComponentConfig, *, process: ForwardProcess) -> Empirical:
        _require_tree(process, "empirical", levels=2)
        return cls()

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return torch.where(zt == process.vocabulary.root, t * t - t + 3.0, 3.0 - 2.0 * t)


@final
class HardTokens(TrainingLoss[ForwardProcess]):
    """Training loss -ln P(token | node) at nodes of every level, with the bound's weight, clipped.

    In the bound, only the child of the node is predicted: at a mask the cluster, not the token.
    """

    class Config(ComponentConfig):
        largest: NonNegativeFloat = 2.0
        """Upper limit: larger weights are lowered to this value."""

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
        # The decoding term of the bound is -ln P(token | node) of a node at any level.
        return process.decode_nll(prediction, x0, zt, t)
