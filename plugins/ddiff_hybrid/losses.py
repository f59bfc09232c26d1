"""Training losses of the published code (arXiv 2504.06416), kind "published".

The reported bound never uses them. Symbols are those of `epsilon` and `gamma`.
"""

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
    Prediction,
    Score,
    Times,
    TrainingLoss,
    interior,
    mask_distribution,
    token_distribution,
)

from .epsilon import EpsilonHybrid
from .gamma import GammaHybrid, PowerOf


@final
class Published:
    """Training loss of the published code, for hybrid_epsilon and hybrid_gamma."""

    class Config(ComponentConfig):
        lam: NonNegativeFloat | None = None
        """hybrid_epsilon: weight of visible tokens, lambda of the paper; 1 by default."""
        weights: Literal["flat", "annealing"] | None = None
        """hybrid_epsilon: "flat" (default) divides visible tokens by 1 - p, "annealing" not."""

    @classmethod
    def build(
        cls, config: Config, *, process: ForwardProcess
    ) -> EverywhereCrossEntropy | MixedEntropies:
        if isinstance(process, EpsilonHybrid):
            lam = 1.0 if config.lam is None else config.lam
            return EverywhereCrossEntropy(lam, config.weights or "flat")
        if not isinstance(process, GammaHybrid):
            raise ArgumentError(
                '[objective] loss = "published" needs the process hybrid_epsilon or hybrid_gamma; '
                f'got {type(process).__name__}. Use loss = "elbo" or "clip".'
            )
        if config.lam is not None or config.weights is not None:
            raise ArgumentError(
                '[objective] loss = "published": lam and weights belong to the process '
                "hybrid_epsilon, in which visible tokens have a separate weight; with hybrid_gamma "
                "leave them out."
            )
        return MixedEntropies(process)


@final
class EverywhereCrossEntropy(TrainingLoss[EpsilonHybrid]):
    """Cross-entropy -ln P(x | z) of the clean token at every position, for hybrid_epsilon.

    Masks weigh 1/p, visible tokens lam (1 - epsilon) if they were shuffled and lam epsilon if
    not. With weights "flat" visible tokens are divided by their share 1 - p. A token that was
    shuffled onto itself looks like one that was not shuffled: both have the mean weight.
    """

    name = "published"

    def __init__(self, lam: float = 1.0, weights: Literal["flat", "annealing"] = "flat") -> None:
        self.lam = lam
        self.weights = weights

    def select_rows(self, process: EpsilonHybrid, noisy: Noisy, times: Times) -> Tensor:
        """bool [B,L]: masks, and visible tokens if their weight is not 0."""
        rows = (times.speed > 0) & ~noisy.clean
        if self.lam * process.epsilon > 0.0:
            return rows
        return rows & (noisy.zt == process.vocabulary.root)

    def weight(self, process: EpsilonHybrid, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        epsilon = process.epsilon
        masked = process.schedule.one_minus_alpha(t).clamp(
            min=1e-4
        )  # the floor of the published code
        # Probability that the token was shuffled, given x0 and z; 1 if they differ.
        onto_itself = epsilon / process.vocabulary.num_tokens
        shuffled_if_equal = onto_itself / (1.0 - epsilon + onto_itself)
        shuffled = torch.ones_like(t).masked_fill(zt == x0, shuffled_if_equal)
        at_token = self.lam * ((1.0 - epsilon) * shuffled + epsilon * (1.0 - shuffled))
        share = process.schedule.alpha(t) if self.weights == "flat" else torch.ones_like(t)
        return torch.where(zt == process.vocabulary.root, 1.0 / masked, at_token / share)

    def divergence(
        self, process: EpsilonHybrid, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        return process.decode_nll(prediction, x0, zt, t)


@final
class MixedEntropies(TrainingLoss[GammaHybrid]):
    """Mixed score entropies of masked and uniform diffusion, for hybrid_gamma.

    (1 - gamma) times the loss of masked diffusion at masks, gamma times that of uniform diffusion
    at tokens. Both use the whole noise, e^sigma in place of e^{(1 - gamma) sigma} and
    e^{gamma sigma}, so that the sum is not a bound for 0 < gamma < 1.
    """

    name = "published"

    def __init__(self, process: GammaHybrid) -> None:
        vocabulary = process.vocabulary
        tokens = process.uniform.vocabulary
        whole_noise = PowerOf(process.noise, process.masking + process.redrawing)  # e^-sigma
        self.masked = MixtureProcess(vocabulary, whole_noise, mask_distribution(vocabulary))
        self.uniform = MixtureProcess(tokens, whole_noise, token_distribution(tokens))

    def weight(self, process: GammaHybrid, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        masks, tokens = self._split(zt)
        at_mask = (1.0 - process.gamma) * self.masked.weight(x0, masks, t)
        at_token = process.gamma * self.uniform.weight(x0, tokens, t)
        return torch.where(zt == process.vocabulary.root, at_mask, at_token)

    def divergence(
        self,
        process: GammaHybrid,
        prediction: CleanDistribution | Score,
        x0: Tensor,
        zt: Tensor,
        t: Tensor,
    ) -> Tensor:
        root = process.vocabulary.root
        masks, tokens = self._split(zt)
        ratio = _log_ratio(process, prediction, zt, interior(t))
        at_mask = self.masked.divergence(Score(ratio), x0, masks, t)
        at_token = self.uniform.divergence(Score(ratio[:, :root]), x0, tokens, t)
        return torch.where(zt == root, at_mask, at_token)

    def _split(self, zt: Tensor) -> tuple[Tensor, Tensor]:
        """Return states [r] for both formulas: all masks, and z_t with token 0 for the mask."""
        root = self.masked.vocabulary.root
        return torch.full_like(zt, root), zt.remainder(root)


def _log_ratio(
    process: ForwardProcess, prediction: CleanDistribution | Score, zt: Tensor, t: Tensor
) -> Tensor:
    """[r,S] log of the probability of each state over that of z_t."""
    if isinstance(prediction, Score):
        return prediction.log_ratio
    log_marginal = process.log_marginal(prediction.log_mass(0), t)
    return log_marginal - log_marginal.gather(-1, zt.unsqueeze(-1))
