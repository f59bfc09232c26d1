"""Training weights of the paper (arXiv 2503.04482). The reported bound never uses them."""

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
    TrainingLoss,
)
from ddiff_gidd.process import GeneralizedInterpolation

WIDEST = 20.0  # range of ln(alpha/(1 - alpha)), as published


@final
class Dynamic(TrainingLoss[ForwardProcess]):
    """Dynamic weights: 2 at masks, 1 at wrong tokens, b e^(gamma L/2) at the clean token, clipped.

    They multiply the mismatch of the bound. With L = -ln(alpha/(1 - alpha)) ("snr") the three
    weights are 2 t (1 - t) times those of the bound at gamma = 1 and few wrong tokens. The
    published code as it is has L = 1/(1 + e^t) ("sigmoid"), and the weight at the clean token
    hardly depends on t. b is `Mixing.per_token`.
    """

    class Config(ComponentConfig):
        clean: Literal["snr", "sigmoid"] = "snr"
        """L at the clean token: "snr" follows the bound, "sigmoid" the published code."""
        smallest: NonNegativeFloat = 0.0
        """Smaller weights are raised to this."""
        largest: PositiveFloat = 2.0
        """Larger weights are lowered to this."""

    def __init__(
        self, clean: Literal["snr", "sigmoid"] = "snr", smallest: float = 0.0, largest: float = 2.0
    ) -> None:
        if not 0.0 <= smallest <= largest:
            raise ArgumentError(
                "Dynamic: 0 <= smallest <= largest must hold; "
                f"got smallest = {smallest}, largest = {largest}."
            )
        self.clean = clean
        self.smallest = smallest
        self.largest = largest

    @classmethod
    def build(cls, config: Config, *, process: ForwardProcess) -> Dynamic:
        _require_gidd(process)
        return cls(config.clean, config.smallest, config.largest)

    def weight(self, process: ForwardProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        gidd = _require_gidd(process)
        if self.clean == "snr":
            alpha = gidd.alpha(t)
            growth = (torch.log1p(-alpha) - alpha.log()).clamp(-WIDEST, WIDEST)
        else:
            growth = torch.sigmoid(-t)
        at_clean = gidd.mixing.per_token * torch.exp(gidd.mixing.gamma / 2 * growth)
        at_noise = torch.where(zt == process.vocabulary.root, 2.0, 1.0).to(t.dtype)
        return torch.where(zt == x0, at_clean, at_noise).clamp(self.smallest, self.largest)

    def divergence(
        self, process: ForwardProcess, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        """KL( q_t(.|x) || q_t-bar ) + rho - 1 - ln rho, as published.

        q_t-bar is the marginal under the predicted distribution, rho = q_t(z|x)/q_t-bar(z).
        """
        return _require_gidd(process).mismatch(prediction, x0, zt, t)


def _require_gidd(process: ForwardProcess) -> GeneralizedInterpolation:
    if not isinstance(process, GeneralizedInterpolation):
        raise ArgumentError(
            '[objective] loss = "dynamic" needs the process gidd, whose mixing defines it; '
            f'got {type(process).__name__}. Use loss = "elbo" or "clip".'
        )
    return process
