"""Gamma-hybrid: tokens are redrawn at one rate and masked at another (arXiv 2504.06416).

The generator is Q_t = sigma'(t) [ (1 - gamma) Q_absorb + gamma Q_uniform ], where sigma(t) is the
total noise up to time t. Q_absorb moves tokens to the mask, Q_uniform redraws them uniformly. The
two generators commute, so that masking and redrawing are independent:

    A_t = e^{-(1 - gamma) sigma}    probability that a position is not masked until t
    B_t = e^{-gamma sigma}          probability that the token was not redrawn until t

Notation: V is the number of tokens, x the clean token, z the state at time t, and p the predicted
distribution of x. If a position is not masked, its token y at time t has the distribution r_t:

    r_t(y|x) = B_t 1[y = x] + (1 - B_t)/V    if the clean token is x
    r_t(y|p) = B_t p(y) + (1 - B_t)/V        if the clean token is drawn from p

Formulas, in which A' and B' are derivatives with respect to t:

    marginal         q_t(.|x) = A r_t(.|x) + (1 - A) delta_mask
    bound, z = mask  (-A'/(1 - A)) KL( r_t(.|x) || r_t(.|p) )
    bound, z token   (-B'/(V B r_t(z|x))) [ KL( r_t(.|x) || r_t(.|p) ) + rho - 1 - ln rho ],
                     where rho = r_t(z|x)/r_t(z|p)
    reverse step     a mask stays with probability (1 - A_s)/(1 - A_t), else becomes y ~ r_s(.|p);
                     tokens move as in uniform diffusion

The lines "bound" are the integrand of the NELBO, which is an integral over t.

An interpolating process (`InterpolatingProcess`) can have the same marginals, but other rates and
transitions: in this module a mask never changes in the forward process.
"""

from __future__ import annotations

from typing import Annotated, Any, ClassVar, Literal, final

import torch
from pydantic import Field, model_validator
from torch import Tensor

from ddiff import (
    ArgumentError,
    CleanDistribution,
    ComponentConfig,
    DenseDistribution,
    FlatVocabulary,
    ForwardProcess,
    Kernel,
    LinearSchedule,
    MixtureProcess,
    Prior,
    Query,
    Schedule,
    Score,
    TrainedPart,
    Vocabulary,
    interior,
    token_distribution,
)

from .epsilon import require_tokens_and_mask
from .kernel import RedrawKernel

# Above this gamma redrawing is over 19 times as fast as masking, and B_t is too small for float64
# before the last token is masked.
MAX_GAMMA = 0.95
# Smallest masking rate in units of 1/(1 - t). At 0.3 one token in 4000 is still visible at the
# last time that float64 distinguishes from 1. At smaller rates the bound would miss too many masks.
MIN_MASKING = 0.3
PUBLISHED_FLOOR = 0.005

Gamma = Annotated[float, Field(ge=0.0, le=MAX_GAMMA)]


@final
class PowerOf(Schedule):
    """Schedule alpha_t^power, where alpha_t is another schedule and power >= 0."""

    def __init__(self, schedule: Schedule, power: float) -> None:
        self.schedule = schedule
        self.power = power
        self.closes_at_clean = schedule.closes_at_clean
        self.closes_at_prior = schedule.closes_at_prior and power > 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(t) ** self.power

    def d_alpha(self, t: Tensor) -> Tensor:
        outer = self.power * self.schedule.alpha(t) ** (self.power - 1.0)
        return outer * self.schedule.d_alpha(t)

    def one_minus_alpha(self, t: Tensor) -> Tensor:
        return -torch.expm1(self.log_alpha(t))

    def log_alpha(self, t: Tensor) -> Tensor:
        """Return the logarithm [r] of `alpha`, accurate for values near 1 and near 0."""
        alpha = self.schedule.alpha(t)
        power = torch.full_like(t, self.power)
        # xlogy and xlog1py are 0 for power 0, even if the logarithm is infinite.
        near_one = torch.special.xlog1py(power, -self.schedule.one_minus_alpha(t))
        near_zero = torch.special.xlogy(power, alpha)
        return torch.where(alpha > 0.5, near_one, near_zero)

    def lost(self, s: Tensor, t: Tensor) -> Tensor:
        """Return 1 - alpha_t/alpha_s [r], where alpha is this schedule; 0 if s = t.

        This is the relative decrease of the schedule from time s to time t.
        """
        log_ratio = self.log_alpha(t) - self.log_alpha(s)
        return torch.where(s < t, -torch.expm1(log_ratio), 0.0)


@final
class GammaHybrid(ForwardProcess):
    """Gamma-hybrid process: tokens are redrawn uniformly at one rate and masked at another.

    gamma is the fraction of noise events that redraw a token. The setting `time` defines the total
    noise sigma(t), and with it A_t, the probability that a position is not masked:

    - "masked": A_t = 1 - t, so that t is the expected fraction of masks for every gamma.
    - "noise": e^{-sigma} = 1 - (1 - floor) t, as in the paper; `floor` is the value at t = 1. If
      floor > 0, some tokens are not masked at t = 1.

    Both settings give the same chain at different speeds.

    Attributes:
        visible: schedule A_t = (1 - (1 - floor) t)^masking.
        kept: schedule B_t = (1 - (1 - floor) t)^redrawing, the probability that a token is not
            redrawn.
        masking, redrawing: exponents of the two schedules, with the ratio (1 - gamma) : gamma.
        uniform: uniform diffusion with alpha = B_t, whose formulas hold at positions with tokens.
    """

    # Uniform numbers per row that each method takes in its argument u.
    uniforms_per_sample = 3
    uniforms_per_step = 3
    uniforms_per_decode = 2
    uniforms_per_forward_step = 3
    uniforms_per_event = 3
    has_events = True

    class Config(ComponentConfig):
        gamma: Gamma = 0.01
        """Weight of the uniform generator in the mixture, 0 to 0.95; 0 is masked diffusion."""
        time: Literal["masked", "noise"] = "masked"
        """Meaning of t: the fraction of masks, or e^-sigma = 1 - (1 - floor) t as published."""
        floor: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
        """For time = "noise": e^-sigma at t = 1; 0.005 by default; 0 needs gamma <= 0.7."""

        @model_validator(mode="after")
        def _check_floor(self) -> GammaHybrid.Config:
            if self.floor is not None and self.time != "noise":
                raise ValueError(
                    'floor may be given only with time = "noise"; '
                    f'got time = "{self.time}" and floor = {self.floor}'
                )
            return self

    def __init__(
        self,
        vocabulary: Vocabulary,
        gamma: float,
        time: Literal["masked", "noise"] = "masked",
        floor: float = 0.0,
    ) -> None:
        require_tokens_and_mask(vocabulary, "hybrid_gamma")
        if not 0.0 <= gamma <= MAX_GAMMA:
            raise ArgumentError(
                f"GammaHybrid: gamma, the weight of the uniform generator, must be in "
                f"[0, {MAX_GAMMA}]; got {gamma}."
            )
        if time == "noise" and floor == 0.0 and 1.0 - gamma < MIN_MASKING:
            raise ArgumentError(
                'GammaHybrid: with time = "noise" and floor = 0, gamma must be at most '
                f"{1.0 - MIN_MASKING}; got {gamma}. With a larger gamma many tokens are still "
                "visible at the last time that float64 distinguishes from 1. "
                'Use a smaller gamma, a floor above 0, or time = "masked".'
            )
        self.vocabulary = vocabulary
        self.gamma = gamma
        self.noise = LinearSchedule(floor)
        # Masking and redrawing have the ratio (1 - gamma) : gamma in both settings.
        if time == "noise":
            self.masking = 1.0 - gamma
            self.redrawing = gamma
        else:
            self.masking = 1.0
            self.redrawing = gamma / (1.0 - gamma)
        self.visible = PowerOf(self.noise, self.masking)
        self.kept = PowerOf(self.noise, self.redrawing)
        self.closes_at_prior = self.noise.closes_at_prior
        self.prior = self._make_prior()
        tokens = FlatVocabulary(vocabulary.num_tokens, mask=False)
        self.uniform = MixtureProcess(tokens, self.kept, token_distribution(tokens))

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> GammaHybrid:
        floor = config.floor or 0.0
        if config.floor is None and config.time == "noise":
            floor = PUBLISHED_FLOOR
        return cls(vocabulary, config.gamma, config.time, floor)

    def _make_prior(self) -> Prior:
        """Return the distribution of the state at t = 1 if the clean token is uniform."""
        num_tokens = self.vocabulary.num_tokens
        masked = self.visible.one_minus_alpha(torch.ones(1, dtype=torch.float64))
        per_token = (1.0 - masked) / num_tokens
        return Prior(torch.cat([per_token.expand(num_tokens), masked]).log())

    # ------------------------------------------------------------------ forward

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        # Logarithms of float64 schedules, rounded at the end: log_p may be float32.
        log_visible = self.visible.log_alpha(t).to(log_p.dtype)
        log_masked = self.visible.one_minus_alpha(t).log().to(log_p.dtype)
        tokens = self.uniform.log_marginal(log_p, t) + log_visible.unsqueeze(-1)
        return torch.cat([tokens, log_masked.unsqueeze(-1)], -1)

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        log_visible = self.visible.log_alpha(t).unsqueeze(-1)
        log_masked = self.visible.one_minus_alpha(t).log().unsqueeze(-1)
        at_token = self.uniform.log_likelihood(self._token(zt), t) + log_visible
        return torch.where(self._is_masked(zt).unsqueeze(-1), log_masked, at_token)

    def information(self, t: Tensor) -> Tensor:
        """Return the information of a state about the clean token, in nats.

        A position is not masked with probability A_t. The state then has the information of uniform
        diffusion. A mask has no information.
        """
        return self.visible.alpha(t) * self.uniform.information(t)

    def change_probability(self, t: Tensor) -> Tensor:
        """Return the probability [r] that the state at t differs from the clean token."""
        masked = self.visible.one_minus_alpha(t)
        return masked + self.visible.alpha(t) * self.uniform.change_probability(t)

    def rates(self, t: Tensor) -> Kernel:
        """Return the generator Q_t of the forward process at times t.

        Tokens are masked at the rate (1 - gamma) sigma'(t) and redrawn at the rate
        gamma sigma'(t), where sigma(t) is the total noise up to t. Masks never change.
        """
        t = interior(t)
        hazard = -self.noise.d_alpha(t) / self.noise.alpha(t)
        masked = self.masking * hazard
        redrawn = self.redrawing * hazard
        num_tokens = self.vocabulary.num_tokens
        return RedrawKernel(
            keep=-(masked + redrawn),
            each=redrawn / num_tokens,
            leave=masked,
            rest=torch.zeros_like(t),
            num_tokens=num_tokens,
        )

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        masked = self.visible.lost(s, t)
        redrawn = self.kept.lost(s, t)
        stays_visible = 1.0 - masked
        num_tokens = self.vocabulary.num_tokens
        return RedrawKernel(
            keep=stays_visible * (1.0 - redrawn),
            each=stays_visible * redrawn / num_tokens,
            leave=masked,
            rest=torch.ones_like(t),
            num_tokens=num_tokens,
        )

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self._corrupt(x0, self.visible.one_minus_alpha(t), self.kept.one_minus_alpha(t), u)

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self._corrupt(zs, self.visible.lost(s, t), self.kept.lost(s, t), u)

    def _corrupt(self, ids: Tensor, masked: Tensor, redrawn: Tensor, u: Tensor) -> Tensor:
        """Mask states `ids` with probability `masked`; redraw tokens with probability `redrawn`.

        All arguments are [r], except for the uniforms u [r,3]: u[:,0] decides on masking, u[:,1] on
        redrawing, and u[:,2] selects the new token.
        """
        uniform_token = (u[:, 2] * self.vocabulary.num_tokens).long()
        is_redrawn = (u[:, 1] < redrawn) & ~self._is_masked(ids)
        token = torch.where(is_redrawn, uniform_token, ids)
        return torch.where(u[:, 0] < masked, self.vocabulary.root, token)

    def keep_probability(self, t: Tensor) -> Tensor:
        return self.visible.alpha(t) * self.kept.alpha(t)

    # ------------------------------------------------------------------ the bound

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """Return the total rate [r] at which the reverse chain leaves z_t, given the clean token.

        The rate is -A'/(1 - A) at masks and -B'/(V B) (1 - r_t(z|x))/r_t(z|x) at tokens z. The
        docstring of this module defines the symbols.
        """
        t = interior(t)
        at_mask = -self.visible.d_alpha(t) / self.visible.one_minus_alpha(t)
        at_token = self.uniform.weight(x0, self._token(zt), t)
        return torch.where(self._is_masked(zt), at_mask, at_token)

    def divergence(
        self, prediction: CleanDistribution | Score, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        """Return the divergence [r]: the integrand of the bound divided by `weight`.

        At masks it is KL( r_t(.|x) || r_t(.|p) ), where r_t is the distribution of a token that is
        not masked (see the docstring of this module). At tokens it is the divergence of uniform
        diffusion.
        """
        if isinstance(prediction, Score):
            return super().divergence(prediction, x0, zt, t)
        at_mask = self.uniform.closing_kl(prediction, x0, interior(t))
        # Without redrawing, tokens are never noise and have no term in the bound.
        if self.gamma == 0.0:
            return torch.where(self._is_masked(zt), at_mask, 0.0)
        at_token = self.uniform.divergence(prediction, x0, self._token(zt), t)
        return torch.where(self._is_masked(zt), at_mask, at_token)

    def density(
        self, prediction: CleanDistribution | Score, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        if isinstance(prediction, Score):
            return super().density(prediction, x0, zt, t)
        weight = self.weight(x0, zt, t)
        # Rows of weight 0 may have an infinite divergence, and 0 * inf is NaN.
        return torch.where(weight > 0, weight * self.divergence(prediction, x0, zt, t), 0.0)

    def decode_nll(
        self, prediction: CleanDistribution | Score, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        """Return the decoding term [r] of the bound, -ln P(x | z_t).

        It is -ln p(x) at masks, where p is the prediction. At tokens it is the decoding term of
        uniform diffusion.
        """
        if isinstance(prediction, Score):
            return super().decode_nll(prediction, x0, zt, t)
        at_token = self.uniform.decode_nll(prediction, x0, self._token(zt), t)
        return torch.where(self._is_masked(zt), -prediction.log_prob(x0), at_token)

    def closing_kl(self, prediction: CleanDistribution | Score, x0: Tensor, t: Tensor) -> Tensor:
        """Return KL( q_t(.|x) || q_t-bar ) [r], where q_t-bar is the marginal if x is drawn from p.

        p is the predicted distribution. The result is A KL( r_t(.|x) || r_t(.|p) ). A is the
        probability that a position is not masked, and r_t is the distribution of a token that is
        not masked.
        """
        if isinstance(prediction, Score):
            return super().closing_kl(prediction, x0, t)
        return self.visible.alpha(t) * self.uniform.closing_kl(prediction, x0, t)

    def active(self, zt: Tensor) -> Tensor:
        return self._is_masked(zt) | (self.gamma > 0.0)

    def trained_part(self, zt: Tensor) -> Tensor:
        return torch.where(self.active(zt), int(TrainedPart.ALL), int(TrainedPart.NONE))

    @property
    def is_monotone(self) -> bool:
        return self.gamma == 0.0

    # ------------------------------------------------------------------ reverse

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Draw z_s from the exact reverse transition, given z_t.

        A mask is revealed with probability 1 - (1 - A_s)/(1 - A_t), where A_t is the probability
        that a position is not masked at time t. Tokens move as in uniform diffusion. The rows that
        may move are drawn without the network, and the network is queried only at these rows.
        """
        masked_s = self.visible.one_minus_alpha(s)
        masked_t = self.visible.one_minus_alpha(t)
        reveal = torch.where(s < t, (masked_t - masked_s) / masked_t, 0.0)
        arrive = self.kept.lost(s, t) / self.vocabulary.num_tokens
        return self._move(query, zt, t, s, reveal, arrive, u)

    def _move(
        self,
        query: Query,
        zt: Tensor,
        t: Tensor,
        s: Tensor,
        reveal: Tensor,
        arrive: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Reveal masks and move tokens, for steps from t to s and for events (s = t).

        A mask is revealed with probability `reveal`, as a token y ~ r_s(.|p). A token z moves with
        probability arrive (1 - r_s(z|p))/r_t(z|p) to a token y != z. The new token y has the
        probability r_s(y|p)/(1 - r_s(z|p)). The docstring of this module defines r_t and B_t.

        This probability is at most arrive (1 - (1 - B_s)/V)/((1 - B_t)/V), because r_t and r_s are
        at least (1 - B)/V. The limit does not depend on the network, which is queried only at rows
        whose uniform u[:,0] is below it.

        Args:
            reveal: [r] probability that a mask is revealed.
            arrive: [r] in a step, the probability that the forward process redraws a token as z
                between s and t; in an event (1 - B_t)/V.
            u: [r,3] uniforms. u[:,0] decides whether a row moves, u[:,1] selects the token, and
                u[:,2] decides whether it is drawn from the noise or from the prediction.
        """
        masked = self._is_masked(zt)
        noise_s = self._redrawn_per_token(s)
        noise_t = self._redrawn_per_token(t)
        bound = torch.where(arrive > 0, arrive * (1.0 - noise_s) / noise_t, 0.0)
        zs = zt.clone()
        # `moving` are the rows that may move. `_draw_move` rejects tokens whose uniform is below
        # the bound but not below the probability.
        moving = (u[:, 0] < torch.where(masked, reveal, bound)).nonzero().squeeze(-1)
        if len(moving) == 0:
            return zs
        z = zt[moving]
        values = (value[moving] for value in (masked, t, s, noise_t, noise_s, arrive, u))
        zs[moving] = query(moving, self.scope(z), self._draw_move, z, *values)
        return zs

    def _draw_move(
        self,
        dist: CleanDistribution,
        z: Tensor,
        masked: Tensor,
        t: Tensor,
        s: Tensor,
        noise_t: Tensor,
        noise_s: Tensor,
        arrive: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draw the new states [k] of the rows at which `_move` queries the network.

        Every mask is revealed as a token y ~ r_s(.|p). A token z moves with probability
        arrive (1 - r_s(z|p))/r_t(z|p) to a token y != z, and otherwise stays. The new token y has
        the probability r_s(y|p)/(1 - r_s(z|p)).

        r_s(.|p) = B_s p + (1 - B_s)/V is a mixture of the predicted distribution p and the uniform
        distribution. One of the two is chosen at random first, and y is drawn from it.

        Args:
            z: [k] states, masks where `masked` [k] is True.
            noise_t, noise_s: [k] (1 - B)/V at times t and s, the probability of each token under
                the uniform part of the mixture.
            arrive, u: see `_move`.
        """
        u_leave, u_token, u_source = u.unbind(-1)
        log_p_z = torch.where(masked, -torch.inf, dist.log_prob(self._token(z)).double())
        # Number of tokens other than z; a mask may become any token.
        others = self.vocabulary.num_tokens - (~masked).long()
        by_noise = others * noise_s
        # B_s (1 - p(z)); expm1 is accurate if p(z) is near 1.
        by_prediction = -self.kept.alpha(s) * torch.expm1(log_p_z)
        leaving_mass = by_noise + by_prediction  # 1 - r_s(z|p)
        r_t = noise_t + self.kept.alpha(t) * log_p_z.exp()
        leaves = masked | (u_leave < arrive * leaving_mass / r_t)
        uniform_token = (u_token * others).long()
        # Token numbers of at least z are raised by one, so that the uniform token is never z.
        uniform_token = uniform_token + (uniform_token >= z).long()
        drawn = torch.where(leaves, uniform_token, z)
        from_prediction = leaves & (u_source * leaving_mass >= by_noise)
        rows = from_prediction.nonzero().squeeze(-1)
        drawn[rows] = self._draw_other_token(dist, rows, z[rows], u_token[rows])
        return drawn

    def _draw_other_token(
        self, dist: CleanDistribution, rows: Tensor, z: Tensor, u: Tensor
    ) -> Tensor:
        """Draw a token other than z for each of k rows of `dist`, those with the indices `rows`.

        z [k] are the states of the rows. If the state is the mask, every token may be drawn.
        """
        log_p = dist.log_mass(0)[rows]
        # Column V is added for the mask: at a mask z = V excludes this column and no token.
        padded = torch.cat([log_p, log_p[:, :1]], -1)
        others = padded.scatter(-1, z.unsqueeze(-1), -torch.inf)[:, :-1]
        root = torch.full_like(z, self.vocabulary.root)
        return DenseDistribution(others, self.vocabulary).draw(root, torch.zeros_like(z), u)

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        """Convert a score to log-probabilities [r,V] of the clean token.

        Tweedie's formula for uniform diffusion is applied to the ratios between tokens. The ratio
        of the mask is not used, since it does not depend on the clean token.
        """
        log_ratio = score.log_ratio[:, : self.vocabulary.num_tokens]
        # If no token is possible, the gradient of the softmax is NaN; such rows are made uniform.
        some_possible = (log_ratio > -torch.inf).any(-1, keepdim=True)
        return self.uniform.tweedie(Score(torch.where(some_possible, log_ratio, 0.0)), t)

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw the clean token given the state z_t, from uniforms u [r,n].

        A token z is kept with probability B p(z)/r_t(z|p), where r_t(z|p) = B p(z) + (1 - B)/V and
        B is the probability that the token was not redrawn until t. If z is not kept, and at masks,
        the clean token is drawn from the prediction p.
        """
        if bool((t == 0.0).all()):
            return zt.clone()
        x0 = zt.clone()
        masked = self._is_masked(zt)
        noise = self._redrawn_per_token(t)
        # If no token has been redrawn at time t, a token is clean, and its row needs no query.
        uncertain = (masked | (noise > 0)).nonzero().squeeze(-1)
        if len(uncertain) == 0:
            return x0
        z = zt[uncertain]
        values = (value[uncertain] for value in (t, masked, noise, u))
        x0[uncertain] = query(uncertain, self.scope(z), self._draw_clean, z, *values)
        return x0

    def _draw_clean(
        self,
        prediction: CleanDistribution | Score,
        z: Tensor,
        t: Tensor,
        masked: Tensor,
        noise: Tensor,
        u: Tensor,
    ) -> Tensor:
        """Draw the clean tokens [k] of the rows at which `decode` queries the network.

        Args:
            z: [k] states, masks where `masked` [k] is True.
            noise: [k] probability (1 - B_t)/V with which noise draws each of the V tokens.
            u: [k,2] uniforms. u[:,0] decides whether a token is kept, u[:,1] selects a token.
        """
        dist = self._clean_distribution(prediction, t)
        kept_mass = self.kept.alpha(t) * dist.log_prob(self._token(z)).double().exp()
        stays = torch.where(masked, 0.0, kept_mass / (kept_mass + noise))
        root = torch.full_like(z, self.vocabulary.root)
        drawn = dist.draw(root, torch.zeros_like(z), u[:, 1])
        return torch.where(u[:, 0] < stays, z, drawn)

    def _clean_distribution(
        self, prediction: CleanDistribution | Score, t: Tensor
    ) -> CleanDistribution:
        if isinstance(prediction, Score):
            return DenseDistribution(self.tweedie(prediction, t), self.vocabulary)
        return prediction

    # ------------------------------------------------------------------ events

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw the time s < t at which a mask is revealed, or at which a token may change.

        The docstring of the module defines A, B, sigma, gamma and r_t(z|p). The time s is computed
        from a uniform u in (0, 1): 1 - A_s = u (1 - A_t) at masks, and
        (1 - B_s)/B_s = u (1 - B_t)/B_t at tokens. The time is 0 if there is no further event.

        A token z changes at the rate gamma sigma' (1 - r_t(z|p))/(V r_t(z|p)), which depends on the
        network. The times s of tokens are drawn with the larger rate gamma sigma'/(1 - B), which
        does not depend on the network. `event` therefore rejects some of the moves.
        """
        t = interior(t)
        log_noise = torch.log1p(-u * self.visible.one_minus_alpha(t)) / self.masking
        if self.redrawing > 0.0:
            log_kept = -torch.log1p(u * torch.expm1(-self.kept.log_alpha(t)))
            log_noise = torch.where(self._is_masked(zt), log_noise, log_kept / self.redrawing)
        # log_noise is ln(1 - (1 - floor) s), the logarithm of `self.noise` at the time s.
        s = -torch.expm1(log_noise) / (1.0 - self.noise.floor)
        # Before the earliest evaluated time a token is clean: no further event.
        token_moves = (self.redrawing > 0.0) & (s >= interior(s))
        happens = self._is_masked(zt) | token_moves
        return torch.where(happens, torch.minimum(s, t), 0.0)

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Draw the state after a time that `event_time` has drawn.

        Let r_t(.|p) be the distribution of the token at time t if the clean token is drawn from the
        predicted distribution p, and B the probability that the token was not redrawn until t. A
        mask becomes a token y ~ r_t(.|p). Of the V tokens, a token z moves to another one with
        probability ((1 - B)/V) (1 - r_t(z|p))/r_t(z|p), and stays otherwise.
        """
        t = interior(t)
        return self._move(query, zt, t, t, torch.ones_like(t), self._redrawn_per_token(t), u)

    # ------------------------------------------------------------------ terms of the formulas above

    def _redrawn_per_token(self, t: Tensor) -> Tensor:
        """Return (1 - B_t)/V [r], the probability that a token was redrawn and is one given token.

        B_t is the probability that the token was not redrawn until time t, and V the number of
        tokens.
        """
        return self.kept.one_minus_alpha(t) / self.vocabulary.num_tokens

    def _is_masked(self, zt: Tensor) -> Tensor:
        return zt == self.vocabulary.root

    def _token(self, zt: Tensor) -> Tensor:
        """Return the states [r] with every mask replaced by token 0.

        Formulas for tokens can then be evaluated at all rows. The values of these formulas at masks
        are not used.
        """
        return torch.where(self._is_masked(zt), 0, zt)

    formulas: ClassVar[str] = """
        marginal        q_t(.|x) = A_t r_t(.|x) + (1 - A_t) delta_mask
        rates           token -> mask at (1 - g) sigma',  token -> each token at g sigma'/V; masks
                        never change
        integrand       (-A_t'/(1 - A_t)) KL( r_t(.|x) || r_t(.|p) )  at masks
        at tokens z     (g sigma'/(V r_t(z|x))) [ KL( r_t(.|x) || r_t(.|p) ) + rho - 1 - ln rho ],
                        where rho = r_t(z|x)/r_t(z|p)
        step            a mask stays a mask with probability (1 - A_s)/(1 - A_t), and else becomes a
                        draw from r_s(.|p)
        at tokens z     change with probability (1 - B_ts)/V (1 - r_s(z|p))/r_t(z|p), to a draw from
                        r_s(.|p) other than z

        x, z            clean token, and state of its position at time t
        g, V            gamma, and the number of tokens
        p               predicted distribution of x, given the other positions
        sigma           total noise up to time t; sigma' is its derivative
        A_t             e^{-(1-g) sigma}, probability that a position is not masked until t
        B_t             e^{-g sigma}, probability that a token is not redrawn until t
        B_ts            B_t/B_s
        r_t(y|x)        B_t 1[y = x] + (1 - B_t)/V
        r_t(y|p)        B_t p(y) + (1 - B_t)/V
        """

    example_settings: ClassVar[tuple[dict[str, Any], ...]] = (
        {"gamma": 0.0},
        {"gamma": 0.01},
        {"gamma": 0.3},
        {"gamma": 0.9},
        {"gamma": 0.3, "time": "noise", "floor": 0.0},
        {"gamma": 0.9, "time": "noise"},
    )

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        return [
            cls.build(cls.Config.model_validate(keys), vocabulary=FlatVocabulary(3))
            for keys in cls.example_settings
        ]
