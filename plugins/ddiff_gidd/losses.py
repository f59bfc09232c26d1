"""Training loss with the dynamic weights of GIDD (arXiv 2503.04482).

The loss is used for training only. Evaluation reports the NELBO, without these weights.
"""

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

# Largest absolute value of ln(alpha/(1 - alpha)) in the weights, as published.
WIDEST = 20.0


@final
class Dynamic(TrainingLoss[ForwardProcess]):
    """Training loss with the dynamic weights of GIDD, clipped to a range.

    The loss of a position is a weight times a divergence (see `divergence`). The weight depends on
    the noisy state of the position:

        mask                2
        another token       1
        the clean token     b e^(gamma L/2)

    gamma is the exponent of the process, b is its coefficient of the uniform noise
    (`Mixing.per_token`), and L depends on the noise time t. Let alpha(t) be the probability that a
    token is clean at time t. The setting `clean` selects L:

    - "snr": L = -ln(alpha/(1 - alpha)). For gamma = 1 and little uniform noise, the weights are
      then 2 t (1 - t) times those of the NELBO.
    - "sigmoid": L = 1/(1 + e^t), as in the current code of the GIDD authors. The weight at the
      clean token then hardly depends on t.
    """

    class Config(ComponentConfig):
        clean: Literal["snr", "sigmoid"] = "snr"
        """Weight at the clean token: "snr" as in the bound, "sigmoid" as in the published code."""
        smallest: NonNegativeFloat = 0.0
        """Lower limit: smaller weights are raised to this value."""
        largest: PositiveFloat = 2.0
        """Upper limit: larger weights are lowered to this value."""

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
            # log1p keeps precision near alpha = 0; the clamp removes infinities at both ends.
            growth = (torch.log1p(-alpha) - alpha.log()).clamp(-WIDEST, WIDEST)
        else:
            growth = torch.sigmoid(-t)
        at_clean = gidd.mixing.per_token * torch.exp(gidd.mixing.gamma / 2 * growth)
        at_noise = torch.where(zt == process.vocabulary.root, 2.0, 1.0).to(t.dtype)
        return torch.where(zt == x0, at_clean, at_noise).clamp(self.smallest, self.largest)

    def divergence(
        self, process: ForwardProcess, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        """Return KL( q_t(.|x) || q_t-bar ) + rho - 1 - ln rho [r], as in the paper.

        q_t(.|x) is the distribution of z_t given the clean token x, and q_t-bar is its mean over x
        under the predicted distribution. rho is q_t(z_t|x)/q_t-bar(z_t).
        """
        return _require_gidd(process).mismatch(prediction, x0, zt, t)


def _require_gidd(process: ForwardProcess) -> GeneralizedInterpolation:
    if not isinstance(process, GeneralizedInterpolation):
        raise ArgumentError(
            '[objective] loss = "dynamic" needs the process gidd, whose mixing defines the '
            f'weights; got {type(process).__name__}. Use loss = "elbo" or "clip".'
        )
    return process
