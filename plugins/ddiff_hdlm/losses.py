"""Training losses of the published code of hierarchical diffusion (arXiv 2510.08632).

They are used for training only. Evaluation reports the NELBO.
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
    # A process of vectors has no vocabulary.
    states = f" on {process.vocabulary}" if isinstance(process, ForwardProcess) else ""
    raise ArgumentError(
        f'[objective] loss = "{name}" needs a tree process{shape}; got {type(process).__name__}'
        f'{states}. Use loss = "elbo" or "clip".'
    )


@final
class Empirical(TrainingLoss[ForwardProcess]):
    """Training loss with the empirical weights of the paper.

    The weight is t^2 - t + 3 at a mask and 3 - 2t at a cluster, in place of the weights of the
    NELBO. The tree must have two levels above the tokens: clusters and the mask.
    """

    @classmethod
    def build(cls, config: ComponentConfig, *, process: ForwardProcess) -> Empirical:
        _require_tree(process, "empirical", levels=2)
        return cls()

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return torch.where(zt == process.vocabulary.root, t * t - t + 3.0, 3.0 - 2.0 * t)


@final
class HardTokens(TrainingLoss[ForwardProcess]):
    """Training loss that predicts the token, not only the next lower level of the tree.

    The loss of a position is -ln P(token | node), where the node is its noisy state, times the
    weight of the NELBO clipped to at most `largest`. The NELBO itself would score the child of the
    node: the cluster at a mask, and the token at a cluster.
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
