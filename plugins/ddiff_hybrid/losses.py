"""The losses of the paper's code (arXiv 2504.06416), named `published`. The bound never sees them."""

from __future__ import annotations

from typing import Literal, final

import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    CleanDistribution,
    ComponentConfig,
    ForwardProcess,
    MixtureProcess,
    Noisy,
    NonNegativeFloat,
    Score,
    Times,
    interior,
    mask_distribution,
    token_distribution,
)

from .epsilon import EpsilonHybrid
from .gamma import GammaHybrid, PowerOf


@final
class Published:
    """What the paper's code trains on: `EverywhereCrossEntropy` for hybrid_epsilon, `MixedEntropies` for hybrid_gamma."""

    class Config(ComponentConfig):
        lam: NonNegativeFloat | None = None
        """Weight of visible words, lambda of the paper; 1 unless given. Of hybrid_epsilon."""
        weights: Literal["flat", "annealing"] | None = None
        """`annealing`, of hyperschedules, does not divide visible words by their share; flat if none. Of hybrid_epsilon."""

    @classmethod
    def build(
        cls, config: Config, *, process: ForwardProcess
    ) -> EverywhereCrossEntropy | MixedEntropies:
        if isinstance(process, EpsilonHybrid):
            lam = 1.0 if config.lam is None else config.lam
            return EverywhereCrossEntropy(lam, config.weights or "flat")
        if not isinstance(process, GammaHybrid):
            raise ArgumentError(
                '[objective] loss = "published" is that of the processes hybrid_epsilon and hybrid_gamma; got '
                f'{type(process).__name__}. Use loss = "elbo" or "clip".'
            )
        if config.lam is not None or config.weights is not None:
            raise ArgumentError(
                '[objective] loss = "published": lam and weights belong to the process hybrid_epsilon, where visible words '
                "have a weight of their own; with hybrid_gamma leave them out."
            )
        return MixedEntropies(process)


@final
class EverywhereCrossEntropy:
    """-ln P(x | z) at every position, against the word before the shuffling.

    Masks count 1/p; visible words lam (1 - epsilon) if they were shuffled and lam epsilon if not, both over 1 - p with the
    weights `flat`. A word that was shuffled onto itself cannot be told from one that was not: it has the mean of both.
    """

    name = "published"

    def __init__(self, lam: float = 1.0, weights: Literal["flat", "annealing"] = "flat") -> None:
        self.lam, self.weights = lam, weights

    def reads(self, process: EpsilonHybrid, noisy: Noisy, times: Times) -> Tensor:
        """bool [B,L]: masks, and words if they count at all."""
        rows = (times.speed > 0) & ~noisy.clean
        return (
            rows
            if self.lam * process.epsilon > 0.0
            else rows & (noisy.zt == process.vocabulary.root)
        )

    def weight(self, process: EpsilonHybrid, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        epsilon, masks = (
            process.epsilon,
            process.schedule.noised(t).clamp(min=1e-4),
        )  # the floor is the code's
        itself = epsilon / process.vocabulary.num_tokens
        shuffled = torch.ones_like(t).masked_fill(
            zt == x0, itself / (1.0 - epsilon + itself)
        )  # float64, as t is
        word = self.lam * ((1.0 - epsilon) * shuffled + epsilon * (1.0 - shuffled))
        share = process.schedule.alpha(t) if self.weights == "flat" else torch.ones_like(t)
        return torch.where(zt == process.vocabulary.root, 1.0 / masks, word / share)

    def divergence(
        self, process: EpsilonHybrid, dist: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        return process.decode_nll(dist, x0, zt, t)


@final
class MixedEntropies:
    """(1 - gamma) times the loss of masked diffusion at masks, gamma times that of uniform diffusion at words.

    Both are read as if all the noise sigma were their own, so that e^sigma stands where e^{(1 - gamma) sigma} and
    e^{gamma sigma} belong: no bound for 0 < gamma < 1.
    """

    name = "published"

    def __init__(self, process: GammaHybrid) -> None:
        bare, words = process.vocabulary, process.words.vocabulary
        everything = PowerOf(process.noise, process.masking + process.redrawing)  # e^-sigma
        self.masked = MixtureProcess(bare, everything, mask_distribution(bare))
        self.uniform = MixtureProcess(words, everything, token_distribution(words))

    def weight(self, process: GammaHybrid, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        root, (hidden, word) = process.vocabulary.root, self._parts(zt)
        masked = (1.0 - process.gamma) * self.masked.weight(x0, hidden, t)
        return torch.where(zt == root, masked, process.gamma * self.uniform.weight(x0, word, t))

    def divergence(
        self,
        process: GammaHybrid,
        prediction: CleanDistribution | Score,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        root, (hidden, word) = process.vocabulary.root, self._parts(zt)
        ratio = _ratio(process, prediction, zt, interior(t))
        masked = self.masked.divergence(Score(ratio), x0, hidden, t)
        return torch.where(
            zt == root, masked, self.uniform.divergence(Score(ratio[:, :root]), x0, word, t)
        )

    def _parts(self, zt: Tensor) -> tuple[Tensor, Tensor]:
        """[r] the mask everywhere, and the words with some word where the mask is."""
        return torch.full_like(zt, self.masked.vocabulary.root), zt.remainder(
            self.masked.vocabulary.root
        )


def _ratio(
    process: ForwardProcess, prediction: CleanDistribution | Score, zt: Tensor, t: Tensor
) -> Tensor:
    """[r,S] log of the probability of each state over that of z_t."""
    if isinstance(prediction, Score):
        return prediction.log_ratio
    log_marginal = process.log_marginal(prediction.log_mass(0), t)
    return log_marginal - log_marginal.gather(-1, zt.unsqueeze(-1))
