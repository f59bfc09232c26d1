"""Networks for samplers and evaluation whose results have gradients."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from ddiff.core.network import CountingNetwork
from ddiff.core.prediction import Prediction
from ddiff.core.times import Noisy
from ddiff.nn.denoiser import UNPADDED, Context, Denoiser
from ddiff.nn.parameterization import HeadCallback

if TYPE_CHECKING:
    from ddiff.core.process import ForwardProcess, RowFunction


class DifferentiableNetwork(CountingNetwork):
    """Network function whose results per row have gradients with respect to the denoiser.

    The forward pass stores no activations: the backward pass runs the denoiser again at the same
    rows, with the same random numbers of torch (dropout). A forward and a backward pass therefore
    cost four thirds of those of training, and memory does not grow with the number of calls.

    Args:
        process: converts the output of the head to the prediction that the formulas use.
        context: padding, documents and conditions of the sequences.
    """

    def __init__(
        self, denoiser: Denoiser, process: ForwardProcess, context: Context = UNPADDED
    ) -> None:
        super().__init__()
        self.denoiser = denoiser
        self.process = process
        self.context = context
        self.predicts = denoiser.parameterization.predicts

    def __call__(self, noisy: Noisy) -> _Query:
        return _Query(self, noisy)


class _Query:
    """Query of one noisy batch; see `DifferentiableNetwork`."""

    def __init__(self, network: DifferentiableNetwork, noisy: Noisy) -> None:
        self.network = network
        self.noisy = noisy

    def __call__(self, rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
        def on_chunk(prediction: Prediction, idx: Tensor) -> Any:
            return fn(prediction, *(value[idx] for value in per_row))

        network = self.network
        parameterization = network.denoiser.parameterization
        zt = self.noisy.zt.flatten()[rows]
        t = self.noisy.t.flatten()[rows]
        prepared = parameterization.prepare(network.process, zt, t)
        callback = parameterization.wrap_callback(on_chunk, network.process, zt, t, prepared)
        node = parameterization.scope(node, network.process)
        sequences = (rows // self.noisy.zt.shape[1]).unique()
        network.count.add(len(self.noisy.zt), sequences.cpu())
        trained = [each for each in network.denoiser.parameters() if each.requires_grad]
        parts = (network.denoiser, self.noisy, network.context, rows, node, callback)
        return _RowValues.apply(*parts, *trained)


class _RowValues(torch.autograd.Function):
    """Function of the predictions at some rows, which recomputes the predictions in backward."""

    @staticmethod
    def forward(
        ctx: Any,
        denoiser: Denoiser,
        noisy: Noisy,
        context: Context,
        rows: Tensor,
        node: Tensor,
        fn: HeadCallback,
        *trained: Tensor,
    ) -> Tensor:
        ctx.parts = (denoiser, noisy, context, rows, node)
        ctx.fn = fn
        ctx.trained = trained
        ctx.random_state = _get_random_state(noisy.zt.device)
        result = denoiser.query(noisy, context, rows, node, fn)
        assert isinstance(result, Tensor)
        return result

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_values: Tensor) -> tuple[Tensor | None, ...]:
        denoiser, *inputs = ctx.parts
        fn = ctx.fn
        # Rows without a gradient would still cost a row of logits.
        needed = d_values.nonzero().squeeze(-1)
        noisy, context, rows, node = inputs

        def weighted(prediction: Any, idx: Tensor) -> tuple[Tensor]:
            return (d_values[needed][idx] * fn(prediction, needed[idx]),)

        device = noisy.zt.device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices), torch.enable_grad():
            _set_random_state(device, ctx.random_state)
            total, *_ = denoiser(noisy, context, rows[needed], node[needed], weighted)
            gradients = torch.autograd.grad(total, ctx.trained, allow_unused=True)
        return *([None] * 6), *gradients


def _get_random_state(device: torch.device) -> tuple[Tensor, Tensor | None]:
    on_device = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return torch.get_rng_state(), on_device


def _set_random_state(device: torch.device, state: tuple[Tensor, Tensor | None]) -> None:
    torch.set_rng_state(state[0])
    if state[1] is not None:
        torch.cuda.set_rng_state(state[1], device)


def as_differentiable_network(
    denoiser: Denoiser, process: ForwardProcess, context: Context = UNPADDED
) -> DifferentiableNetwork:
    """Wrap a denoiser as a network whose results have gradients: network(noisy) -> query.

    `DifferentiableNetwork` explains the arguments.
    """
    return DifferentiableNetwork(denoiser, process, context)
