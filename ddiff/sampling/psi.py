"""Psi samplers (arXiv 2602.21185) and their special case, remasking (arXiv 2503.00307)."""

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
    find_undetermined,
)
from ddiff.sampling.loop import (
    Canvas,
    Quality,
    draw_where,
    query_at_root,
    restrict,
    step_rows,
)

DRAWN_LOG_P = "drawn_log_p"


class Kappa(Protocol):
    """Interface of functions that compute kappa, the probability of an ancestral step.

    kappa is a parameter of the psi sampler (see `PsiSampler`).

    Attributes:
        records_log_p: whether kappa depends on the probability with which each token was drawn. The
            sampler then stores ln p of every drawn token as `Canvas.extras["drawn_log_p"]`.
    """

    records_log_p: bool

    def __call__(self, process: ForwardProcess, canvas: Canvas, s: Tensor) -> Tensor:
        """Return the probability kappa [B,L] of an ancestral step to times s [B,L]."""


@final
class PsiSampler(GridSampler):
    """Heuristic sampler in which every position can change in every step.

    In a step from time t to time s, each position moves in one of two ways:

    - with probability kappa by an ancestral step, z_s ~ P(z_s | z_t);
    - otherwise a token x is drawn from P(x | z_t) and noised again, z_s ~ q_s(. | x).

    With kappa = 1 the sampler is the ancestral sampler. A step takes one network evaluation.

    If kappa at a position does not depend on the state there, the position has its exact marginal
    distribution. But positions that are noised again in the same step are drawn independently, and
    lose part of their dependence. No order of convergence is proven for this error.
    """

    quality: Quality = "heuristic"
    order = 0

    def __init__(self, grid: Steps | int = 64, kappa: float | Kappa = 0.9) -> None:
        super().__init__(grid)
        self.kappa: Kappa = _ConstantKappa(kappa) if isinstance(kappa, (int, float)) else kappa
        self.keeps_extras = self.kappa.records_log_p

    def move(
        self,
        process: ForwardProcess,
        network: Network,
        canvas: Canvas,
        s: Tensor,
        rng: CounterRng,
    ) -> Canvas:
        keeps = rng.uniform("kappa") < self.kappa(process, canvas, s)
        flat_keeps = keeps.reshape(-1)
        u_step = draw_uniforms(rng, "step", process.uniforms_per_step)
        u_decode = draw_uniforms(rng, "x", process.uniforms_per_decode)
        u_noise = draw_uniforms(rng, "again", process.uniforms_per_sample)
        flat_s = s.reshape(-1)
        undetermined = find_undetermined(process, canvas)
        flat_undetermined = undetermined.reshape(-1)
        drawn_log_p = _drawn_log_p(canvas).reshape(-1).clone()

        def draw(query: Query, zt: Tensor, t: Tensor, rows: Tensor) -> Tensor:
            keep = flat_keeps[rows]
            needs_network = flat_undetermined[rows]
            steps = keep & needs_network
            zs = draw_where(steps, process.step, query, zt, t, flat_s[rows], u_step[rows])
            # A state that determines the clean token is that token.
            decodes = ~keep & needs_network
            x = draw_where(decodes, process.decode, query, zt, t, u_decode[rows])
            # Rows that take the posterior step are noised too: to select the others costs more.
            noised = process.sample(x, flat_s[rows], u_noise[rows])
            zs = torch.where(keep, zs, noised)
            if self.kappa.records_log_p:
                is_new = (zs != zt) & (zs < process.vocabulary.num_tokens)
                new = is_new.nonzero().squeeze(-1)
                drawn_log_p[rows[new]] = _log_p(process, restrict(query, new), zs[new])
            return zs

        zs = step_rows(network, canvas, draw, undetermined | ~keeps)
        if not self.kappa.records_log_p:
            return canvas.advance(zs, s)
        return canvas.advance(zs, s, **{DRAWN_LOG_P: drawn_log_p.reshape(s.shape)})


def _drawn_log_p(canvas: Canvas) -> Tensor:
    """Return the log-probability [B,L] with which each token was drawn, +inf at other positions."""
    return canvas.extras.get(DRAWN_LOG_P, torch.full_like(canvas.t, torch.inf))


def _log_p(process: ForwardProcess, query: Query, tokens: Tensor) -> Tensor:
    """Return the predicted ln p [k] of `tokens` [k], where tokens[i] is at row i of `query`."""
    if len(tokens) == 0:
        return tokens.double()

    def log_prob(dist: CleanDistribution, tokens: Tensor) -> Tensor:
        return dist.log_prob(tokens).double()

    return query_at_root(query, process, log_prob, tokens)


class _ConstantKappa:
    """Function that returns the same kappa at every position and time.

    kappa is the probability with which a psi sampler moves a position by an ancestral step.
    """

    records_log_p = False

    def __init__(self, kappa: float) -> None:
        if not 0.0 <= kappa <= 1.0:
            raise ArgumentError(
                f"PsiSampler: kappa must be in [0, 1]; got {kappa}. kappa = 1 is ancestral "
                "sampling.",
            )
        self.kappa = kappa

    def __call__(self, process: ForwardProcess, canvas: Canvas, s: Tensor) -> Tensor:
        return torch.full_like(s, self.kappa)


class _Remasking:
    """Base class of remasking rules, which noise a token again with probability sigma.

    For a step from time t to time s, a subclass defines sigma. Let alpha_s = q_s(x|x) be the
    probability that a token x is still clean at time s. The rule is then a psi sampler that takes
    an ancestral step with the probability kappa = 1 - sigma/(1 - alpha_s).

    The paper (arXiv 2503.00307) requires sigma <= sigma_max = min(1, (1 - alpha_s)/alpha_t). This
    class also requires sigma <= 1 - alpha_s, because kappa must not be negative. This limit is
    alpha_t sigma_max if sigma_max < 1.
    """

    records_log_p = False

    def __init__(self, eta: float) -> None:
        if not 0.0 <= eta <= 1.0:
            raise ArgumentError(
                f"{type(self).__name__}: eta must be in [0, 1]; got {eta}. "
                "With eta = 0 no token is remasked.",
            )
        self.eta = eta

    def __call__(self, process: ForwardProcess, canvas: Canvas, s: Tensor) -> Tensor:
        alpha_s = compute_alpha(process, s, canvas.zt)
        alpha_t = compute_alpha(process, canvas.t, canvas.zt)
        # If no token is clean at t, the quotient may be 0/0, and sigma_max is 1.
        largest = ((1.0 - alpha_s) / alpha_t).nan_to_num(1.0).clamp(max=1.0)
        sigma = self.sigma(process, canvas, s, largest)
        # At alpha_s = 1 sigma is 0 too; the floor avoids 0/0 and changes no other quotient.
        share = sigma / (1.0 - alpha_s).clamp(min=1e-300)
        return 1.0 - share.clamp(max=1.0)

    def sigma(self, process: ForwardProcess, canvas: Canvas, s: Tensor, largest: Tensor) -> Tensor:
        """Return sigma [B,L], the probability that a token is remasked in the step to times s.

        `largest` [B,L] is sigma_max, the largest sigma that arXiv 2503.00307 permits.
        """
        raise NotImplementedError


@final
class CapRemasking(_Remasking):
    """Remasking rule that noises a token again with probability sigma = min(eta, sigma_max).

    eta is in [0,1], and sigma_max is the largest probability that arXiv 2503.00307 permits.
    """

    def __init__(self, eta: float = 0.008) -> None:
        super().__init__(eta)

    def sigma(self, process: ForwardProcess, canvas: Canvas, s: Tensor, largest: Tensor) -> Tensor:
        return largest.clamp(max=self.eta)


@final
class RescaleRemasking(_Remasking):
    """Remasking rule that noises each token again with probability eta * sigma_max.

    eta is in [0,1], and sigma_max is the largest probability that arXiv 2503.00307 permits.
    """

    def __init__(self, eta: float = 0.015) -> None:
        super().__init__(eta)

    def sigma(self, process: ForwardProcess, canvas: Canvas, s: Tensor, largest: Tensor) -> Tensor:
        return self.eta * largest


@final
class ConfidenceRemasking(_Remasking):
    """Remasking rule that remasks tokens of low probability more often.

    The probability at position i is sigma_i = eta * sigma_max * softmax(-p)_i, where p_i is the
    probability with which the token at position i was drawn. The softmax is over the tokens of a
    sequence. With eta = 1, the rule of arXiv 2503.00307, the expected number of tokens of a
    sequence that a step remasks is at most one.
    """

    records_log_p = True

    def __init__(self, eta: float = 1.0) -> None:
        super().__init__(eta)

    def sigma(self, process: ForwardProcess, canvas: Canvas, s: Tensor, largest: Tensor) -> Tensor:
        log_p = _drawn_log_p(canvas)
        is_token = (canvas.zt < process.vocabulary.num_tokens) & canvas.free & log_p.isfinite()
        # A row without tokens is all -inf, whose softmax is NaN.
        weight = torch.where(is_token, -log_p.exp(), -torch.inf).softmax(-1).nan_to_num(0.0)
        return self.eta * largest * weight


@final
class LoopRemasking(_Remasking):
    """Remasking rule for `LoopGrid`: remask only in steps in which the time stays constant.

    In these steps, a token is noised again with probability sigma = min(eta, sigma_max). eta is in
    [0,1], and sigma_max is the largest probability that arXiv 2503.00307 permits. In other steps,
    sigma is 0.
    """

    def __init__(self, eta: float = 0.02) -> None:
        super().__init__(eta)

    def sigma(self, process: ForwardProcess, canvas: Canvas, s: Tensor, largest: Tensor) -> Tensor:
        return torch.where(s == canvas.t, largest.clamp(max=self.eta), 0.0)
