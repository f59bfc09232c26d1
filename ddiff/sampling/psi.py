"""The psi family, from the posterior step to predictor-corrector, with remasking (arXiv 2602.21185, 2503.00307)."""

from __future__ import annotations

from typing import Protocol, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.prediction import CleanDistribution
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.grid import Steps
from ddiff.sampling.grid_sampler import (
    GridSampler,
    compute_alpha,
    draw_uniforms,
    every_row,
    find_undetermined,
    root_of,
)
from ddiff.sampling.loop import Canvas, Quality, restrict, step_rows


class Kappa(Protocol):
    """Fraction of the posterior in a step; `records_log_p`: reads the extra `sureness`, ln p of drawn tokens."""

    records_log_p: bool

    def __call__(self, process: ForwardProcess, canvas: Canvas, s: Tensor) -> Tensor:
        """[B,L] in [0,1]."""


@final
class PsiSampler(GridSampler):
    """With probability kappa the posterior step, else x ~ P(x | z_t, rest) and z_s ~ q_s(. | x): every position can change.

    One network call a step. kappa = 1 is ancestral. Each single position keeps its distribution for any kappa that does not
    depend on its state; redrawing dependent positions together is an error of its own, which fades with the steps but at no
    proven order.
    """

    quality: Quality = "heuristic"
    order = 0

    def __init__(self, grid: Steps | int = 64, kappa: float | Kappa = 0.9) -> None:
        super().__init__(grid)
        self.kappa: Kappa = _ConstantKappa(kappa) if isinstance(kappa, (int, float)) else kappa
        self.keeps_extras = self.kappa.records_log_p

    def move(
        self, process: ForwardProcess, network: Network, canvas: Canvas, s: Tensor, rng: CounterRng
    ) -> Canvas:
        keeps = rng.uniform("kappa") < self.kappa(process, canvas, s)
        step = draw_uniforms(rng, "step", process.uniforms_per_step)
        decode = draw_uniforms(rng, "x", process.uniforms_per_decode)
        again, then = draw_uniforms(rng, "again", process.uniforms_per_sample), s.reshape(-1)
        uncertain = find_undetermined(process, canvas).reshape(-1)
        sureness = (
            canvas.extras.get("sureness", torch.full_like(canvas.t, torch.inf)).reshape(-1).clone()
        )

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            keep, asked, zs = keeps.reshape(-1)[rows], uncertain[rows], zt.clone()
            on, back, x = (
                (keep & asked).nonzero().squeeze(-1),
                (~keep & asked).nonzero().squeeze(-1),
                zt.clone(),
            )
            if len(on):
                zs[on] = process.step(
                    restrict(query, on), zt[on], t[on], then[rows[on]], step[rows[on]]
                )
            if len(back):
                x[back] = process.decode(
                    restrict(query, back), zt[back], t[back], decode[rows[back]]
                )
            redrawn = process.sample(x, then[rows], again[rows])
            zs = torch.where(keep, zs, redrawn)
            if self.kappa.records_log_p:
                new = ((zs != zt) & (zs < process.vocabulary.num_tokens)).nonzero().squeeze(-1)
                sureness[rows[new]] = _log_p(process, restrict(query, new), zs[new])
            return zs

        zs = step_rows(network, canvas, draw, find_undetermined(process, canvas) | ~keeps)
        return canvas.advance(
            zs, s, **({"sureness": sureness.reshape(s.shape)} if self.kappa.records_log_p else {})
        )


def _log_p(process: ForwardProcess, query: Query, words: Tensor) -> Tensor:
    """[k] ln p of words just drawn."""
    if len(words) == 0:
        return words.double()

    def read(dist: CleanDistribution, tokens: Tensor) -> Tensor:
        return dist.log_prob(tokens).double()

    return query(every_row(words), root_of(process, words), read, words)


class _ConstantKappa:
    records_log_p = False

    def __init__(self, kappa: float) -> None:
        if not 0.0 <= kappa <= 1.0:
            raise ArgumentError(
                f"PsiSampler: kappa must be in [0, 1]; got {kappa}. 1 is the posterior step alone."
            )
        self.kappa = kappa

    def __call__(self, process: ForwardProcess, canvas: Canvas, s: Tensor) -> Tensor:
        return torch.full_like(s, self.kappa)


class _Remasking:
    """kappa = 1 - sigma/(1 - alpha_s): a word goes back to noise with probability sigma.

    sigma is at most sigma_max = min(1, (1 - alpha_s)/alpha_t) in the paper; kappa >= 0 keeps it to 1 - alpha_s, which is
    less by alpha_t and binds in the last steps only. alpha is q_t(x|x) of the token x that stands there, pi_0 on a tree:
    where tokens have rates of their own (dense chains), each goes back to noise with sigma, and kappa depends on it.
    """

    records_log_p = False

    def __init__(self, eta: float) -> None:
        if not 0.0 <= eta <= 1.0:
            raise ArgumentError(
                f"{type(self).__name__}: eta must be in [0, 1]; got {eta}. 0 never remasks."
            )
        self.eta = eta

    def __call__(self, process: ForwardProcess, canvas: Canvas, s: Tensor) -> Tensor:
        alpha_s = compute_alpha(process, s, canvas.zt)
        alpha_t = compute_alpha(process, canvas.t, canvas.zt)
        largest = ((1.0 - alpha_s) / alpha_t).nan_to_num(1.0).clamp(max=1.0)
        gone = self.sigma(process, canvas, s, largest) / (1.0 - alpha_s).clamp(min=1e-300)
        return 1.0 - gone.clamp(max=1.0)

    def sigma(self, process: ForwardProcess, canvas: Canvas, s: Tensor, largest: Tensor) -> Tensor:
        """[B,L] the chance that a word is remasked in this step."""
        raise NotImplementedError


@final
class CapRemasking(_Remasking):
    """sigma = min(eta, sigma_max)."""

    def __init__(self, eta: float = 0.008) -> None:
        super().__init__(eta)

    def sigma(self, process: ForwardProcess, canvas: Canvas, s: Tensor, largest: Tensor) -> Tensor:
        return largest.clamp(max=self.eta)


@final
class RescaleRemasking(_Remasking):
    """sigma = eta sigma_max."""

    def __init__(self, eta: float = 0.015) -> None:
        super().__init__(eta)

    def sigma(self, process: ForwardProcess, canvas: Canvas, s: Tensor, largest: Tensor) -> Tensor:
        return self.eta * largest


@final
class ConfidenceRemasking(_Remasking):
    """sigma_i = eta sigma_max softmax_i(-p_i) over the words of a sequence, p_i the probability it was drawn with.

    With eta = 1 the published rule, where a sequence remasks at most one word a step.
    """

    records_log_p = True

    def __init__(self, eta: float = 1.0) -> None:
        super().__init__(eta)

    def sigma(self, process: ForwardProcess, canvas: Canvas, s: Tensor, largest: Tensor) -> Tensor:
        sureness = canvas.extras.get("sureness", torch.full_like(s, torch.inf))
        is_word = (canvas.zt < process.vocabulary.num_tokens) & canvas.free & sureness.isfinite()
        weight = torch.where(is_word, -sureness.exp(), -torch.inf).softmax(-1).nan_to_num(0.0)
        return self.eta * largest * weight


@final
class LoopRemasking(_Remasking):
    """sigma = eta while time rests, as it does on a `LoopGrid`; elsewhere 0."""

    def __init__(self, eta: float = 0.02) -> None:
        super().__init__(eta)

    def sigma(self, process: ForwardProcess, canvas: Canvas, s: Tensor, largest: Tensor) -> Tensor:
        return torch.where(s == canvas.t, largest.clamp(max=self.eta), 0.0)
