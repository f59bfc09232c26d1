"""Adaptive correction sampler: ancestral steps that also redraw tokens (arXiv 2504.06416)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.network import Predicts
from ddiff.core.process import ForwardProcess, Query, TrainedPart
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.grid import Steps
from ddiff.sampling.grid_sampler import GridSampler, compute_alpha, draw_uniforms
from ddiff.sampling.loop import (
    Canvas,
    Quality,
    check_predicts_distribution,
    draw_where,
    require_process,
    step_rows,
)


@final
class AdaptiveCorrectionSampler(GridSampler):
    """Heuristic sampler: ancestral steps, in which some tokens are drawn again.

    In a step from time t to time s, each token is drawn again with probability eta (1 - pi):

    - eta in [0,1] is the strength of the correction; eta = 0 is ancestral sampling.
    - pi = (alpha_s - alpha_t)/(1 - alpha_t) is the probability that the step reveals a masked
      position, where alpha_t = q_t(x|x) is the probability that token x is still clean at time t.

    For alpha_t = 1 - t, for example, pi = 1 - s/t. Tokens are therefore drawn again most often in
    early steps, and never in the last step. The new token is drawn from the full conditional
    P(x | z_t), where z_t includes the current token. It is not noised to time s.

    The bound of the process must train the prediction at tokens, not only at masks (see
    `require_informed_tokens`).
    """

    quality: Quality = "heuristic"
    order = 0

    def __init__(self, grid: Steps | int = 64, eta: float = 0.25) -> None:
        super().__init__(grid)
        if not 0.0 <= eta <= 1.0:
            raise ArgumentError(
                f"AdaptiveCorrectionSampler: eta must be in [0, 1]; got {eta}. "
                "With eta = 0 no token is redrawn."
            )
        self.eta = eta

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_informed_tokens(self, process, predicts)

    def move(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        # Separate channels: whether a token is redrawn is independent of the new token.
        redraws = self._choose_redraws(process, canvas, s, rng).reshape(-1)
        u_step = draw_uniforms(rng, "step", process.uniforms_per_step)
        u_decode = draw_uniforms(rng, "x", process.uniforms_per_decode)
        flat_s = s.reshape(-1)

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            redraw = redraws[rows]
            zs = draw_where(~redraw, process.step, query, zt, t, flat_s[rows], u_step[rows])
            return draw_where(redraw, process.decode, query, zs, t, u_decode[rows])

        zs = step_rows(network, canvas, draw, process.active(canvas.zt))
        return canvas.advance(zs, s)

    def _choose_redraws(
        self,
        process: ForwardProcess,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Tensor:
        """Return a bool [B,L] that marks the tokens to draw again in the step to times s [B,L]."""
        alpha_s = compute_alpha(process, s, canvas.zt)
        alpha_t = compute_alpha(process, canvas.t, canvas.zt)
        reveal = ((alpha_s - alpha_t) / (1.0 - alpha_t)).clamp(0.0, 1.0)
        is_token = canvas.zt < process.vocabulary.num_tokens
        return is_token & (rng.uniform("correct") < self.eta * (1.0 - reveal))


def require_informed_tokens(
    sampler: object,
    process: ForwardProcess | None,
    predicts: Predicts,
) -> None:
    """Raise ArgumentError unless the bound of the process trains the prediction at tokens.

    In masked diffusion, for example, only predictions at masks are trained. The prediction at a
    position that already has a token is then arbitrary, and `sampler` cannot redraw tokens.
    """
    require_process(sampler, process)
    check_predicts_distribution(sampler, predicts)
    if process is None:
        return
    # State 0 is a token in every vocabulary, and stands for all of them.
    trained = int(process.trained_part(torch.zeros(1, dtype=torch.long))[0])
    if trained == TrainedPart.NONE:
        raise ArgumentError(
            f"{type(sampler).__name__}: process must train the prediction at tokens, because the "
            "sampler redraws tokens from the prediction at these tokens; the bound of "
            f"{type(process).__name__} does not train the prediction at tokens. "
            "Use a process that replaces tokens by other tokens, or a sampler that noises a token "
            "before it draws a new one (psi, dfm)."
        )
