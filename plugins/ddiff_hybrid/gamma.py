"""The gamma-hybrid: words are redrawn at one rate and masked at another; masks stay (arXiv 2504.06416).

Two clocks that know nothing of each other: a word is visible until t with probability A_t, and what stands under the mask
or before it comes follows uniform diffusion, in which a word was never redrawn with probability B_t. With
r_t(y|x) = B_t 1[y = x] + (1 - B_t)/V

    marginal     q_t(.|x) = A r_t(.|x) + (1 - A) delta_mask
    density      masks  (-A'/(1 - A)) KL( r_t(.|x) || r_t(.|p) )
                 words  that of uniform diffusion, (-B'/(V B r_t(z|x))) [ KL( r_t(.|x) || r_t(.|p) ) + rho - 1 - ln rho ]
    backwards    a mask stays with (1 - A_s)/(1 - A_t), else becomes y ~ r_s(.|p); words move as in uniform diffusion

The marginals are those of an interpolating process, rates and transitions are not: nothing leaves a mask.
"""

from __future__ import annotations

from typing import Annotated, Literal, final

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
    Informed,
    Kernel,
    LinearSchedule,
    MixtureProcess,
    Prior,
    Query,
    Schedule,
    Score,
    Vocabulary,
    interior,
    token_distribution,
)

from .epsilon import require_words_and_mask
from .kernel import RedrawKernel

MOST = 0.95  # above, redrawing is over 19 times as fast as masking and B_t leaves float64 before the last mask has come
SLOWEST = 0.3  # a word in 4000 is still visible at the last time that float64 tells from 1; slower, and too many are

Gamma = Annotated[float, Field(ge=0.0, le=MOST)]


@final
class PowerOf(Schedule):
    """alpha^power of another schedule; power >= 0."""

    def __init__(self, schedule: Schedule, power: float) -> None:
        self.schedule, self.power = schedule, power
        self.closes_at_clean = schedule.closes_at_clean
        self.closes_at_prior = schedule.closes_at_prior and power > 0.0

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(t) ** self.power

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.power * self.schedule.alpha(t) ** (self.power - 1.0) * self.schedule.d_alpha(t)

    def noised(self, t: Tensor) -> Tensor:
        return -torch.expm1(self.log_alpha(t))

    def log_alpha(self, t: Tensor) -> Tensor:
        """[r] ln alpha, accurate where alpha is near 1 and where it is near 0."""
        alpha, power = self.schedule.alpha(t), torch.full_like(t, self.power)
        early = torch.special.xlog1py(power, -self.schedule.noised(t))
        return torch.where(alpha > 0.5, early, torch.special.xlogy(power, alpha))

    def lost(self, s: Tensor, t: Tensor) -> Tensor:
        """[r] 1 - alpha_t / alpha_s, 0 where s = t."""
        return torch.where(s < t, -torch.expm1(self.log_alpha(t) - self.log_alpha(s)), 0.0)


@final
class GammaHybrid(ForwardProcess):
    """Q_t = sigma'(t) [ (1 - gamma) Q_absorb + gamma Q_uniform ]: A = e^{-(1 - gamma) sigma}, B = e^{-gamma sigma}.

    time "masked": A = 1 - t, so that t is the expected share of masks, for every gamma. time "noise", as published:
    e^{-sigma} = 1 - (1 - floor) t, which leaves words visible at t = 1. It is the same chain read by another clock.
    """

    uniforms_per_sample = 3
    uniforms_per_step = 3
    uniforms_per_decode = 2
    uniforms_per_forward_step = 3
    uniforms_per_event = 3
    has_events = True

    class Config(ComponentConfig):
        gamma: Gamma = 0.01
        """Share of the uniform generator; 0 is masked diffusion."""
        time: Literal["masked", "noise"] = "masked"
        """What t counts: the share that is masked, or as published the total noise, e^-sigma = 1 - (1 - floor) t."""
        floor: Annotated[float, Field(ge=0.0, lt=1.0)] | None = None
        """Of time = "noise": e^-sigma at t = 1; 0.005 as published, 0 for gamma up to 0.7."""

        @model_validator(mode="after")
        def _floor_of_its_time(self) -> GammaHybrid.Config:
            if self.floor is not None and self.time != "noise":
                raise ValueError(
                    f'floor belongs to time = "noise"; got time = "{self.time}", floor = {self.floor}'
                )
            return self

    def __init__(
        self,
        vocabulary: Vocabulary,
        gamma: float,
        time: Literal["masked", "noise"] = "masked",
        floor: float = 0.0,
    ) -> None:
        require_words_and_mask(vocabulary, "hybrid_gamma")
        if not 0.0 <= gamma <= MOST:
            raise ArgumentError(
                f"GammaHybrid: gamma must be in [0, {MOST}], the share of uniform noise; got {gamma}."
            )
        if time == "noise" and floor == 0.0 and 1.0 - gamma < SLOWEST:
            raise ArgumentError(
                f"GammaHybrid: with time = noise, floor = 0 and gamma = {gamma} words are masked at 1 - gamma = "
                f"{1.0 - gamma:.2g}/(1 - t), so slowly that many are still visible at the last time that float64 tells "
                f"from 1. Use gamma <= {1.0 - SLOWEST}, a floor, or time = masked."
            )
        self.vocabulary, self.gamma = vocabulary, gamma
        self.noise = LinearSchedule(floor)  # its powers are A, B and e^-sigma
        self.masking, self.redrawing = (
            (1.0 - gamma, gamma) if time == "noise" else (1.0, gamma / (1.0 - gamma))
        )
        self.visible, self.kept = (
            PowerOf(self.noise, self.masking),
            PowerOf(self.noise, self.redrawing),
        )
        self.closes_at_prior = self.noise.closes_at_prior
        self.prior = self._prior()
        bare = FlatVocabulary(vocabulary.num_tokens, mask=False)
        self.words = MixtureProcess(bare, self.kept, token_distribution(bare))

    @classmethod
    def build(cls, config: Config, *, vocabulary: Vocabulary) -> GammaHybrid:
        floor = 0.005 if config.floor is None and config.time == "noise" else config.floor or 0.0
        return cls(vocabulary, config.gamma, config.time, floor)

    def _prior(self) -> Prior:
        """The marginal at t = 1 of a word drawn evenly."""
        size, hidden = (
            self.vocabulary.num_tokens,
            self.visible.noised(torch.ones(1, dtype=torch.float64)),
        )
        return Prior(torch.cat([((1.0 - hidden) / size).expand(size), hidden]).log())

    # ------------------------------------------------------------------ forward

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        words = self.words.log_marginal(log_p, t) + self.visible.log_alpha(t).to(
            log_p.dtype
        ).unsqueeze(-1)
        return torch.cat([words, self.visible.noised(t).log().to(log_p.dtype).unsqueeze(-1)], -1)

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        word = self.words.log_likelihood(self._word(zt), t) + self.visible.log_alpha(t).unsqueeze(
            -1
        )
        return torch.where(
            self._masked(zt).unsqueeze(-1), self.visible.noised(t).log().unsqueeze(-1), word
        )

    def information(self, t: Tensor) -> Tensor:
        """A_t I(X; word under uniform diffusion): a mask says nothing of the token."""
        return self.visible.alpha(t) * self.words.information(t)

    def moved(self, t: Tensor) -> Tensor:
        """Masked, or redrawn as another token."""
        return self.visible.noised(t) + self.visible.alpha(t) * self.words.moved(t)

    def rates(self, t: Tensor) -> Kernel:
        """Masked at (1 - gamma) sigma', redrawn at gamma sigma'; from the mask nowhere."""
        t = interior(t)
        hazard = -self.noise.d_alpha(t) / self.noise.alpha(t)
        masked, redrawn, size = (
            self.masking * hazard,
            self.redrawing * hazard,
            self.vocabulary.num_tokens,
        )
        return RedrawKernel(-(masked + redrawn), redrawn / size, masked, torch.zeros_like(t), size)

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        masked, redrawn, size = (
            self.visible.lost(s, t),
            self.kept.lost(s, t),
            self.vocabulary.num_tokens,
        )
        seen = 1.0 - masked
        return RedrawKernel(
            seen * (1.0 - redrawn), seen * redrawn / size, masked, torch.ones_like(t), size
        )

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self._noised(x0, self.visible.noised(t), self.kept.noised(t), u)

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self._noised(zs, self.visible.lost(s, t), self.kept.lost(s, t), u)

    def _noised(self, ids: Tensor, masked: Tensor, redrawn: Tensor, u: Tensor) -> Tensor:
        """Each word is masked, or redrawn, with these probabilities; u [r,3]."""
        even = (u[:, 2] * self.vocabulary.num_tokens).long()
        word = torch.where((u[:, 1] < redrawn) & ~self._masked(ids), even, ids)
        return torch.where(u[:, 0] < masked, self.vocabulary.root, word)

    # ------------------------------------------------------------------ the bound

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """The total true reverse rate: -A'/(1 - A) at masks; at tokens -B'/(V B) (1 - r_t(z|x)) / r_t(z|x)."""
        t = interior(t)
        revealing = -self.visible.d_alpha(t) / self.visible.noised(t)
        return torch.where(self._masked(zt), revealing, self.words.weight(x0, self._word(zt), t))

    def divergence(
        self, prediction: CleanDistribution | Score, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        """KL( r_t(.|x) || r_t(.|p) ) at masks; at tokens that of uniform diffusion."""
        if isinstance(prediction, Score):
            return super().divergence(prediction, x0, zt, t)
        masks = self.words.closing_kl(prediction, x0, interior(t))
        if self.gamma == 0.0:  # tokens are not noise, and cost nothing
            return torch.where(self._masked(zt), masks, 0.0)
        words = self.words.divergence(prediction, x0, self._word(zt), t)
        return torch.where(self._masked(zt), masks, words)

    def density(
        self, prediction: CleanDistribution | Score, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        if isinstance(prediction, Score):
            return super().density(prediction, x0, zt, t)
        weight = self.weight(x0, zt, t)
        return torch.where(weight > 0, weight * self.divergence(prediction, x0, zt, t), 0.0)

    def decode_nll(
        self, prediction: CleanDistribution | Score, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        """-ln p(x) at masks; at words as in uniform diffusion."""
        if isinstance(prediction, Score):
            return super().decode_nll(prediction, x0, zt, t)
        word = self.words.decode_nll(prediction, x0, self._word(zt), t)
        return torch.where(self._masked(zt), -prediction.log_prob(x0), word)

    def closing_kl(self, prediction: CleanDistribution | Score, x0: Tensor, t: Tensor) -> Tensor:
        """A KL( r_t(.|x) || r_t(.|p) )."""
        if isinstance(prediction, Score):
            return super().closing_kl(prediction, x0, t)
        return self.visible.alpha(t) * self.words.closing_kl(prediction, x0, t)

    def active(self, zt: Tensor) -> Tensor:
        return self._masked(zt) | (self.gamma > 0.0)

    def informed(self, zt: Tensor) -> Tensor:
        return torch.where(self.active(zt), int(Informed.ALL), int(Informed.NONE))

    @property
    def monotone(self) -> bool:
        return self.gamma == 0.0

    # ------------------------------------------------------------------ reverse

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        """Masks are revealed with 1 - (1 - A_s)/(1 - A_t), whatever the network says; for words that is bounded."""
        before, now = self.visible.noised(s), self.visible.noised(t)
        reveal = torch.where(s < t, (now - before) / now, 0.0)
        return self._move(
            query, zt, t, s, reveal, self.kept.lost(s, t) / self.vocabulary.num_tokens, u
        )

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
        """A mask becomes y ~ r_s(.|p) with `reveal` [r]; a word z leaves with arrive (1 - r_s(z))/r_t(z), for y ~ r_s
        elsewhere; u [r,3].

        (1 - B)/V for r bounds the latter without the network, so only rows below the bound are shown to it.
        """
        size, masked = self.vocabulary.num_tokens, self._masked(zt)
        before, now = self._each(s), self._each(t)
        bound = torch.where(arrive > 0, arrive * (1.0 - before) / now, 0.0)
        zs, moving = (
            zt.clone(),
            (u[:, 0] < torch.where(masked, reveal, bound)).nonzero().squeeze(-1),
        )
        if len(moving) == 0:
            return zs

        def draw(dist: CleanDistribution, rows: Tensor) -> Tensor:
            picked = moving[rows]
            z, hidden, first, which, source = zt[picked], masked[picked], *u[picked].unbind(-1)
            log_p_z = torch.where(hidden, -torch.inf, dist.log_prob(self._word(z)).double())
            others = size - (~hidden).long()
            by_noise, by_law = (
                others * before[picked],
                -self.kept.alpha(s[picked]) * torch.expm1(log_p_z),
            )
            here = now[picked] + self.kept.alpha(t[picked]) * log_p_z.exp()
            leaves = hidden | (first < arrive[picked] * (by_noise + by_law) / here)
            evenly = (which * others).long()
            drawn = torch.where(leaves, evenly + (evenly >= z).long(), z)
            as_network = (leaves & (source * (by_noise + by_law) >= by_noise)).nonzero().squeeze(-1)
            drawn[as_network] = self._elsewhere(dist, as_network, z[as_network], which[as_network])
            return drawn

        zs[moving] = query(moving, self.scope(zt[moving]), draw)
        return zs

    def _elsewhere(self, dist: CleanDistribution, rows: Tensor, z: Tensor, u: Tensor) -> Tensor:
        """[k] words drawn from some rows [k] of a law without the words z [k]; nothing is left out for masks."""
        log_p = dist.log_mass(0)[rows]
        beside = torch.cat([log_p, log_p[:, :1]], -1).scatter(-1, z.unsqueeze(-1), -torch.inf)[
            :, :-1
        ]
        return DenseDistribution(beside, self.vocabulary).draw(
            torch.full_like(z, self.vocabulary.root), torch.zeros_like(z), u
        )

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        """That of uniform diffusion for the shares of the tokens: the mask says nothing of them."""
        log_ratio = score.log_ratio[:, : self.vocabulary.num_tokens]
        # of a score in which no token is possible the softmax has a gradient of NaN; its tokens are alike
        some_possible = (log_ratio > -torch.inf).any(-1, keepdim=True)
        return self.words.tweedie(Score(torch.where(some_possible, log_ratio, 0.0)), t)

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """z itself with probability B p(z) / r_t(z|p), otherwise and at masks x ~ p."""
        if bool((t == 0.0).all()):
            return zt.clone()
        x0, masked, each = zt.clone(), self._masked(zt), self._each(t)
        open_ = (masked | (each > 0)).nonzero().squeeze(-1)
        if len(open_) == 0:
            return x0

        def draw(prediction: CleanDistribution | Score, rows: Tensor) -> Tensor:
            picked = open_[rows]
            dist = self._clean_law(prediction, t[picked])
            z = zt[picked]
            stays = self.kept.alpha(t[picked]) * dist.log_prob(self._word(z)).double().exp()
            stays = torch.where(masked[picked], 0.0, stays / (stays + each[picked]))
            drawn = dist.draw(
                torch.full_like(z, self.vocabulary.root), torch.zeros_like(z), u[picked, 1]
            )
            return torch.where(u[picked, 0] < stays, z, drawn)

        x0[open_] = query(open_, self.scope(zt[open_]), draw)
        return x0

    def _clean_law(self, prediction: CleanDistribution | Score, t: Tensor) -> CleanDistribution:
        return (
            DenseDistribution(self.tweedie(prediction, t), self.vocabulary)
            if isinstance(prediction, Score)
            else prediction
        )

    # ------------------------------------------------------------------ events

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """Masks: 1 - A_s = u (1 - A_t), their reveal. Words: (1 - B_s)/B_s = u (1 - B_t)/B_t, a candidate, since they
        leave at gamma sigma' (1 - r)/(V r), which is below gamma sigma'/(1 - B)."""
        t = interior(t)
        log_noise = torch.log1p(-u * self.visible.noised(t)) / self.masking
        if self.redrawing > 0.0:
            log_kept = -torch.log1p(u * torch.expm1(-self.kept.log_alpha(t)))
            log_noise = torch.where(self._masked(zt), log_noise, log_kept / self.redrawing)
        s = -torch.expm1(log_noise) / (1.0 - self.noise.floor)
        happens = self._masked(zt) | ((self.redrawing > 0.0) & (s >= interior(s)))
        return torch.where(happens, torch.minimum(s, t), 0.0)

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        """A mask is revealed, y ~ r_t(.|p); a word takes its candidate with ((1 - B)/V) (1 - r(z))/r(z)."""
        t = interior(t)
        return self._move(query, zt, t, t, torch.ones_like(t), self._each(t), u)

    # ------------------------------------------------------------------ parts of the formulas above

    def _each(self, t: Tensor) -> Tensor:
        """[r] (1 - B_t)/V: the chance of a word that the law knows nothing of."""
        return self.kept.noised(t) / self.vocabulary.num_tokens

    def _masked(self, zt: Tensor) -> Tensor:
        return zt == self.vocabulary.root

    def _word(self, zt: Tensor) -> Tensor:
        """[r] z_t, and some word where it is the mask, for formulas that are not read there."""
        return torch.where(self._masked(zt), 0, zt)

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        settings: tuple[dict[str, object], ...] = (
            {"gamma": 0.0},
            {"gamma": 0.01},
            {"gamma": 0.3},
            {"gamma": 0.9},
            {"gamma": 0.3, "time": "noise", "floor": 0.0},
            {"gamma": 0.9, "time": "noise"},
        )
        return [
            cls.build(cls.Config.model_validate(keys), vocabulary=FlatVocabulary(3))
            for keys in settings
        ]
