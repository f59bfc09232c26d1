"""Training step of masked diffusion written by hand, without the generality of ddiff."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Case, denoiser_of, fill_zero_parameters, tokens_of
from torch import Tensor

from ddiff import Context

CHUNK = 2**22  # number of logits in memory at once, as in the heads of ddiff


class ChunkedCrossEntropy(torch.autograd.Function):
    """Cross-entropy of a linear layer, with a weight per row and gradients in the same pass.

    The logits are computed in chunks of rows, so that they are never all in memory. The value is
    the sum over rows of weight * (logsumexp of the logits - logit of the target).
    """

    @staticmethod
    def forward(
        ctx: Any, hidden: Tensor, table: Tensor, bias: Tensor, target: Tensor, weight: Tensor
    ) -> Tensor:
        d_hidden, d_table, d_bias = (torch.zeros_like(tensor) for tensor in (hidden, table, bias))
        total = hidden.new_zeros(())
        size = CHUNK // len(table) // 16 * 16 or 1
        for first in range(0, len(hidden), size):
            part = slice(first, first + size)
            # Logits are [tokens, rows]: on a CPU all three products are faster in this layout.
            shares = torch.mm(table, hidden[part].t())
            shares += bias.unsqueeze(-1)
            at, factor = target[part].unsqueeze(0), weight[part]
            peak, own = shares.amax(0), shares.gather(0, at)
            shares = shares.sub_(peak).exp_()
            mass = shares.sum(0)
            total += (factor * (mass.log() + peak - own.squeeze(0))).sum()
            shares.mul_(factor / mass).scatter_add_(0, at, -factor.unsqueeze(0))
            d_bias += shares.sum(1)
            d_hidden[part].addmm_(shares.t(), table)
            d_table.addmm_(shares, hidden[part])
        ctx.save_for_backward(d_hidden, d_table, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * d_total for gradient in ctx.saved_tensors), None, None


def handwritten_step(case: Case) -> Callable[[], float]:
    """Return a function that runs a training step by hand and returns the loss.

    The step draws noise times, masks tokens, evaluates the head only at masks, and runs backward.
    """
    denoiser, x0 = fill_zero_parameters(denoiser_of(case)), tokens_of(case)
    mask = denoiser.head.vocabulary.root
    head, backbone = denoiser.head, denoiser.backbone

    def step() -> float:
        denoiser.zero_grad()
        t = 1e-3 + (1.0 - 1e-3) * (torch.rand(1) + torch.arange(len(x0)) / len(x0)) % 1.0
        t = t.double().unsqueeze(-1).expand(x0.shape)
        masked = torch.rand(x0.shape) < t
        hidden = backbone(torch.where(masked, mask, x0), t, Context())[masked]
        weight = (1.0 / t[masked] / x0.numel()).float()
        loss = ChunkedCrossEntropy.apply(hidden, head.table, head.bias, x0[masked], weight)
        loss.backward()
        return float(loss.detach())

    return step
