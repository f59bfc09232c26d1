"""Sum over tokens in the KL divergence of interpolating processes, with an explicit gradient."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


class TokenDivergence(torch.autograd.Function):
    """Autograd function for the sum over tokens of the KL divergence, and two log-probabilities.

    Returns three tensors [r]:

    1. The sum over tokens y != x of b_y phi(alpha p_y / b_y), with phi(v) = v - ln(1 + v). A term
       with b_y = 0 is alpha p_y.
    2. ln p_x for the clean token x.
    3. ln p_z for the token z.

    The gradient is explicit, because automatic differentiation would store every intermediate
    result, and would make one gradient of width V for each of ln p_x and ln p_z. The derivative of
    the sum by ln p_y is b_y v^2 / (1 + v), with v = alpha p_y / b_y.

    Args:
        log_p: [r,V] log of the predicted distribution p.
        alpha: [r,1] probability that the token is clean.
        noise: [r,V] noise b_y at the tokens, or [r,1] if it is the same at all tokens.
        x0, z: [r] the tokens x and z.
    """

    @staticmethod
    def forward(
        ctx: Any,
        log_p: Tensor,
        alpha: Tensor,
        noise: Tensor,
        x0: Tensor,
        z: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        picked = torch.stack([x0, z], -1)
        # b phi(v) tends to alpha p for b -> 0; the clamp keeps v finite.
        scale = noise.clamp(min=torch.finfo(noise.dtype).tiny)
        v = log_p.exp().mul_(alpha / scale)
        v = v.scatter_(-1, x0.unsqueeze(-1), 0.0)
        ctx.save_for_backward(v, scale, picked)
        log_term = v.log1p()
        phi = torch.sub(v, log_term, out=log_term)
        if scale.shape[-1] == 1:
            others = (phi.sum(-1, keepdim=True) * scale).squeeze(-1)
        else:
            others = (phi * scale).sum(-1)
        log_p_x, log_p_z = log_p.gather(-1, picked).unbind(-1)
        return others, log_p_x, log_p_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(
        ctx: Any,
        d_others: Tensor,
        d_x: Tensor,
        d_z: Tensor,
    ) -> tuple[Tensor | None, ...]:
        v, scale, picked = ctx.saved_tensors
        gradient = v + 1.0
        gradient = torch.div(v, gradient, out=gradient).mul_(v)
        gradient = gradient.mul_(scale * d_others.unsqueeze(-1))
        gradient = gradient.scatter_add_(-1, picked, torch.stack([d_x, d_z], -1))
        return gradient, None, None, None, None
