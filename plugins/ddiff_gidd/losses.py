"""The training weights of the paper (arXiv 2503.04482). The bound never sees them."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    ComponentConfig,
    ForwardProcess,
    NonNegativeFloat,
    PositiveFloat,
    Prediction,
)
from ddiff_gidd.process import GeneralizedInterpolation

WIDEST = 20.0  # of ln(alpha/(1 - alpha)), as published


@final
class Dynamic:
    """2 at masks, 1 at other words, b e^(gamma L/2) at the clean word, held in a range; times the bound's mismatch.

    L = -ln(alpha/(1 - alpha)) ("snr") makes that 2 t (1 - t) times the weight of the bound, for few wrong words; the code
    as it is reads L = 1/(1 + e^t) ("sigmoid"), with which the last of the three hardly depends on t.
    """

    class Config(ComponentConfig):
        clean: Literal["snr", "sigmoid"] = "snr"
        """L, the reading of the weight at the clean word."""
        smallest: NonNegativeFloat = 0.0
        """Weights below this are raised."""
        largest: PositiveFloat = 2.0
        """Weights above this are cut."""

    def __init__(
        self, clean: Literal["snr", "sigmoid"] = "snr", smallest: float = 0.0, largest: float = 2.0
    ) -> None:
        if not 0.0 <= smallest <= largest:
            raise ArgumentError(
                f"Dynamic: 0 <= smallest <= largest must hold; got smallest = {smallest}, largest = {largest}."
            )
        self.clean, self.smallest, self.largest = clean, smallest, largest

    @classmethod
    def build(cls, config: Config, *, process: ForwardProcess) -> Dynamic:
        _mixing(process)
        return cls(config.clean, config.smallest, config.largest)

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        mixing, alpha = _mixing(process).mixing, _mixing(process).alpha(t)
        if self.clean == "snr":
            lightness = (torch.log1p(-alpha) - alpha.log()).clamp(-WIDEST, WIDEST)
        else:
            lightness = torch.sigmoid(-t)
        own = mixing.per_word * torch.exp(mixing.gamma / 2 * lightness)
        elsewhere = torch.where(zt == process.vocabulary.root, 2.0, 1.0).to(t.dtype)
        return torch.where(zt == x0, own, elsewhere).clamp(self.smallest, self.largest)

    def divergence(
        self, process: ForwardProcess, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        """KL( q_t(.|x) || q_t-bar ) + rho - 1 - ln rho, the published split of the bound."""
        return _mixing(process).mismatch(prediction, x0, zt, t)


def _mixing(process: ForwardProcess) -> GeneralizedInterpolation:
    if not isinstance(process, GeneralizedInterpolation):
        raise ArgumentError(
            f'[objective] loss = "dynamic" reads the mixing of the process gidd; got {type(process).__name__}. '
            'Use loss = "elbo" or "clip".'
        )
    return process
