"""Interpolating family: the clean token is mixed with noise that does not depend on the token.

    q_t(.|x) = alpha_t delta_x + b_t

alpha_t is the probability that the token is clean and was never redrawn. The noise b_t is a vector
over the states with sum 1 - alpha_t. The forward chain jumps from any state into state z at the
arrival rate

    omega_t(z) = b_t'(z) - (alpha'/alpha) b_t(z) >= 0.

Let q_t-bar = alpha_t p + b_t be the marginal for a predicted distribution p of the token. The
integrand of the bound then has the closed form (arXiv 2503.04482, written with reverse rates)

    density = (omega_t(z) / q_t(z|x)) [ KL( q_t(.|x) || q_t-bar ) + rho - 1 - ln rho ],
    rho     = q_t(z|x) / q_t-bar(z).

In code, `mismatch` is the bracket. `weight` is omega_t(z) (1 - q_t(z|x)) / q_t(z|x), the total rate
at which the reversed chain leaves z given the true token. `divergence` is density / weight =
mismatch / (1 - q_t(z|x)).

Masked diffusion, uniform diffusion and mixtures of the two belong to this family. The reversed
chain leaves z at the rate omega_t(z) (1 - q_t-bar(z)) / q_t-bar(z), for a state y != z drawn from
q_t-bar. Since q_t-bar >= b_t, replacing q_t-bar by b_t gives an upper bound of this rate that needs
no network. Only rows that may move under the upper bound are queried (thinning).
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable
from functools import cached_property

import torch
from torch import Tensor

from ddiff.core.candidate_events import MAX_RISE, NUM_CELLS, CandidateEvents
from ddiff.core.kernel import InterpolatingKernel, Kernel
from ddiff.core.numerics import (
    EARLIEST,
    FLOOR,
    LATEST,
    Constant,
    draw_index,
    find_rows,
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
from ddiff.core.process import ForwardProcess, Query
from ddiff.core.token_divergence import TokenDivergence
from ddiff.errors import ArgumentError

# A relative difference of noise below this number is the rounding error of an exact 0.
ROUNDING = 1e-12

# Number of times, evenly spaced in logit t, at which `_reached` checks the arrival rates.
REACHED_TIMES = 129


class InterpolatingProcess(ForwardProcess):
    """Process with the marginals q_t(.|x) = alpha_t delta_x + b_t.

    The noise b_t, a vector over the states with sum 1 - alpha_t, does not depend on the token x.
    A subclass defines `alpha` (alpha_t), `noise` (b_t), `vocabulary` and `prior`. If alpha_1 = 0,
    the prior is b_1, normalized. Rates divide by b_t, so b_t must keep its relative accuracy near t
    = 0. For example, compute t^2 nu for a distribution nu, and not (1 - alpha_t) nu, which float64
    rounds to 0 near t = 0. `ComponentProcess` has cheaper formulas for noise that mixes a few fixed
    distributions.
    """

    uniforms_per_sample = 2
    uniforms_per_step = 2
    uniforms_per_decode = 2
    uniforms_per_forward_step = 2
    uniforms_per_event = 2
    has_events = True

    @abstractmethod
    def alpha(self, t: Tensor) -> Tensor:
        """Return alpha_t [r], the probability that the token is clean and was never redrawn."""

    @abstractmethod
    def noise(self, t: Tensor) -> Tensor:
        """Return the noise b_t [r,S]; each row sums to 1 - alpha_t."""

    def keep_probability(self, t: Tensor) -> Tensor:
        return self.alpha(t)

    def d_alpha(self, t: Tensor) -> Tensor:
        """Return d alpha_t / dt [r], by forward-mode differentiation of `alpha`.

        A subclass may override this method with a closed form.
        """
        ones = torch.ones_like(t)
        return torch.func.jvp(self.alpha, (t,), (ones,))[1]

    def d_noise(self, t: Tensor) -> Tensor:
        """Return the derivative by t of the noise b_t [r,S], by forward-mode autograd of `noise`.

        A subclass may override this method with a closed form.
        """
        ones = torch.ones_like(t)
        return torch.func.jvp(self.noise, (t,), (ones,))[1]

    def arrivals(self, t: Tensor) -> Tensor:
        """Return the arrival rates omega_t(z) [r,S] into each state z from any other state."""
        t = interior(t)
        log_decay = (self.d_alpha(t) / self.alpha(t)).unsqueeze(-1)
        return subtract_or_zero(self.d_noise(t), log_decay * self.noise(t))

    # ------------------------------------------------------------------ noise at some states only

    def noise_at(self, zt: Tensor, t: Tensor) -> Tensor:
        """Return b_t(z_t) [r], the part of q_t(z_t|x) that does not depend on the token x."""
        return _gather_at_times(self.noise, zt, t)

    def arrivals_at(self, zt: Tensor, t: Tensor) -> Tensor:
        """Return the rate omega_t(z_t) [r] of forward jumps from any other state into z_t."""
        return _gather_at_times(self.arrivals, zt, t)

    def split_noise(self, log_p: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """Return the noise b_t on the V tokens, and b_t on the other states [r,S-V].

        The first tensor is [r,V], or [r,1] if all tokens have the same noise. b_t(y) is the part of
        q_t(y|x) that does not depend on the token x. Both tensors have the dtype of `log_p`.
        """
        times, time_index = t.unique(return_inverse=True)
        noise = self.noise(times).to(log_p.dtype)[time_index]
        num_tokens = self.vocabulary.num_tokens
        return noise[:, :num_tokens], noise[:, num_tokens:]

    def representative(self, zt: Tensor) -> Tensor:
        """Return for each row a state y [r] whose noise equals that of z_t at all times.

        Many states may share one representative. Tables of noise have entries for representatives
        only.
        """
        return zt

    def noise_table(self, states: Tensor, t: Tensor) -> Tensor:
        """Return the noise b_t(y) [n,m] of states y [m] at times t [n].

        b_t(y) is the part of q_t(y|x) that does not depend on the token x.
        """
        # The table is made in chunks, since the noise of all states at all times is too large.
        chunks = [self.noise(chunk)[:, states] for chunk in t.split(64)]
        return torch.cat(chunks)

    def arrivals_table(self, states: Tensor, t: Tensor) -> Tensor:
        """Return the arrival rates omega_t(y) [n,m] into states y [m] at times t [n].

        omega_t(y) is the rate at which the forward chain jumps from any other state into y.
        """
        chunks = [self.arrivals(chunk)[:, states] for chunk in t.split(64)]
        return torch.cat(chunks)

    def _noise_elsewhere(self, zt: Tensor, t: Tensor) -> Tensor:
        """Return the sum [r] of b_t(y) over all states y != z_t.

        b_t(y) is the part of q_t(y|x) that does not depend on the token x.
        """
        return _gather_at_times(self._noise_of_others, zt, t)

    def _noise_of_others(self, t: Tensor) -> Tensor:
        noise = self.noise(t)
        return noise.sum(-1, keepdim=True) - noise

    def _arrive_at(self, zt: Tensor, s: Tensor, t: Tensor) -> Tensor:
        """Return the probability P(z_t | z_s = y) [r] of arriving in z_t from another state.

        The probability is the same for every state y != z_t.
        """
        kept = self._stay(s, t) * self.noise_at(zt, s)
        return subtract_or_zero(self.noise_at(zt, t), kept).clamp(min=0.0)

    def _stay(self, s: Tensor, t: Tensor) -> Tensor:
        """Return alpha_t / alpha_s [r], the probability that no redraw occurs between s and t."""
        alpha_s = self.alpha(s)
        ratio = self.alpha(t) / alpha_s
        return torch.where(alpha_s > 0, ratio, torch.ones_like(t))

    # ------------------------------------------------------------------ forward

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        at_tokens, beyond = self.split_noise(log_p, t)
        tokens = to_column(self.alpha(t), log_p) * log_p.exp() + at_tokens
        return safe_log(torch.cat([tokens, beyond], -1))

    def rates(self, t: Tensor) -> Kernel:
        arrive = self.arrivals(t)
        return InterpolatingKernel(-arrive.sum(-1), arrive)

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        """Return the transition from s to t: alpha_ts I + 1 (b_t - alpha_ts b_s)^T.

        alpha_ts = alpha_t / alpha_s is the probability of no redraw, b_t the noise, and 1 the
        vector of ones.
        """
        stay = self._stay(s, t)
        arrive = self.noise(t) - stay.unsqueeze(-1) * self.noise(s)
        return InterpolatingKernel(stay, arrive.clamp(min=0.0))

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw z_t: keep x0 with probability alpha_t, otherwise draw a state in proportion to b_t.

        The vector b_t over the states is the noise at time t (`noise`).
        """
        zt = x0.clone()
        redrawn = find_rows(u[:, 0] >= self.alpha(t))
        # Noise is drawn only for the redrawn rows, since b_0 may be 0 and cannot be drawn from.
        noise = self.noise(t[redrawn])
        zt[redrawn] = draw_index(noise, u[redrawn, 1])
        return zt

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw z_t given z_s, for s <= t, from uniforms u [r,2].

        The state is kept with probability alpha_ts = alpha_t / alpha_s, and otherwise drawn in
        proportion to b_t - alpha_ts b_s. Here b_t is the noise: q_t(.|x) = alpha_t delta_x + b_t.
        """
        zt = zs.clone()
        stay = self._stay(s, t)
        redrawn = find_rows(u[:, 0] >= stay)
        kept = stay[redrawn].unsqueeze(-1) * self.noise(s[redrawn])
        arrive = self.noise(t[redrawn]) - kept
        zt[redrawn] = draw_index(arrive.clamp(min=0.0), u[redrawn, 1])
        return zt

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        noise = self.noise_at(zt, t).unsqueeze(-1)
        tokens = torch.arange(self.vocabulary.num_tokens, device=zt.device)
        is_zt = tokens == zt.unsqueeze(-1)
        clean = torch.where(is_zt, self.alpha(t).unsqueeze(-1), 0.0)
        return (noise + clean).log()

    def from_clean(self, t: Tensor) -> Kernel:
        """Return the operator alpha_t I + 1 b_t^T from the clean token to z_t.

        b_t is the part of q_t(.|x) that does not depend on x, and 1 is the vector of ones.
        """
        return InterpolatingKernel(self.alpha(t), self.noise(t))

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        return self._likelihood(x0, x0, t)

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        """Return the log of the distribution p = (s / |s| - b_t) / alpha_t of the token, [r,V].

        s is the score (relative probabilities of the states), |s| the sum of s over the states, and
        b_t the part of q_t(.|x) that does not depend on the token x. The formula inverts q_t-bar =
        alpha_t p + b_t with q_t-bar = s / |s|. Up to normalization, p is s times the factor
        1 - b_t |s| / s. The factor is raised to at least 1e-14. If a score near t = 1 contains only
        noise, p is therefore proportional to s on the tokens.
        """
        num_tokens = self.vocabulary.num_tokens
        log_s = score.log_ratio.double().log_softmax(-1)[:, :num_tokens]
        noise, _ = self.split_noise(log_s, self.clamp_score_time(t))
        possible = log_s > -torch.inf
        log_s = where_or_zero(possible, log_s)
        # The factor 1 - b |s| / s, from logs: expm1 keeps the digits of a small signal.
        signal = -torch.expm1(noise.log() - log_s)
        log_p = log_s + signal.clamp(min=FLOOR).log()
        return log_normalize(torch.where(possible, log_p, -torch.inf))

    # ------------------------------------------------------------------ the bound

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return the rate [r] at which the reversed chain leaves z_t if the token is known.

        For z = z_t and x = x0, the rate is omega_t(z) (1 - q_t(z|x)) / q_t(z|x), where omega_t is
        the arrival rate. If q_t(z|x) = 1, the rate is 0, but the integrand of the bound (`density`)
        may be positive, since tokens other than x could have become z. The weight is then 1 if the
        chain can jump into z, else 0.
        """
        t = interior(t)
        arrive = self.arrivals_at(zt, t)
        elsewhere = self._elsewhere(x0, zt, t)
        rate = arrive * (elsewhere / self._likelihood(x0, zt, t))
        # With a single state no jump exists, so the weight is 0.
        rate_if_certain = 0.0 if self.vocabulary.num_states == 1 else 1.0
        weight = torch.where(elsewhere > 0, rate, rate_if_certain)
        return torch.where(arrive > 0, weight, 0.0)

    def divergence(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return density / weight = mismatch / (1 - q_t(z|x)) per row [r], for z = z_t and x = x0.

        The density is the integrand of the bound; the module's docstring defines weight and
        mismatch. If q_t(z|x) = 1, `weight` returns 1, so the divergence is the density. The
        divergence is 0 if the chain never jumps into z.
        """
        inner = interior(t)
        elsewhere = self._elsewhere(x0, zt, inner)
        arrive = self.arrivals_at(zt, inner)
        if_certain = arrive / self._likelihood(x0, zt, inner)
        inverse = 1.0 / torch.where(elsewhere > 0, elsewhere, 1.0)
        scale = torch.where(elsewhere > 0, inverse, if_certain)
        mismatch = self.mismatch(prediction, x0, zt, t)
        return mismatch * torch.where(arrive > 0, scale, 1.0)

    def mismatch(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        """Return KL( q_t(.|x) || q_t-bar ) + rho - 1 - ln rho per row [r].

        q_t(.|x) is the true marginal for x = x0, and q_t-bar = alpha_t p + b_t the marginal for the
        predicted distribution p. rho = q_t(z|x) / q_t-bar(z) for z = z_t. Published losses multiply
        the mismatch by their weights. The mismatch is 0 if the chain never jumps into z_t.

        For a score s_theta, the mismatch is the generalized KL divergence between q(y) = q_t(y|x)
        and m(y) = q_t(z|x) s_theta(y),

            sum_{y != z} [ q(y) ln( q(y) / m(y) ) - q(y) + m(y) ].

        The sum is computed in the dtype of the score.
        """
        t = interior(t)
        arrives = self.arrivals_at(zt, t) > 0
        if isinstance(prediction, Score):
            return torch.where(arrives, self._mismatch_of_score(prediction, x0, zt, t), 0.0)
        others, log_p_x, log_p_z = self._read_prediction(prediction, x0, zt, t)
        # Rows into whose state the chain never jumps are dropped. Both terms would be infinite
        # there if the prediction gives the token probability 0.
        log_marginal = self._log_marginal_at(where_or_zero(arrives, log_p_z), zt, t)
        log_rho = self._likelihood(x0, zt, t).log() - log_marginal
        kl = self._kl(others, where_or_zero(arrives, log_p_x), x0, t)
        mismatch = kl + torch.expm1(log_rho) - log_rho
        return torch.where(arrives, mismatch, 0.0)

    def density(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        return self._weighted_divergence(prediction, x0, zt, t)

    def decode_nll(
        self,
        prediction: Prediction,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        if isinstance(prediction, Score):
            return super().decode_nll(prediction, x0, zt, t)
        evidence = self._likelihood(x0, zt, t).log()
        # If b_t(z_t) = 0 and z_t = x0, the posterior of x0 is 1 for every prediction.
        certain = (self.noise_at(zt, t) == 0) & (zt == x0)
        log_p_z = where_or_zero(~certain, prediction.log_prob(self._token_or_first(zt)))
        log_p_x = where_or_zero(~certain, prediction.log_prob(x0))
        nll = self._log_marginal_at(log_p_z, zt, t) - log_p_x - evidence
        return torch.where(certain, 0.0, nll)

    def closing_kl(self, prediction: Prediction, x0: Tensor, t: Tensor) -> Tensor:
        if isinstance(prediction, Score):
            return super().closing_kl(prediction, x0, t)
        others, log_p_x, _ = self._read_prediction(prediction, x0, x0, t)
        return self._kl(others, log_p_x, x0, t)

    def reverse_rates(self, prediction: Prediction, zt: Tensor, t: Tensor) -> Tensor:
        ratio = self._log_ratio(prediction, zt, interior(t)).exp()
        arrive = to_column(self.arrivals_at(zt, t), ratio)
        rates = torch.where(arrive > 0, arrive * ratio, 0.0)
        return rates.scatter(-1, zt.unsqueeze(-1), 0.0)

    def _read_prediction(
        self,
        dist: CleanDistribution,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Compute from the predicted distribution p three tensors [r] that the bound uses.

        1. The sum over the tokens y != x0 of b_y phi(alpha p_y / b_y), as defined in `_kl`.
        2. ln p(x0).
        3. ln p(z_t), or an arbitrary number if z_t is not a token.
        """
        log_p = dist.log_mass(0)
        noise, _ = self.split_noise(log_p, t)
        alpha = to_column(self.alpha(t), log_p)
        return TokenDivergence.apply(log_p, alpha, noise, x0, self._token_or_first(zt))

    def _kl(self, others: Tensor, log_p_x: Tensor, x0: Tensor, t: Tensor) -> Tensor:
        """Return KL( q_t(.|x) || q_t-bar ) per row [r], where q_t-bar = alpha_t p + b_t.

        Let phi(v) = v - ln(1 + v), q_x = q_t(x|x) and delta = alpha (1 - p_x) / q_x. Then the KL is
        q_x phi(-delta) + sum_{y != x} b_y phi(alpha p_y / b_y). A term with b_y = 0 is alpha p_y.

        Args:
            others: [r] the sum over y != x in this formula.
            log_p_x: [r] ln p(x) of the token x = x0.
        """
        alpha = self.alpha(t)
        truth = self._likelihood(x0, x0, t)
        noise = self.noise_at(x0, t)
        possible = truth > 0
        truth = torch.where(possible, truth, 1.0)
        delta = torch.where(possible, -alpha * torch.expm1(log_p_x) / truth, 0.0)
        # 1 - delta equals q_t-bar(x) / q_x. Its logarithm is computed by log1p for small delta, and
        # as a difference of logarithms for delta near 1, where log1p loses accuracy.
        mixed = _log_mixture(noise, alpha, where_or_zero(possible, log_p_x))
        log_rest = torch.where(
            delta < 0.5,
            torch.log1p(-delta.clamp(max=0.5)),
            mixed - truth.log(),
        )
        own = torch.where(possible, -truth * (delta + log_rest), 0.0)
        return own + others

    def _mismatch_of_score(
        self,
        score: Score,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        log_ratio = score.log_ratio
        own = x0.unsqueeze(-1)
        at_tokens, beyond = self.split_noise(log_ratio, t)
        at_tokens = at_tokens.expand(-1, self.vocabulary.num_tokens)
        q = torch.cat([at_tokens, beyond], -1)
        clean = to_column(self.alpha(t), q)
        q = q.scatter(-1, own, q.gather(-1, own) + clean)
        log_here = self._likelihood(x0, zt, t).log()
        log_model = log_ratio + to_column(log_here, log_ratio)
        cross = torch.where(q > 0, q * (q.log() - log_model), 0.0)
        terms = log_model.exp() - q + cross
        others = terms.scatter(-1, zt.unsqueeze(-1), 0.0)
        return others.sum(-1).double()

    def _token_or_first(self, zt: Tensor) -> Tensor:
        """Return z_t per row if it is a token, else token 0."""
        return torch.where(zt < self.vocabulary.num_tokens, zt, 0)

    def _log_marginal_at(self, log_p_z: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return ln q_t-bar(z_t) [r] = ln( alpha_t p(z_t) + b_t(z_t) ), from ln p(z_t) [r].

        If b_t(z_t) = 0, the sum ln alpha_t + ln p(z_t) is used, since p(z_t) may underflow.
        """
        noise = self.noise_at(zt, t)
        is_token = zt < self.vocabulary.num_tokens
        mixed = _log_mixture(noise, self.alpha(t), log_p_z)
        log_noise = torch.where(noise > 0, noise, 1.0).log()
        return torch.where(is_token | (noise == 0), mixed, log_noise)

    def _likelihood(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return the probability q_t(z_t|x0) of the state of each row given its token, [r]."""
        clean = torch.where(zt == x0, self.alpha(t), 0.0)
        return self.noise_at(zt, t) + clean

    def _elsewhere(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return 1 - q_t(z|x) [r] without cancellation, for z = z_t and x = x0.

        The sum of the noise b_t(y) over the states y != z, plus alpha_t if z is not x, keeps its
        relative accuracy.
        """
        clean = torch.where(zt == x0, 0.0, self.alpha(t))
        return self._noise_elsewhere(zt, t) + clean

    # ------------------------------------------------------------------ information

    def information(self, t: Tensor) -> Tensor:
        """Return I(X; Z_t) [n] in nats at times t [n], for X uniform over the tokens.

        The value is the mean over tokens x of KL( q_t(.|x) || mean of q_t over the tokens ). Tokens
        with the same noise have the same KL, which is computed once.
        """
        num_tokens = self.vocabulary.num_tokens
        tokens, counts = self._token_representatives()
        alpha = self.alpha(t).unsqueeze(-1)
        noise = self.noise_table(tokens, t)
        # Terms of `_kl` with p = 1/V at every token.
        gained = torch.where(noise > 0, alpha / (num_tokens * noise), 0.0)
        phi = gained - gained.log1p()
        other = torch.where(noise > 0, noise * phi, alpha / num_tokens)
        truth = alpha + noise
        delta = torch.where(truth > 0, alpha * (1.0 - 1.0 / num_tokens) / truth, 0.0)
        log_rest = torch.log1p(-delta)
        own = torch.where(truth > 0, -truth * (delta + log_rest), 0.0)
        share = counts.to(t.dtype) / num_tokens
        all_others = (counts * other).sum(-1, keepdim=True)
        return ((own - other + all_others) * share).sum(-1)

    def change_probability(self, t: Tensor) -> Tensor:
        tokens, counts = self._token_representatives()
        noise = (self.noise_table(tokens, t) * counts).sum(-1)
        kept = self.alpha(t) + noise / self.vocabulary.num_tokens
        return (1.0 - kept).clamp(min=0.0)

    def _token_representatives(self) -> tuple[Tensor, Tensor]:
        """Return one representative of each group of tokens with equal noise, and the group sizes.

        Both results are tensors [m] for m groups. Tokens of a group have the same noise at all
        times.
        """
        tokens = torch.arange(self.vocabulary.num_tokens)
        return self.representative(tokens).unique(return_counts=True)

    # ------------------------------------------------------------------ reachable states

    def active(self, zt: Tensor) -> Tensor:
        """Return for each row whether its state z_t can add to the bound, bool [r].

        The chain can jump into such a state. In other states, the integrand of the bound is 0.
        """
        return self._reached.on(zt.device)[zt]

    @property
    def is_monotone(self) -> bool:
        """True if the forward chain jumps only into the mask.

        Sampling then never changes a revealed token.
        """
        reached = self._reached.on(torch.device("cpu"))
        return not bool(reached[: self.vocabulary.root].any())

    @cached_property
    def _reached(self) -> Constant:
        """Whether the forward chain can jump into each state at some time, bool [S].

        The arrival rates are checked at REACHED_TIMES times, since a rate may be 0 at a single
        time.
        """
        ends = torch.tensor([EARLIEST, LATEST], dtype=torch.float64)
        low, high = torch.logit(ends).tolist()
        logit_times = torch.linspace(low, high, REACHED_TIMES, dtype=torch.float64)
        return Constant(self._largest_arrivals(torch.sigmoid(logit_times)) > 0)

    def _largest_arrivals(self, t: Tensor) -> Tensor:
        """Return a tensor [S] with the largest arrival rate of each state over the times t [n].

        The arrival rate of a state is the rate of jumps from any other state into this state.
        """
        largest = self.arrivals(t[:1])[0]
        for chunk in t.split(8):
            largest = torch.maximum(largest, self.arrivals(chunk).amax(0))
        return largest

    # ------------------------------------------------------------------ reverse

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Draw z_s from the exact reverse transition, given z_t.

        For z = z_t and every state y != z, the reverse transition is

            P(z_s != z | z_t = z) = arrive(z) (1 - q_s-bar(z)) / q_t-bar(z),
            P(z_s = y | z_t = z)  = arrive(z) q_s-bar(y) / q_t-bar(z).

        q_s-bar = alpha_s p + b_s and q_t-bar = alpha_t p + b_t are the marginals at times s and t
        if the token has the predicted distribution p. arrive(z) = P(z_t = z | z_s = y) is the
        probability that the forward chain jumps from y to z; it is the same for every y != z.

        Args:
            query: query of the network (`Query`). It is called only for rows that may move.
            zt: [r] states at time t.
            t: [r] times of zt.
            s: [r] times of the drawn states, s <= t.
            u: [r,2] uniforms. u[:,0] decides whether a row moves, u[:,1] selects its new state.
        """
        arrive = self._arrive_at(zt, s, t)
        return self._leave(query, zt, t, s, arrive, u)

    def _leave(
        self,
        query: Query,
        zt: Tensor,
        t: Tensor,
        s: Tensor,
        arrive: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Leave z = z_t with probability arrive (1 - q_s-bar(z)) / q_t-bar(z), else keep z.

        q_s-bar = alpha_s p + b_s and q_t-bar = alpha_t p + b_t are the marginals at times s and t
        if the token has the predicted distribution p. A row that leaves z moves to a state y != z
        with probability q_s-bar(y) / (1 - q_s-bar(z)).

        Since q-bar >= b, the probability of leaving is at most arrive (1 - b_s(z)) / b_t(z). This
        upper bound needs no network. The network is queried only at rows with u[:,0] below it.

        Args:
            arrive: [r] in a step, the probability of arriving in z between s and t; at an event,
                the arrival rate into z divided by the candidate rate.
            u: [r,2] uniforms. u[:,0] decides whether a row leaves z, u[:,1] selects its new state.
        """
        noise_s = self.noise_at(zt, s)
        noise_t = self.noise_at(zt, t)
        # The upper bound is compared before the network runs, so that most rows of a short step
        # need no network evaluation.
        bound = torch.where(arrive > 0, arrive * (1.0 - noise_s) / noise_t, 0.0)
        candidates = find_rows(u[:, 0] < bound)
        return self._replace_rows(query, candidates, self._thin_and_draw, zt, t, s, arrive, u)

    def _thin_and_draw(
        self,
        prediction: Prediction,
        zt: Tensor,
        t: Tensor,
        s: Tensor,
        arrive: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Decide which candidate rows leave their state z, and draw the new states.

        The arguments are those of `_leave`, for the rows that it queries (the candidates). A
        candidate leaves z if u[:,0] is below the exact probability under the prediction. Other
        candidates keep z.
        """
        dist = require_distribution(prediction, "InterpolatingProcess.step")
        marginal = self.log_marginal(dist.log_mass(0), s).exp()
        elsewhere = marginal.scatter(-1, zt.unsqueeze(-1), 0.0)
        total = elsewhere.double().sum(-1)
        # If the prediction gives z probability 1, no other state is possible, and z is drawn.
        no_mass = to_column(total == 0, elsewhere)
        weights = elsewhere.scatter(-1, zt.unsqueeze(-1), no_mass)
        drawn = draw_index(weights, u[:, 1])
        log_here = self._log_marginal_at(dist.log_prob(self._token_or_first(zt)), zt, t)
        leave_probability = arrive * total / log_here.double().exp()
        return torch.where(u[:, 0] < leave_probability, drawn, zt)

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw the clean token: keep z_t or draw from the predicted distribution p.

        z_t is kept with probability alpha_t p(z_t) / (alpha_t p(z_t) + b_t(z_t)), the probability
        that it is the clean token. Here b_t is the noise, the part of the marginal that does not
        depend on the clean token. Otherwise z_t was redrawn and carries no information on the
        token, so the token is drawn from p.
        """
        if self.closes_at_clean and bool((t == 0.0).all()):
            return zt.clone()
        noise = self.noise_at(zt, t)
        is_token = zt < self.vocabulary.num_tokens
        uncertain = find_rows(~is_token | (noise > 0))
        draw = self._keep_or_draw_token
        return self._replace_rows(query, uncertain, draw, zt, t, noise, is_token, u)

    def _keep_or_draw_token(
        self,
        prediction: Prediction,
        zt: Tensor,
        t: Tensor,
        noise: Tensor,
        is_token: Tensor,
        u: Tensor,
    ) -> Tensor:
        if isinstance(prediction, Score):
            prediction = DenseDistribution(self.tweedie(prediction, t), self.vocabulary)
        log_prob = prediction.log_prob(torch.where(is_token, zt, 0))
        clean = self.alpha(t) * log_prob.double().exp()
        keep_probability = torch.where(is_token, clean / (clean + noise), 0.0)
        root = torch.full_like(zt, self.vocabulary.root)
        drawn = prediction.draw(root, torch.zeros_like(zt), u[:, 1])
        return torch.where(u[:, 0] < keep_probability, zt, drawn)

    # ------------------------------------------------------------------ events

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw for each row the time of its latest candidate event before t (`CandidateEvents`)."""
        return CandidateEvents(self, zt).next_time(t, u)

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Accept a candidate event with probability (rate of leaving z_t) / (candidate rate).

        If the event is accepted, the position moves to a state y != z_t, with probabilities
        proportional to q_t-bar(y). Otherwise the position keeps z_t. q_t-bar = alpha_t p + b_t is
        the marginal if the token has the predicted distribution p.

        Args:
            query: query of the network (`Query`). It is called only for rows that may move.
            zt: [r] states before the event.
            t: [r] times of the events, drawn by `event_time`.
            u: [r,2] uniforms. u[:,0] decides whether the event is accepted, u[:,1] selects the new
                state.
        """
        t = interior(t)
        candidates = CandidateEvents(self, zt).rate(t)
        arrive = torch.where(candidates > 0, self.arrivals_at(zt, t) / candidates, 0.0)
        noise = self.noise_at(zt, t)
        exceeds_bound = arrive * (1.0 - noise) > noise * (1.0 + 1e-9)
        if bool(exceeds_bound.any()):
            raise ArgumentError(
                f"{type(self).__name__}.event: the arrival rates rise by more than "
                f"{MAX_RISE - 1.0:.0%} within one of {NUM_CELLS} cells of logit t, so that "
                "candidate events are too few. Give the process a smoother schedule, or use a "
                "sampler with steps."
            )
        return self._leave(query, zt, t, t, arrive, u)


def subtract_or_zero(total: Tensor, part: Tensor) -> Tensor:
    """Return total - part, and exactly 0 if the difference is only a rounding error."""
    difference = total - part
    is_significant = difference.abs() > ROUNDING * (total.abs() + part.abs())
    return torch.where(is_significant, difference, 0.0)


def _log_mixture(noise: Tensor, alpha: Tensor, log_p: Tensor) -> Tensor:
    """Return ln(b + alpha p) per row [r], where b is `noise` and ln p is `log_p`.

    If b = 0, the sum ln alpha + ln p is used, since p of a token may underflow.
    """
    log_clean = alpha.log() + log_p
    mixture = torch.where(noise > 0, noise + log_clean.exp(), 1.0)
    return torch.where(noise > 0, mixture.log(), log_clean)


def _gather_at_times(values: Callable[[Tensor], Tensor], zt: Tensor, t: Tensor) -> Tensor:
    """Return for each row the entry z_t of the vector values(t).

    `values` maps times [n] to vectors [n,S], and is evaluated once per distinct time.
    """
    times, time_index = t.unique(return_inverse=True)
    return values(times)[time_index, zt]
