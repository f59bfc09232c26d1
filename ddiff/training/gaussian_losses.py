"""Training losses of vector fields. They weight |x - x_hat|^2 by functions of time.

The bound of a Gaussian process has the weight -1/2 SNR'(t), which is dominated by small noise. The
losses of this module have other weights. They train only: no reported bound contains their weights.
"""

from __future__ import annotations

import math
from typing import final

from torch import Tensor

from ddiff.core.gaussian import GaussianProcess, Output
from ddiff.errors import ArgumentError
from ddiff.training.losses import TrainingLoss


@final
class OutputMse(TrainingLoss[GaussianProcess]):
    """Squared error of a network output, |o - o_hat|^2, with weight 1 per unit of time.

    For "eps" this is the simple loss of arXiv 2006.11239, for "u" the flow-matching loss of arXiv
    2210.02747. The loss of "x0", "v", "eps" or "u" can be used for any output of the head.
    """

    def __init__(self, output: Output = "v") -> None:
        self.output = output
        self.name = f"{output}_mse"

    def weight(self, process: GaussianProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        # x_hat = A z + B o_hat, so |x - x_hat|^2 = B^2 |o - o_hat|^2.
        _, output_factor = process.output_factors(self.output, t).unbind(-1)
        return output_factor**-2


@final
class MinSnr(TrainingLoss[GaussianProcess]):
    """Squared error of the clean vector with weight min(SNR, gamma) (arXiv 2303.09556)."""

    def __init__(self, gamma: float = 5.0) -> None:
        if not gamma > 0 or not math.isfinite(gamma):
            raise ArgumentError(f"MinSnr: gamma must be a positive number; got {gamma}.")
        self.gamma = gamma
        self.name = "min_snr"

    def weight(self, process: GaussianProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return process.snr(t).clamp(max=self.gamma)


@final
class SigmoidWeighted(TrainingLoss[GaussianProcess]):
    """Integrand of the bound times sigmoid(bias - log SNR) (arXiv 2303.00848, 2410.19324).

    The factor reduces the weight of small noise, where log SNR is above `bias`.
    """

    def __init__(self, bias: float = 0.0) -> None:
        if not math.isfinite(bias):
            raise ArgumentError(f"SigmoidWeighted: bias must be finite; got {bias}.")
        self.bias = bias
        self.name = "sigmoid"

    def weight(self, process: GaussianProcess, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        # sigmoid(bias - log SNR) = e^bias / (e^bias + SNR), finite at SNR = 0.
        scale = math.exp(self.bias)
        return process.weight(x0, zt, t) * (scale / (scale + process.snr(t)))
