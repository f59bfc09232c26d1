"""Masked diffusion by hand: what somebody would write who wants this one process to be fast and nothing else."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from models import Case, awake, denoiser_of, words_of
from torch import Tensor

from ddiff import Context

CHUNK = 2**21  # logits held at once, as in our heads


class ChunkedCrossEntropy(torch.autograd.Function):
    """Sum over rows of weight * (lse - logit of the target), gradients formed beside it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, table: Tensor, bias: Tensor, target: Tensor, weight: Tensor) -> Tensor:
        d_hidden, d_table, d_bias = (torch.zeros_like(tensor) for tensor in (hidden, table, bias))
        total = hidden.new_zeros(())
        for rows in torch.arange(len(hidden)).split(max(1, CHUNK // len(table))):
            part = slice(int(rows[0]), int(rows[-1]) + 1)
            logits = torch.addmm(bias, hidden[part], table.t())
            log_p = logits.log_softmax(-1)
            at = target[part].unsqueeze(-1)
            total -= (weight[part] * log_p.gather(-1, at).squeeze(-1)).sum()
            gradient = log_p.exp_().scatter_add_(-1, at, torch.full_like(at, -1.0, dtype=log_p.dtype))
            gradient *= weight[part].unsqueeze(-1)
            d_bias += gradient.sum(0)
            d_hidden[part].addmm_(gradient, table)
            d_table.addmm_(gradient.t(), hidden[part])
        ctx.save_for_backward(d_hidden, d_table, d_bias)
        return total

    @staticmethod
    def backward(ctx: Any, d_total: Tensor) -> tuple[Tensor | None, ...]:
        return *(gradient * d_total for gradient in ctx.saved_tensors), None, None


def handwritten_step(case: Case) -> Callable[[], float]:
    """Draw t, mask, run the trunk, cross-entropy at the masks alone, backward."""
    denoiser, x0 = awake(denoiser_of(case)), words_of(case)
    mask = denoiser.head.vocabulary.root
    head, trunk = denoiser.head, denoiser.backbone

    def step() -> float:
        denoiser.zero_grad()
        t = 1e-3 + (1.0 - 1e-3) * (torch.rand(1) + torch.arange(len(x0)) / len(x0)) % 1.0
        t = t.double().unsqueeze(-1).expand(x0.shape)
        masked = torch.rand(x0.shape) < t
        hidden = trunk(torch.where(masked, mask, x0), t, Context())[masked]
        weight = (1.0 / t[masked] / x0.numel()).float()
        loss = ChunkedCrossEntropy.apply(hidden, head.table, head.bias, x0[masked], weight)
        loss.backward()
        return float(loss.detach())

    return step
