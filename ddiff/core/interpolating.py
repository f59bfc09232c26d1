"""The interpolating family: the clean token fades into noise that does not depend on it.

q_t(.|x) = alpha_t delta_x + b_t. The generator adds arrivals omega_t(z) = b_t'(z) - (alpha'/alpha) b_t(z) >= 0 from every
state, and the bound has the closed form (arXiv 2503.04482, in the reverse-rate reading)

    density = (omega_t(z) / q_t(z|x)) [ KL( q_t(.|x) || q_t-bar ) + rho - 1 - ln rho ],   rho = q_t(z|x) / q_t-bar(z).

Masked diffusion, uniform diffusion and their mixtures are of this family.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import final

import torch
from torch import Tensor

from ddiff.core.kernel import InterpolatingKernel, Kernel
from ddiff.core.law import CleanLaw, Score
from ddiff.core.numerics import draw_index, interior, like_rows, log_or_never
from ddiff.core.process import ForwardProcess, Prior
from ddiff.core.schedule import LinearSchedule, Schedule
from ddiff.core.vocabulary import FlatVocabulary, Vocabulary
from ddiff.errors import ArgumentError


class InterpolatingProcess(ForwardProcess):
    """q_t(.|x) = alpha_t delta_x + b_t; a subclass says alpha and b, derivatives come from them.

    `prior` must be b_1 / |b_1| for the process to close.
    """

    uniforms_per_sample = 2

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
        return self.d_noise(t) - (self.d_alpha(t) / self.alpha(t)).unsqueeze(-1) * self.noise(t)

    def log_marginal(self, log_p: Tensor, t: Tensor) -> Tensor:
        faded = like_rows(self.alpha(t), log_p) * log_p.exp()
        extra = self.vocabulary.num_states - self.vocabulary.num_tokens
        return log_or_never(torch.nn.functional.pad(faded, (0, extra)) + self.noise(t).to(log_p.dtype))

    def rates(self, t: Tensor) -> Kernel:
        arrive = self.arrivals(t)
        return InterpolatingKernel(-arrive.sum(-1), arrive)

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        """alpha_ts I + 1 (x) (b_t - alpha_ts b_s), alpha_ts = alpha_t / alpha_s."""
        alpha_s = self.alpha(s)
        stay = torch.where(alpha_s > 0, self.alpha(t) / alpha_s, torch.ones_like(t))
        arrive = self.noise(t) - stay.unsqueeze(-1) * self.noise(s)
        return InterpolatingKernel(stay, arrive.clamp(min=0.0))

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        zt, lost = x0.clone(), (u[:, 0] >= self.alpha(t)).nonzero().squeeze(-1)
        zt[lost] = draw_index(self.noise(t[lost]), u[lost, 1])  # at t = 0 there may be no noise to draw from
        return zt

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        noise = self._noise_at(zt, t).unsqueeze(-1)
        words = torch.arange(self.vocabulary.num_tokens, device=zt.device)
        return (noise + torch.where(words == zt.unsqueeze(-1), self.alpha(t).unsqueeze(-1), 0.0)).log()

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """omega_t(z) / q_t(z|x), the published split."""
        t = interior(t)
        arrival = self.arrivals(t).gather(-1, zt.unsqueeze(-1)).squeeze(-1)
        return arrival / self._likelihood(x0, zt, t)

    def divergence(self, law: CleanLaw, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """KL( q_t(.|x) || q_t-bar ) + rho - 1 - ln rho."""
        t = interior(t)
        noise, log_q_bar = self.noise(t), self.log_marginal(law.log_mass(0), t)
        # KL over all states of the noise, then the clean token's own entry put right
        wide = noise.to(log_q_bar.dtype)
        everywhere = torch.where(wide > 0, wide * (wide.log() - log_q_bar), 0.0).sum(-1)
        at_x, q_x = self._noise_at(x0, t), self._likelihood(x0, x0, t)
        log_q_bar_x = log_q_bar.gather(-1, x0.unsqueeze(-1)).squeeze(-1)
        own = q_x * (q_x.log() - log_q_bar_x) - torch.where(at_x > 0, at_x * (at_x.log() - log_q_bar_x), 0.0)
        log_rho = self._likelihood(x0, zt, t).log() - log_q_bar.gather(-1, zt.unsqueeze(-1)).squeeze(-1)
        return everywhere + own + log_rho.exp() - 1.0 - log_rho

    def density(self, answer: CleanLaw | Score, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        if isinstance(answer, Score):
            return super().density(answer, x0, zt, t)
        return self.weight(x0, zt, t) * self.divergence(answer, x0, zt, t)

    def _likelihood(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        """[r] q_t(z|x)."""
        return self._noise_at(zt, t) + torch.where(zt == x0, self.alpha(t), 0.0)

    def active(self, zt: Tensor) -> Tensor:
        """A state that nothing arrives in charges nothing."""
        return self._reached().to(zt.device)[zt]

    def _reached(self) -> Tensor:
        """bool [S] states with arrivals, seen at the middle of time."""
        return self.arrivals(torch.tensor([0.5], dtype=torch.float64))[0] > 0

    def _noise_at(self, zt: Tensor, t: Tensor) -> Tensor:
        return self.noise(t).gather(-1, zt.unsqueeze(-1)).squeeze(-1)


@final
class MixtureProcess(InterpolatingProcess):
    """Noise of a fixed law: b_t = (1 - alpha_t) target. A point at the mask is masked diffusion, 1/V uniform diffusion.

    `target` [S] sums to 1 and is the prior where the schedule closes.
    """

    def __init__(self, vocabulary: Vocabulary, schedule: Schedule, target: Tensor) -> None:
        target = target.double()
        is_law = bool((target >= 0).all()) and torch.isclose(target.sum(), target.new_ones(()))
        if target.shape != (vocabulary.num_states,) or not is_law:
            raise ArgumentError(
                f"MixtureProcess: target must be a law over the {vocabulary.num_states} states, with no negative entry and "
                f"sum 1; got shape {tuple(target.shape)}, smallest entry {float(target.min()):.3g} and sum "
                f"{float(target.sum()):.6g}."
            )
        self.vocabulary, self.schedule, self.target = vocabulary, schedule, target / target.sum()
        self.prior = Prior(self.target.log())
        self.closes_at_clean, self.closes_at_prior = schedule.closes_at_clean, schedule.closes_at_prior

    def alpha(self, t: Tensor) -> Tensor:
        return self.schedule.alpha(t)

    def noise(self, t: Tensor) -> Tensor:
        return self.schedule.noised(t).unsqueeze(-1) * self.target.to(t.device)

    def d_alpha(self, t: Tensor) -> Tensor:
        return self.schedule.d_alpha(t)

    def d_noise(self, t: Tensor) -> Tensor:
        return -self.schedule.d_alpha(t).unsqueeze(-1) * self.target.to(t.device)

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        target = self.target.to(t.device)
        noise = torch.searchsorted(target.cumsum(0), u[:, 1].contiguous(), right=True)
        last = int(target.nonzero().max())
        return torch.where(u[:, 0] < self.alpha(t), x0, noise.clamp(max=last))

    @classmethod
    def examples(cls) -> list[ForwardProcess]:
        masked, bare = FlatVocabulary(4), FlatVocabulary(4, mask=False)
        point = torch.zeros(5).index_fill(0, torch.tensor([4]), 1.0)
        uneven = torch.tensor([0.4, 0.3, 0.2, 0.1])
        return [
            cls(masked, LinearSchedule(), point),
            cls(bare, LinearSchedule(), torch.full((4,), 0.25)),
            cls(bare, LinearSchedule(floor=0.01), uneven),
        ]
