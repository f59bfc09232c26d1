"""Training losses of the published code of arXiv 2504.06416 ([objective] loss = "published").

They are used for training only. Evaluation reports the NELBO. The processes are defined in
`ddiff_hybrid.epsilon` and `ddiff_hybrid.gamma`.
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
    """Training loss of the code of arXiv 2504.06416, for hybrid_epsilon and hybrid_gamma."""

    class Config(ComponentConfig):
        lam: NonNegativeFloat | None = None
        """For hybrid_epsilon: weight of visible tokens, lambda of the paper; 1 by default."""
        weights: Literal["flat", "annealing"] | None = None
        """For hybrid_epsilon: "flat" (default) divides the weight of visible tokens by 1 - p, the
        probability that a token is visible (not masked)."""

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
                '[objective] loss = "published" takes lam and weights only with the process '
                "hybrid_epsilon, in which visible tokens have a separate weight; got the process "
                "hybrid_gamma. Leave lam and weights out."
            )
        return MixedEntropies(process)


@final
class EverywhereCrossEntropy(TrainingLoss[EpsilonHybrid]):
    """Weighted cross-entropy of the clean token at masks and at tokens, for hybrid_epsilon.

    The loss of a position is -ln P(x | z) times a weight, where x is its clean token and z the
    noisy sequence. The weight depends on the noisy state. p is the probability of a mask at time t,
    and epsilon the probability that a token was shuffled (replaced by a uniformly drawn token):

        mask                           1/p
        token that was shuffled        lam (1 - epsilon)
        token that was not shuffled    lam epsilon

    With weights = "flat" the two weights of tokens are divided by 1 - p.

    A noisy token that equals the clean token was not shuffled, or was shuffled to itself. Its
    weight is the mean of the two weights of tokens, with the probabilities of the two cases.
    """

    name = "published"

    def __init__(self, lam: float = 1.0, weights: Literal["flat", "annealing"] = "flat") -> None:
        self.lam = lam
        self.weights = weights

    def select_rows(self, process: EpsilonHybrid, noisy: Noisy, times: Times) -> Tensor:
        """Return a bool [B,L] that marks the positions with a loss.

        Masks have a loss. Tokens have a loss if the loss gives tokens a weight above 0. Positions
        that are clean or do not count in the bound have no loss.
        """
        rows = (times.speed > 0) & ~noisy.clean
        if self.lam * process.epsilon > 0.0:
            return rows
        return rows & (noisy.zt == process.vocabulary.root)

    def weight(self, process: EpsilonHybrid, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        epsilon = process.epsilon
        # The published code clamps to at least 1e-4.
        masked = process.schedule.one_minus_alpha(t).clamp(min=1e-4)
        # Probability that the token was shuffled, given x0 and z; 1 if x0 and z differ.
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
    """Mixture of the score entropies of masked and uniform diffusion, for hybrid_gamma.

    The loss is (1 - gamma) times the score entropy of masked diffusion at masks, and gamma times
    the score entropy of uniform diffusion at tokens. sigma is the total noise up to time t. The
    code of arXiv 2504.06416 uses e^sigma in both score entropies. The NELBO would have
    e^{(1 - gamma) sigma} at masks and e^{gamma sigma} at tokens, so that for 0 < gamma < 1 this
    loss is not a bound on the likelihood.
    """

    name = "published"

    def __init__(self, process: GammaHybrid) -> None:
        vocabulary = process.vocabulary
        tokens = process.uniform.vocabulary
        # The published losses use the whole noise in both terms, unlike the bound.
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
        # At t = 0 and t = 1 some ratios are 0 or infinite.
        ratio = _log_ratio(process, prediction, zt, interior(t))
        at_mask = self.masked.divergence(Score(ratio), x0, masks, t)
        at_token = self.uniform.divergence(Score(ratio[:, :root]), x0, tokens, t)
        return torch.where(zt == root, at_mask, at_token)

    def _split(self, zt: Tensor) -> tuple[Tensor, Tensor]:
        """Return the states [r] for the loss of masked diffusion and for that of uniform diffusion.

        - The states for masked diffusion are masks at all rows. The loss is used only at masks.
        - The states for uniform diffusion are the tokens of the rows, and token 0 at masks. The
          loss is used only at tokens.
        """
        root = self.masked.vocabulary.root
        return torch.full_like(zt, root), zt.remainder(root)


def _log_ratio(
    process: ForwardProcess, prediction: CleanDistribution | Score, zt: Tensor, t: Tensor
) -> Tensor:
    """Return the log-ratio [r,S] of the probability of each of the S states to that of z_t.

    If the prediction is a distribution of tokens, the probabilities are its marginal at time t. A
    score contains the log-ratios already.
    """
    if isinstance(prediction, Score):
        return prediction.log_ratio
    log_marginal = process.log_marginal(prediction.log_mass(0), t)
    return log_marginal - log_marginal.gather(-1, zt.unsqueeze(-1))
