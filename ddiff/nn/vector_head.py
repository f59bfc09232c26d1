"""Head for fields of vectors, and the conversion of its output to a predicted mean."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from ddiff.core.gaussian import GaussianProcess, Output, PredictedMean
from ddiff.core.network import Predicts
from ddiff.errors import NonFiniteError

VectorCallback = Callable[[Any, Tensor], Tensor | tuple[Tensor, ...]]
"""fn(prediction, idx [k]) -> [k] or a tuple of [k,...]."""


@final
class MeanParameterization:
    """Conversion of a network's output (eps, x0, v or u) to the mean of the clean vector.

    x_hat = A z_t + B output, where A and B depend on the time only. `prepare` computes A and B, in
    training on the host.
    """

    predicts: Predicts = "mean"

    def __init__(self, output: Output) -> None:
        self.output = output

    def prepare(self, process: GaussianProcess, zt: Tensor, t: Tensor) -> Tensor:
        """Return the factors A and B [k,2] of the rows at times t [k]."""
        return process.output_factors(self.output, t)

    def wrap_callback(
        self,
        fn: VectorCallback,
        process: GaussianProcess,
        zt: Tensor,
        t: Tensor,
        prepared: Tensor,
    ) -> VectorCallback:
        """Return the callback for the head, which calls fn(PredictedMean, idx)."""

        def on_output(output: Tensor, idx: Tensor) -> Tensor | tuple[Tensor, ...]:
            state_factor, output_factor = prepared[idx].unbind(-1)
            mean = state_factor.unsqueeze(-1) * zt[idx]
            # float64: at high SNR the factor of the output is small, and x - x_hat would lose its
            # digits in float32.
            mean = mean + output_factor.unsqueeze(-1) * output.double()
            return fn(PredictedMean(mean), idx)

        return on_output

    def scope(self, node: Tensor, process: GaussianProcess) -> Tensor:
        """Return the query nodes unchanged: vectors have no tree."""
        return node


class VectorHead(nn.Module):
    """Linear head: hidden states [k,width] -> outputs [k,dim], zero before training.

    Args:
        dim: numbers per vector.
        width: channels of the hidden states.
        output: kind of the output; see `GaussianProcess.to_clean`.
    """

    is_table = True  # Muon, an optimizer for hidden matrices, must not update these parameters

    def __init__(self, dim: int, width: int, output: Output = "v") -> None:
        super().__init__()
        self.dim = dim
        self.width = width
        self.parameterization = MeanParameterization(output)
        self.linear = nn.Linear(width, dim)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def total(self, hidden: Tensor, node: Tensor, fn: VectorCallback) -> tuple[Tensor, ...]:
        """Return the sum of the first result of `fn` over all rows, and all results, detached.

        The sum has gradients for `hidden` [k,width] and the parameters. `node` is not used.
        """
        first, *others = self._results(hidden, fn)
        return first.sum(), first.detach(), *(result.detach() for result in others)

    @torch.no_grad()
    def query(
        self, hidden: Tensor, node: Tensor, fn: VectorCallback
    ) -> Tensor | tuple[Tensor, ...]:
        """Return the results of `fn`, without gradients.

        Raises NonFiniteError if an output is NaN or infinite.
        """

        def on_output(output: Tensor, idx: Tensor) -> Tensor | tuple[Tensor, ...]:
            if not bool(output.isfinite().all()):
                raise NonFiniteError(
                    "VectorHead.query: the output of the network contains NaN or infinity. Its "
                    "weights or inputs are not finite: resume from an earlier checkpoint, or train "
                    "with a smaller learning rate."
                )
            return fn(output, idx)

        results = self._results(hidden, on_output)
        return results[0] if len(results) == 1 else results

    def _results(self, hidden: Tensor, fn: VectorCallback) -> tuple[Tensor, ...]:
        idx = torch.arange(len(hidden), device=hidden.device)
        output = self.linear(hidden)
        # Predictions are at least float32, also if the product has a smaller dtype.
        results = fn(output.to(torch.promote_types(output.dtype, torch.float32)), idx)
        return results if isinstance(results, tuple) else (results,)
