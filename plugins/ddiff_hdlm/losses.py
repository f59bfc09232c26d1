"""Training losses of the paper's code (arXiv 2510.08632). The bound never sees them."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    CleanDistribution,
    ComponentConfig,
    ForwardProcess,
    NonNegativeFloat,
    TreeProcess,
)


def _tree(process: ForwardProcess, name: str, max_levels: int | None = None) -> TreeProcess:
    if not isinstance(process, TreeProcess) or (
        max_levels and process.vocabulary.num_levels != max_levels
    ):
        shape = f" of {max_levels} levels above the words" if max_levels else ""
        raise ArgumentError(
            f'[objective] loss = "{name}" needs a tree process{shape}; got {type(process).__name__} on '
            f'{process.vocabulary}. Use loss = "elbo" or "clip".'
        )
    return process


@final
class Empirical:
    """Fitted weights instead of the bound's: t^2 - t + 3 at masks and 3 - 2t at clusters, times the same divergence."""

    @classmethod
    def build(cls, config: ComponentConfig, *, process: ForwardProcess) -> Empirical:
        _tree(process, "empirical", max_levels=2)
        return cls()

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return torch.where(zt == process.vocabulary.root, t * t - t + 3.0, 3.0 - 2.0 * t)

    def divergence(
        self, process: ForwardProcess, dist: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        return process.divergence(dist, x0, zt, t)


@final
class HardTokens:
    """The bound's weight, clipped, times the surprise of the word itself, -ln P(x | node), at every level."""

    class Config(ComponentConfig):
        largest: NonNegativeFloat = 2.0
        """Weights above this are cut."""

    def __init__(self, largest: float) -> None:
        self.largest = largest

    @classmethod
    def build(cls, config: Config, *, process: ForwardProcess) -> HardTokens:
        _tree(process, "hard")
        return cls(config.largest)

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return process.weight(x0, zt, t).clamp(max=self.largest)

    def divergence(
        self, process: ForwardProcess, dist: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        return process.decode_nll(dist, x0, zt, t)
