"""The interpolating family: the clean token fades into noise that does not depend on it.

q_t(.|x) = alpha_t delta_x + b_t. The generator adds arrivals omega_t(z) = b_t'(z) - (alpha'/alpha) b_t(z) >= 0 from every
state, and the bound has the closed form (arXiv 2503.04482, in the reverse-rate reading)

    density = (omega_t(z) / q_t(z|x)) [ KL( q_t(.|x) || q_t-bar ) + rho - 1 - ln rho ],   rho = q_t(z|x) / q_t-bar(z).

The bracket is `mismatch`. The weight is the total true reverse rate, as in every family,
omega_t(z) (1 - q_t(z|x)) / q_t(z|x), and the divergence is the rest, mismatch / (1 - q_t(z|x)).

Masked diffusion, uniform diffusion and their mixtures are of this family. The chain run backwards leaves z at the rate
omega_t(z) (1 - q_t-bar(z)) / q_t-bar(z) for y ~ q_t-bar elsewhere. Since q_t-bar >= b_t, putting b_t for q_t-bar bounds
that rate without a network: only rows that may move are shown to it (thinning).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor

from ddiff.core.kernel import InterpolatingKernel, Kernel
from ddiff.core.numerics import (
    EARLIEST,
    FLOOR,
    LATEST,
    Constant,
    draw_index,
    evaluate_per_time,
    interior,
    log_normalize,
    safe_log,
    to_column,
    where_or_zero,
)
from ddiff.core.prediction import (
    CleanDistribution,
    DenseDistribution,
    Prediction,
    Score,
    require_distribution,
)
from ddiff.core.process import ForwardProcess, Prior, Query
from ddiff.core.schedule import LinearSchedule, Schedule
from ddiff.core.vocabulary import FlatVocabulary, Vocabulary
from ddiff.errors import ArgumentError

ROUNDING = 1e-12  # differences of noise that small, relative to their terms, are nothing
CELLS = 1024  # of logit time, each with one rate of candidate events
REACHED_TIMES = 129  # in logit t, at which it is seen whether anything arrives in a state
SLACK = 1.01  # a smooth rate inside a cell is not above the larger of its ends by more than a thousandth


class InterpolatingProcess(ForwardProcess):
    """q_t(.|x) = alpha_t delta_x + b_t; a subclass says alpha and b, derivatives come from them.

    A subclass sets `vocabulary` and `prior`, b_1 / |b_1| for the process to close. Near t = 0 b must keep its relative
    accuracy, since rates divide by it: t^2 law, not (1 - alpha_t) law, which float64 rounds to 0 there. Noise that is a sum
    of a few fixed laws has cheaper formulas: `ComponentProcess`.
    """

    uniforms_per_sample = 2
    uniforms_per_step = 2
    uniforms_per_decode = 2
    uniforms_per_forward_step = 2
    uniforms_per_event = 2
    has_events = True

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """[r] the share of the clean token."""

    @abstractmethod
    def noise(self, t: Tensor) -> Tensor:
        """[r,S] b_t, with sum 1 - alpha_t."""

    def d_alpha(self, t: Tensor) -> Tensor:
        """[r] by forward differentiation of `alpha`; may be overridden."""
        return torch.func.jvp(self.alpha, (t,), (torch.ones_like(t),))[1]

    def d_noise(self, t: Tensor) -> Tensor:
        """[r,S] by forward differentiation of `noise`; may be overridden."""
        return torch.func.jvp(self.noise, (t,), (torch.ones_like(t),))[1]

    def arrivals(self, t: Tensor) -> Tensor:
        """[r,S] omega_t(z), the rate into z from any other state."""
        t = interior(t)
        return _without_rounding(
            self.d_noise(t), (self.d_alpha(t) / self.alpha(t)).unsqueeze(-1) * self.noise(t)
        )

    # ------------------------------------------------------------------ the noise, no wider than it is asked for

    def noise_at(self, zt: Tensor, t: Tensor) -> Tensor:
        """[r] b_t(z_t)."""
        return _at(self.noise, zt, t)

    def arrivals_at(self, zt: Tensor, t: Tensor) -> Tensor:
        """[r] omega_t(z_t)."""
        return _at(self.arrivals, zt, t)

    def noise_like(self, log_p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """b_t in the dtype of log_p: over words [r,V], or [r,1] where all have the same, and beyond them [r,S-V]."""
        distinct, place = t.unique(return_inverse=True)
        noise = self.noise(distinct).to(log_p.dtype)[place]
        return noise[:, : self.vocabulary.num_tokens], noise[:, self.vocabulary.num_tokens :]

    def alike(self, zt: Tensor) -> Tensor:
        """[r] a state with the same noise as z_t at all times, the same one for many: what tables are made for."""
        return zt

    def noise_of(self, states: Tensor, t: Tensor) -> Tensor:
        """[n,m] b_t of some states [m] at times [n]."""
        return torch.cat([self.noise(part)[:, states] for part in t.split(64)])

    def arrivals_of(self, states: Tensor, t: Tensor) -> Tensor:
        """[n,m] omega_t of some states [m] at times [n]."""
        return torch.cat([self.arrivals(part)[:, states] for part in t.split(64)])

    def _arrive_at(self, zt: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """[r] P(z_t | z_s = y) for y != z_t: what arrives from anywhere else between s and t."""
        return _without_rounding(
            self.noise_at(zt, t), self._stay(s, t) * self.noise_at(zt, s)
        ).clamp(min=0.0)

    def _stay(self, s: Tensor, t: Tensor) -> Tensor:
        """[r] alpha_t / alpha_s."""
        alpha_s = self.alpha(s)
        return torch.where(alpha_s > 0, self.alpha(t) / alpha_s, torch.ones_like(t))

    # ------------------------------------------------------------------ forward

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        words, beyond = self.noise_like(log_p, t)
        return safe_log(
            torch.cat([to_column(self.alpha(t), log_p) * log_p.exp() + words, beyond], -1)
        )

    def rates(self, t: Tensor) -> Kernel:
        arrive = self.arrivals(t)
        return InterpolatingKernel(-arrive.sum(-1), arrive)

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        """alpha_ts I + 1 (x) (b_t - alpha_ts b_s), alpha_ts = alpha_t / alpha_s."""
        stay = self._stay(s, t)
        arrive = self.noise(t) - stay.unsqueeze(-1) * self.noise(s)
        return InterpolatingKernel(stay, arrive.clamp(min=0.0))

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        zt, lost = x0.clone(), (u[:, 0] >= self.alpha(t)).nonzero().squeeze(-1)
        zt[lost] = draw_index(
            self.noise(t[lost]), u[lost, 1]
        )  # at t = 0 there may be no noise to draw from
        return zt

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Kept with alpha_ts, otherwise drawn from b_t - alpha_ts b_s."""
        zt, stay = zs.clone(), self._stay(s, t)
        lost = (u[:, 0] >= stay).nonzero().squeeze(-1)
        arrive = self.noise(t[lost]) - stay[lost].unsqueeze(-1) * self.noise(s[lost])
        zt[lost] = draw_index(arrive.clamp(min=0.0), u[lost, 1])
        return zt

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        noise = self.noise_at(zt, t).unsqueeze(-1)
        words = torch.arange(self.vocabulary.num_tokens, device=zt.device)
        return (
            noise + torch.where(words == zt.unsqueeze(-1), self.alpha(t).unsqueeze(-1), 0.0)
        ).log()

    def from_clean(self, t: Tensor) -> Kernel:
        """alpha_t I + 1 (x) b_t."""
        return InterpolatingKernel(self.alpha(t), self.noise(t))

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        return self._likelihood(x0, x0, t)

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        """p = (s / sum s - b_t) / alpha_t on tokens, the inverse of alpha_t I + 1 (x) b_t.

        Relative to s it is 1 - b_t sum s / s, held above 1e-14: of a score that is nothing but noise, at t near 1, the
        shares of its tokens are left.
        """
        log_s = score.log_ratio.double().log_softmax(-1)[:, : self.vocabulary.num_tokens]
        noise, _ = self.noise_like(log_s, self.clamp_score_time(t))
        possible = log_s > -torch.inf
        log_s = where_or_zero(possible, log_s)
        signal = -torch.expm1(noise.log() - log_s)
        return log_normalize(
            torch.where(possible, log_s + signal.clamp(min=FLOOR).log(), -torch.inf)
        )

    # ------------------------------------------------------------------ the bound

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """omega_t(z) (1 - q_t(z|x)) / q_t(z|x), the total true reverse rate.

        1 where that is 0 since z is certain under x, but something may arrive: other tokens that become z cost nats there.
        """
        t = interior(t)
        arrive = self.arrivals_at(zt, t)
        elsewhere = self._elsewhere(x0, zt, t)
        rate = arrive * (elsewhere / self._likelihood(x0, zt, t))
        only_state = self.vocabulary.num_states == 1  # where nothing arrives from elsewhere
        unit = float(not only_state)
        return torch.where(arrive > 0, torch.where(elsewhere > 0, rate, unit), 0.0)

    def divergence(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """mismatch / (1 - q_t(z|x)), the density where the weight is 1 since z is certain; 0 where nothing arrives."""
        inner = interior(t)
        elsewhere = self._elsewhere(x0, zt, inner)
        arrive = self.arrivals_at(zt, inner)
        certain = arrive / self._likelihood(x0, zt, inner)
        scale = torch.where(
            elsewhere > 0, 1.0 / torch.where(elsewhere > 0, elsewhere, 1.0), certain
        )
        return self.mismatch(prediction, x0, zt, t) * torch.where(arrive > 0, scale, 1.0)

    def mismatch(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] KL( q_t(.|x) || q_t-bar ) + rho - 1 - ln rho, which published losses weigh; 0 where nothing arrives in z_t.

        For a score it is sum_{y != z} of the same between q_t(y|x) and q_t(z|x) s_theta(y), in its own dtype.
        """
        t = interior(t)
        arrives = self.arrivals_at(zt, t) > 0
        if isinstance(prediction, Score):
            return torch.where(arrives, self._divergence_of_score(prediction, x0, zt, t), 0.0)
        others, log_p_x, log_p_z = self._read(prediction, x0, zt, t)
        # dropped where nothing arrives: ln 0 of a token that the prediction rules out is infinite in both terms there
        log_rho = self._likelihood(x0, zt, t).log() - self._log_marginal_at(
            where_or_zero(arrives, log_p_z), zt, t
        )
        divergence = (
            self._kl(others, where_or_zero(arrives, log_p_x), x0, t)
            + torch.expm1(log_rho)
            - log_rho
        )
        return torch.where(arrives, divergence, 0.0)

    def density(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        weight = self.weight(x0, zt, t)
        read = weight > 0
        return torch.where(
            read, weight * where_or_zero(read, self.divergence(prediction, x0, zt, t)), 0.0
        )

    def decode_nll(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        if isinstance(prediction, Score):
            return super().decode_nll(prediction, x0, zt, t)
        evidence = self._likelihood(x0, zt, t).log()
        # a token that no noise reaches tells what it is, whatever the prediction
        told = (self.noise_at(zt, t) == 0) & (zt == x0)
        log_p_z = where_or_zero(~told, prediction.log_prob(self._word(zt)))
        log_p_x = where_or_zero(~told, prediction.log_prob(x0))
        return torch.where(told, 0.0, self._log_marginal_at(log_p_z, zt, t) - log_p_x - evidence)

    def closing_kl(self, prediction: Prediction, x0: Tensor, t: Tensor) -> Tensor:
        if isinstance(prediction, Score):
            return super().closing_kl(prediction, x0, t)
        others, log_p_x, _ = self._read(prediction, x0, x0, t)
        return self._kl(others, log_p_x, x0, t)

    def reverse_rates(self, prediction: Prediction, zt: Tensor, t: Tensor) -> Tensor:
        ratio = self._log_ratio(prediction, zt, interior(t)).exp()
        arrive = to_column(self.arrivals_at(zt, t), ratio)
        return torch.where(arrive > 0, arrive * ratio, 0.0).scatter(-1, zt.unsqueeze(-1), 0.0)

    def _read(
        self, dist: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """[r] each: what `_kl` sums over the words other than x0, ln p at x0, and ln p at z_t where that is a word."""
        log_p = dist.log_mass(0)
        noise, _ = self.noise_like(log_p, t)
        return _Words.apply(log_p, to_column(self.alpha(t), log_p), noise, x0, self._word(zt))

    def _kl(self, others: Tensor, log_p_x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """[r] KL( q_t(.|x) || q_t-bar ) = q_x phi(-delta) + sum_{y != x} b_y phi(alpha p_y / b_y), phi(v) = v - ln(1 + v).

        delta = alpha (1 - p_x) / q_x. No term is negative, so that nothing cancels where alpha is small; alpha p_y where
        b_y = 0. States beyond the words have the same noise on both sides and give nothing.
        """
        alpha = self.alpha(t)
        truth, here = self._likelihood(x0, x0, t), self.noise_at(x0, t)
        read = truth > 0
        truth = torch.where(read, truth, 1.0)
        delta = torch.where(read, -alpha * torch.expm1(log_p_x) / truth, 0.0)
        mixed = _log_mixed(here, alpha, where_or_zero(read, log_p_x))
        log_rest = torch.where(delta < 0.5, torch.log1p(-delta.clamp(max=0.5)), mixed - truth.log())
        own = torch.where(read, -truth * (delta + log_rest), 0.0)
        return own + others

    def _divergence_of_score(self, score: Score, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        log_ratio, pick = score.log_ratio, x0.unsqueeze(-1)
        words, beyond = self.noise_like(log_ratio, t)
        q = torch.cat([words.expand(-1, self.vocabulary.num_tokens), beyond], -1)
        q = q.scatter(-1, pick, q.gather(-1, pick) + to_column(self.alpha(t), q))
        log_model = log_ratio + to_column(self._likelihood(x0, zt, t).log(), log_ratio)
        terms = log_model.exp() - q + torch.where(q > 0, q * (q.log() - log_model), 0.0)
        return terms.scatter(-1, zt.unsqueeze(-1), 0.0).sum(-1).double()

    def _word(self, zt: Tensor) -> Tensor:
        """[r] z_t where that is a word, some word elsewhere."""
        return torch.where(zt < self.vocabulary.num_tokens, zt, 0)

    def _log_marginal_at(self, log_p_z: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] ln q_t-bar(z_t). Where no noise is, it is ln alpha + ln p: the mass of a word may underflow."""
        noise, word = self.noise_at(zt, t), zt < self.vocabulary.num_tokens
        mixed = _log_mixed(noise, self.alpha(t), log_p_z)
        return torch.where(word | (noise == 0), mixed, torch.where(noise > 0, noise, 1.0).log())

    def _likelihood(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] q_t(z|x)."""
        return self.noise_at(zt, t) + torch.where(zt == x0, self.alpha(t), 0.0)

    def information(self, t: Tensor) -> Tensor:
        """The mean over tokens x of KL( q_t(.|x) || q_t-bar ), each kind of token being read once."""
        num_tokens = self.vocabulary.num_tokens
        kinds, counts = self.alike(torch.arange(num_tokens)).unique(return_counts=True)
        alpha = self.alpha(t).unsqueeze(-1)
        noise = self.noise_of(kinds, t)
        # in the notation of `_kl`, with p = 1/V at every token
        gained = torch.where(noise > 0, alpha / (num_tokens * noise), 0.0)
        other = torch.where(noise > 0, noise * (gained - gained.log1p()), alpha / num_tokens)
        truth = alpha + noise
        delta = torch.where(truth > 0, alpha * (1.0 - 1.0 / num_tokens) / truth, 0.0)
        own = torch.where(truth > 0, -truth * (delta + torch.log1p(-delta)), 0.0)
        share = counts.to(t.dtype) / num_tokens
        return ((own - other + (counts * other).sum(-1, keepdim=True)) * share).sum(-1)

    def change_probability(self, t: Tensor) -> Tensor:
        kinds, counts = self.alike(torch.arange(self.vocabulary.num_tokens)).unique(
            return_counts=True
        )
        kept = (
            self.alpha(t) + (self.noise_of(kinds, t) * counts).sum(-1) / self.vocabulary.num_tokens
        )
        return (1.0 - kept).clamp(min=0.0)

    def _elsewhere(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] 1 - q_t(z|x) = sum of b_t(y) over y != z, and alpha_t where z is not x."""
        return self._noise_elsewhere(zt, t) + torch.where(zt == x0, 0.0, self.alpha(t))

    def _noise_elsewhere(self, zt: Tensor, t: Tensor) -> Tensor:
        """[r] sum of b_t(y) over y != z_t."""
        return _at(lambda time: self.noise(time).sum(-1, keepdim=True) - self.noise(time), zt, t)

    def active(self, zt: Tensor) -> Tensor:
        """A state that nothing arrives in charges nothing."""
        return self._reached.on(zt.device)[zt]

    @property
    def is_monotone(self) -> bool:
        """Nothing arrives but in the mask, so that a word once seen stays."""
        reached = self._reached.on(torch.device("cpu"))
        return not bool(reached[: self.vocabulary.root].any())

    @cached_property
    def _reached(self) -> Constant:
        """bool [S] states with arrivals at some of REACHED_TIMES times, as a schedule may rest at any one of them."""
        low, high = torch.logit(torch.tensor([EARLIEST, LATEST], dtype=torch.float64)).tolist()
        times = torch.sigmoid(torch.linspace(low, high, REACHED_TIMES, dtype=torch.float64))
        return Constant(self._largest_arrivals(times) > 0)

    def _largest_arrivals(self, t: Tensor) -> Tensor:
        """[S] of times t [n]."""
        largest = self.arrivals(t[:1])[0]
        for part in t.split(8):
            largest = torch.maximum(largest, self.arrivals(part).amax(0))
        return largest

    # ------------------------------------------------------------------ reverse

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """P(z_s != z | z_t = z) = arrive_ts(z) (1 - q_s-bar(z)) / q_t-bar(z), for y ~ q_s-bar elsewhere."""
        return self._leave(query, zt, t, s, self._arrive_at(zt, s, t), u)

    def _leave(
        self, query: Query, zt: Tensor, t: Tensor, s: Tensor, arrive: Tensor, u: Tensor
    ) -> Tensor:
        """Leave z with probability arrive (1 - q_s-bar(z)) / q_t-bar(z) for y ~ q_s-bar elsewhere; u [r,2].

        b for q-bar bounds that probability without the network, so only rows below the bound are shown to it.
        """
        before, now = self.noise_at(zt, s), self.noise_at(zt, t)
        bound = torch.where(arrive > 0, arrive * (1.0 - before) / now, 0.0)
        zs, candidates = zt.clone(), (u[:, 0] < bound).nonzero().squeeze(-1)
        if len(candidates) == 0:
            return zs

        def draw(
            prediction: Prediction, z: Tensor, t: Tensor, s: Tensor, arrive: Tensor, u: Tensor
        ) -> Tensor:
            dist = require_distribution(prediction, "InterpolatingProcess.step")
            log_marginal = self.log_marginal(dist.log_mass(0), s)
            elsewhere = log_marginal.exp().scatter(-1, z.unsqueeze(-1), 0.0)
            total = elsewhere.double().sum(-1)
            # A distribution that is certain of z leaves no mass elsewhere; such a row draws z.
            weights = elsewhere.scatter(-1, z.unsqueeze(-1), to_column(total == 0, elsewhere))
            drawn = draw_index(weights, u[:, 1])
            log_here = self._log_marginal_at(dist.log_prob(self._word(z)), z, t)
            leaves = arrive * total / log_here.double().exp()
            return torch.where(u[:, 0] < leaves, drawn, z)

        z = zt[candidates]
        values = (value[candidates] for value in (t, s, arrive, u))
        zs[candidates] = query(candidates, self.scope(z), draw, z, *values)
        return zs

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """z itself with probability alpha p(z) / q_t-bar(z), otherwise x ~ p: the noise says nothing of x."""
        if self.closes_at_clean and bool((t == 0.0).all()):
            return zt.clone()
        x0, noise, word = zt.clone(), self.noise_at(zt, t), zt < self.vocabulary.num_tokens
        open_ = (~word | (noise > 0)).nonzero().squeeze(-1)
        if len(open_) == 0:
            return x0

        def draw(
            prediction: Prediction, z: Tensor, t: Tensor, noise: Tensor, is_token: Tensor, u: Tensor
        ) -> Tensor:
            if isinstance(prediction, Score):
                prediction = DenseDistribution(self.tweedie(prediction, t), self.vocabulary)
            log_prob = prediction.log_prob(torch.where(is_token, z, 0))
            clean = self.alpha(t) * log_prob.double().exp()
            stays = torch.where(is_token, clean / (clean + noise), 0.0)
            root = torch.full_like(z, self.vocabulary.root)
            drawn = prediction.draw(root, torch.zeros_like(z), u[:, 1])
            return torch.where(u[:, 0] < stays, z, drawn)

        z = zt[open_]
        values = (value[open_] for value in (t, noise, word, u))
        x0[open_] = query(open_, self.scope(z), draw, z, *values)
        return x0

    # ------------------------------------------------------------------ events

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """The next of the candidate events, which come at the rate of their cell of logit time (`_Cells`)."""
        return _Cells(self, zt).next_time(t, u)

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """A candidate is taken with probability (rate of leaving z_t) / (rate of candidates); y ~ q_t-bar elsewhere."""
        t = interior(t)
        candidates = _Cells(self, zt).rate(t)
        arrive = torch.where(candidates > 0, self.arrivals_at(zt, t) / candidates, 0.0)
        if bool(
            (arrive * (1.0 - self.noise_at(zt, t)) > self.noise_at(zt, t) * (1.0 + 1e-9)).any()
        ):
            raise ArgumentError(
                f"{type(self).__name__}.event: the arrivals rise by more than {SLACK - 1.0:.0%} within one of {CELLS} "
                "cells of logit time, so that candidate events are too few. Give it a smoother schedule, or use a sampler "
                "with steps."
            )
        return self._leave(query, zt, t, t, arrive, u)


def _log_mixed(noise: Tensor, alpha: Tensor, log_p: Tensor) -> Tensor:
    """[r] ln(b + alpha p); where no noise is ln alpha + ln p, since the mass of a word may underflow."""
    log_faded = alpha.log() + log_p
    return torch.where(
        noise > 0, torch.where(noise > 0, noise + log_faded.exp(), 1.0).log(), log_faded
    )


class _Words(torch.autograd.Function):
    """[r] sum over words y != x of b_y phi(alpha p_y / b_y), phi(v) = v - ln(1 + v), alpha p_y where b_y = 0; beside it
    ln p_x and ln p_z.

    By hand, since autograd would keep every step of it, and add up a gradient for each word that is read, at the width of
    the vocabulary: the derivative by ln p_y is b v^2 / (1 + v) with v = alpha p_y / b_y. log_p [r,V], alpha [r,1], noise
    [r,1] or [r,V], x0 and z [r] words.
    """

    @staticmethod
    def forward(
        ctx: Any, log_p: Tensor, alpha: Tensor, noise: Tensor, x0: Tensor, z: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        read = torch.stack([x0, z], -1)
        scale = noise.clamp(
            min=torch.finfo(noise.dtype).tiny
        )  # b phi(v) at b -> 0 is alpha p, and v stays finite
        gained = log_p.exp().mul_(alpha / scale)
        gained = gained.scatter_(-1, x0.unsqueeze(-1), 0.0)
        ctx.save_for_backward(gained, scale, read)
        lost = gained.log1p()
        each = torch.sub(gained, lost, out=lost)
        others = (
            (each.sum(-1, keepdim=True) * scale).squeeze(-1)
            if scale.shape[-1] == 1
            else (each * scale).sum(-1)
        )
        log_p_x, log_p_z = log_p.gather(-1, read).unbind(-1)
        return others, log_p_x, log_p_z

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_others: Tensor, d_x: Tensor, d_z: Tensor) -> tuple[Tensor | None, ...]:
        gained, scale, read = ctx.saved_tensors
        each = gained + 1.0
        each = torch.div(gained, each, out=each).mul_(gained).mul_(scale * d_others.unsqueeze(-1))
        return each.scatter_add_(-1, read, torch.stack([d_x, d_z], -1)), None, None, None, None


class _Cells:
    """Candidate events of rows in states zt [r]: in each cell of logit time they come at one rate per unit of logit t,
    above omega_t(z) (1 - b_t(z)) / b_t(z), which is above the true rate of leaving z whatever the network says."""

    def __init__(self, process: InterpolatingProcess, zt: Tensor) -> None:
        low, high = torch.logit(torch.tensor([EARLIEST, LATEST], dtype=torch.float64)).tolist()
        self.low, self.width = low, (high - low) / CELLS
        edges = low + self.width * torch.arange(CELLS + 1, dtype=torch.float64, device=zt.device)
        states, self.state = process.alike(zt).unique(return_inverse=True)
        t = torch.sigmoid(edges)
        noise, arrivals = process.noise_of(states, t), process.arrivals_of(states, t)
        hazard = torch.where(arrivals > 0, arrivals * (1.0 - noise) / noise, 0.0) * (
            t * (1.0 - t)
        ).unsqueeze(-1)
        self.rates = SLACK * torch.maximum(hazard[:-1], hazard[1:])  # [CELLS, states]
        self.total = torch.nn.functional.pad(
            self.rates.cumsum(0) * self.width, (0, 0, 1, 0)
        )  # from the lowest edge

    def _cell(self, t: Tensor) -> tuple[Tensor, Tensor]:
        """Each row's cell and how far into it the row is, in logit time."""
        depth = torch.logit(interior(t)) - self.low
        cell = (depth / self.width).long().clamp(0, CELLS - 1)
        return cell, depth - cell * self.width

    def rate(self, t: Tensor) -> Tensor:
        """[r] candidates per unit of t."""
        cell, _ = self._cell(t)
        return self.rates[cell, self.state] / (t * (1.0 - t))

    def next_time(self, t: Tensor, u: Tensor) -> Tensor:
        """[r] s with P(no candidate in (s,t]) = u; 0 where that is below the lowest cell."""
        cell, into = self._cell(t)
        goal = self.total[cell, self.state] + self.rates[cell, self.state] * into + u.log()
        low, high = torch.zeros_like(cell), cell
        for _ in range(CELLS.bit_length()):
            middle = (low + high + 1) // 2
            below = self.total[middle, self.state] <= goal
            low, high = (
                torch.where(below, middle, low),
                torch.where(below, high, (middle - 1).clamp(min=0)),
            )
        into = (goal - self.total[low, self.state]) / self.rates[low, self.state]
        s = torch.sigmoid(self.low + low * self.width + into)
        return torch.where((goal > 0) & (self.rates[low, self.state] > 0), torch.minimum(s, t), 0.0)


def _at(values: Callable[[Tensor], Tensor], zt: Tensor, t: Tensor) -> Tensor:
    """[r] values(t)[z_t] of a function t [n] -> [n,S], read once per distinct time."""
    distinct, place = t.unique(return_inverse=True)
    return values(distinct)[place, zt]


def _without_rounding(total: Tensor, faded: Tensor) -> Tensor:
    """total - faded, and exactly 0 where the two cancel."""
    difference = total - faded
    return torch.where(difference.abs() > ROUNDING * (total.abs() + faded.abs()), difference, 0.0)


class ComponentProcess(InterpolatingProcess):
    """Noise of a few fixed laws: b_t = sum_k c_k(t) nu_k, sum_k c_k = 1 - alpha. A subclass says alpha and c.

    `components` are laws nu_k [S] each (`mask_distribution`, `token_distribution`, any other). Nothing of width S is
    float64 but what an oracle asks for. What is declared
    of the ends (alpha(0) = 1, alpha(1) = 0) and the prior b_1/|b_1| are read off alpha
    and c, so a subclass sets what they need before `super().__init__`. Each component must arrive on its own:
    c_k' >= (alpha'/alpha) c_k.
    """

    def __init__(self, vocabulary: Vocabulary, components: Sequence[Tensor]) -> None:
        self.vocabulary = vocabulary
        self.components = torch.stack([_checked_law(self, vocabulary, dist) for dist in components])
        self._on = Constant(self.components).on
        words = self.components[:, : vocabulary.num_tokens]
        self._even = bool(
            (words == words[:, :1]).all()
        )  # then b_t is one number per row over the words
        clean, last = self.alpha(torch.tensor([0.0, 1.0], dtype=torch.float64)).tolist()
        self.closes_at_clean, self.closes_at_prior = (
            abs(1.0 - clean) < ROUNDING,
            abs(last) < ROUNDING,
        )
        noise = self.noise(torch.ones(1, dtype=torch.float64))[0]
        self.prior = Prior((noise / noise.sum()).log())

    @abstractmethod
    def coefficients(self, t: Tensor) -> Tensor:
        """[r,K] c_k(t) >= 0, the mass of each component."""

    def d_coefficients(self, t: Tensor) -> Tensor:
        """[r,K] by forward differentiation of `coefficients`; may be overridden."""
        return torch.func.jvp(self.coefficients, (t,), (torch.ones_like(t),))[1]

    def _flow(self, t: Tensor) -> Tensor:
        """[r,K] the rate at which each component arrives."""
        t = interior(t)
        fading = (self.d_alpha(t) / self.alpha(t)).unsqueeze(-1)
        return _without_rounding(self.d_coefficients(t), fading * self.coefficients(t))

    def noise(self, t: Tensor) -> Tensor:
        return self.coefficients(t) @ self._on(t.device)

    def d_noise(self, t: Tensor) -> Tensor:
        return self.d_coefficients(t) @ self._on(t.device)

    def arrivals(self, t: Tensor) -> Tensor:
        return self._flow(t) @ self._on(t.device)

    def noise_at(self, zt: Tensor, t: Tensor) -> Tensor:
        return (evaluate_per_time(self.coefficients, t) * self._on(zt.device).T[zt]).sum(-1)

    def arrivals_at(self, zt: Tensor, t: Tensor) -> Tensor:
        return (evaluate_per_time(self._flow, t) * self._on(zt.device).T[zt]).sum(-1)

    def _noise_elsewhere(self, zt: Tensor, t: Tensor) -> Tensor:
        return (evaluate_per_time(self.coefficients, t) * (1.0 - self._on(zt.device).T[zt])).sum(-1)

    def alike(self, zt: Tensor) -> Tensor:
        return self._first_alike.on(zt.device)[zt]

    @cached_property
    def _first_alike(self) -> Constant:
        """[S] the first state with the same share of every component."""
        _, kind = self.components.T.unique(dim=0, return_inverse=True)
        states = torch.arange(len(kind))
        return Constant(
            torch.full_like(kind, len(kind)).scatter_reduce(0, kind, states, "amin")[kind]
        )

    def _largest_arrivals(self, t: Tensor) -> Tensor:
        return self._flow(t).amax(0) @ self._on(t.device)

    def noise_of(self, states: Tensor, t: Tensor) -> Tensor:
        return self.coefficients(t) @ self._on(t.device)[:, states]

    def arrivals_of(self, states: Tensor, t: Tensor) -> Tensor:
        return self._flow(t) @ self._on(t.device)[:, states]

    def noise_like(self, log_p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        mass, components = (
            self.coefficients(t).to(log_p.dtype),
            self._on(log_p.device).to(log_p.dtype),
        )
        num_tokens = self.vocabulary.num_tokens
        words, beyond = components[:, : 1 if self._even else num_tokens], components[:, num_tokens:]
        return _weighted(mass, words), _weighted(mass, beyond)

    def _arrive_at(self, zt: Tensor, s: Tensor, t: Tensor) -> Tensor:
        return (self._arriving(s, t) * self._on(zt.device).T[zt]).sum(-1)

    def _arriving(self, s: Tensor, t: Tensor) -> Tensor:
        """[r,K] the mass of each component that arrives between s and t."""
        faded = self._stay(s, t).unsqueeze(-1) * self.coefficients(s)
        return _without_rounding(self.coefficients(t), faded).clamp(min=0.0)

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self._redraw(
            x0, evaluate_per_time(self.alpha, t), evaluate_per_time(self.coefficients, t), u
        )

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self._redraw(zs, self._stay(s, t), self._arriving(s, t), u)

    def _redraw(self, ids: Tensor, stay: Tensor, mass: Tensor, u: Tensor) -> Tensor:
        """Each row is kept with `stay`; the others draw a component by its mass [r,K], and a state from it."""
        drawn, lost = ids.clone(), (u[:, 0] >= stay).nonzero().squeeze(-1)
        share = mass[lost].cumsum(-1) / mass[lost].sum(-1, keepdim=True)
        which = draw_index(mass[lost], u[lost, 1])
        right = share.gather(-1, which.unsqueeze(-1)).squeeze(-1)
        left = torch.where(
            which > 0, share.gather(-1, (which - 1).clamp(min=0).unsqueeze(-1)).squeeze(-1), 0.0
        )
        # where in its component's cell the uniform lies is a uniform of its own
        rest = ((u[lost, 1] - left) / (right - left)).clamp(0.0, 1.0 - 2.0**-53)
        for k, component in enumerate(self._on(ids.device)):
            rows = which == k
            drawn[lost[rows]] = Prior(component.log()).draw(rest[rows])
        return drawn


def _weighted(mass: Tensor, dists: Tensor) -> Tensor:
    """[r,K], [K,n] -> [r,n] as a sum, since a matrix product may be rounded to fewer digits on an accelerator."""
    total = mass[:, :1] * dists[:1]
    for k in range(1, len(dists)):
        total = total + mass[:, k : k + 1] * dists[k : k + 1]
    return total


def mask_distribution(vocabulary: Vocabulary) -> Tensor:
    """[S] all of the noise is the mask."""
    if vocabulary.mask_id is None:
        raise ArgumentError(
            f"mask_distribution: vocabulary must have a mask; {vocabulary} has none. Use FlatVocabulary(mask=True)."
        )
    return torch.zeros(vocabulary.num_states, dtype=torch.float64).index_fill(
        0, torch.tensor([vocabulary.mask_id]), 1.0
    )


def token_distribution(vocabulary: Vocabulary) -> Tensor:
    """[S] the noise is uniform over the words."""
    beyond = vocabulary.num_states - vocabulary.num_tokens
    even = torch.full((vocabulary.num_tokens,), 1.0 / vocabulary.num_tokens, dtype=torch.float64)
    return torch.nn.functional.pad(even, (0, beyond))


def _checked_law(process: object, vocabulary: Vocabulary, dist: Tensor) -> Tensor:
    dist = dist.double()
    is_law = bool((dist >= 0).all()) and torch.isclose(dist.sum(), dist.new_ones(()))
    if dist.shape != (vocabulary.num_states,) or not is_law:
        raise ArgumentError(
            f"{type(process).__name__}: the noise must be a law over the {vocabulary.num_states} states, with no negative "
            f"entry and sum 1; got shape {tuple(dist.shape)}, smallest entry {float(dist.min()):.3g} and sum "
            f"{float(dist.sum()):.6g}."
        )
    return dist / dist.sum()


@final
class MixtureProcess(ComponentProcess):
    """Noise of one fixed law: b_t = (1 - alpha_t) target. A point at the mask is masked diffusion, 1/V uniform diffusion.

    `target` [S] sums to 1 and is the prior where the schedule closes.
    """

    def __init__(self, vocabulary: Vocabulary, schedule: Schedule, target: Tensor) -> None:
        self.schedule = schedule
        super().__init__(vocabulary, [target])
        self.target = self.components[0]
        self.closes_at_clean, self.closes_at_prior = (
            schedule.closes_at_clean,
            schedule.closes_at_prior,
        )

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.schedule.d_alpha(t)

    def coefficients(self, t: Tensor) -> Tensor:
        return self.schedule.one_minus_alpha(t).unsqueeze(-1)

    def d_coefficients(self, t: Tensor) -> Tensor:
        return -self.schedule.d_alpha(t).unsqueeze(-1)

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        masked, bare = FlatVocabulary(4), FlatVocabulary(4, mask=False)
        uneven = torch.tensor([0.4, 0.3, 0.2, 0.1])
        return [
            cls(masked, LinearSchedule(), mask_distribution(masked)),
            cls(bare, LinearSchedule(), token_distribution(bare)),
            cls(bare, LinearSchedule(floor=0.01), uneven),
        ]
