"""The adaptive correction sampler: visible words are overwritten on the way (arXiv 2504.06416)."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.process import ForwardProcess, Query, TrainedPart
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.grid import Steps
from ddiff.sampling.grid_sampler import GridSampler, compute_alpha, draw_uniforms
from ddiff.sampling.loop import (
    Canvas,
    Predicts,
    Quality,
    require_distribution,
    require_process,
    restrict,
    step_rows,
)


@final
class AdaptiveCorrectionSampler(GridSampler):
    """The ancestral step, but a visible word is with probability eta (1 - pi) redrawn from P(x | z_t). Heuristic.

    pi = (alpha_s - alpha_t)/(1 - alpha_t), the chance of a reveal (1 - s/t where alpha is linear), alpha that of the token
    that stands there: early steps correct most, the last none. The token is drawn with its own evidence and stays without
    noise. Needs a process whose bound trains the distribution at tokens.
    """

    quality: Quality = "heuristic"
    order = 0

    def __init__(self, grid: Steps | int = 64, eta: float = 0.25) -> None:
        super().__init__(grid)
        if not 0.0 <= eta <= 1.0:
            raise ArgumentError(
                f"AdaptiveCorrectionSampler: eta must be in [0, 1]; got {eta}. 0 corrects nothing."
            )
        self.eta = eta

    def check_supported(self, process: ForwardProcess | None, predicts: Predicts) -> None:
        require_informed_tokens(self, process, predicts)

    def move(
        self, process: ForwardProcess, network: Network, canvas: Canvas, s: Tensor, rng: CounterRng
    ) -> Canvas:
        alpha_s = compute_alpha(process, s, canvas.zt)
        alpha_t = compute_alpha(process, canvas.t, canvas.zt)
        reveal = ((alpha_s - alpha_t) / (1.0 - alpha_t)).clamp(0.0, 1.0)
        word = canvas.zt < process.vocabulary.num_tokens
        again = (word & (rng.uniform("correct") < self.eta * (1.0 - reveal))).reshape(-1)
        step = draw_uniforms(rng, "step", process.uniforms_per_step)
        last = draw_uniforms(rng, "x", process.uniforms_per_decode)
        then = s.reshape(-1)

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            zs, (on, over) = (
                zt.clone(),
                (part.nonzero().squeeze(-1) for part in (~again[rows], again[rows])),
            )
            if len(on):
                zs[on] = process.step(
                    restrict(query, on), zt[on], t[on], then[rows[on]], step[rows[on]]
                )
            if len(over):
                zs[over] = process.decode(
                    restrict(query, over), zt[over], t[over], last[rows[over]]
                )
            return zs

        return canvas.advance(step_rows(network, canvas, draw, process.active(canvas.zt)), s)


def require_informed_tokens(
    sampler: object, process: ForwardProcess | None, predicts: Predicts
) -> None:
    require_process(sampler, process)
    require_distribution(sampler, predicts)
    if (
        process is not None
        and int(process.trained_part(torch.zeros(1, dtype=torch.long))[0]) == TrainedPart.NONE
    ):
        raise ArgumentError(
            f"{type(sampler).__name__}: it reads the law at visible words, and the bound of {type(process).__name__} "
            "trains nothing there: a network may say anything, most likely the word itself. Use a process with noise among "
            "the words, or a sampler that corrects through noise (psi, dfm)."
        )
