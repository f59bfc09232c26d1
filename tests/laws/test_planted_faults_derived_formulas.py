"""Faults planted in divergence, weight, posterior and decoding.

Each fault must be detected by one conformance check.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faults import (
    Fault,
    InactiveMasks,
    LatePosterior,
    NoClosingTerm,
    RawDecoding,
    assert_detected,
    masking,
    tree_on_pair,
    uniform_noise,
)
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.components import MixtureProcess
from ddiff.core.numerics import interior
from ddiff.core.prediction import Prediction, Score
from ddiff.core.process import TrainedPart
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.testing import derived_formulas, edge_cases


class SurpriseOfTheToken(TreeProcess):
    """Fault: the divergence at a node is -ln p of the leaf token instead of the node's child."""

    def divergence(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        if isinstance(prediction, Score):
            return super().divergence(prediction, x0, zt, t)
        return -prediction.log_child(zt, x0)


class OneTermOfTheDivergence(TreeProcess):
    """Fault: if clusters may be wrong (xi < 1), the divergence has only the true cluster's term.

    The code of arXiv 2510.08632 has this divergence.
    """

    def divergence(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        exact = super().divergence(prediction, x0, zt, t)
        if isinstance(prediction, Score):
            return exact
        right = self.vocabulary.ancestor(x0, 1) - self.vocabulary.offsets[1]
        log_spread = self.parents.log_spread(0, 1, prediction.log_mass(1))
        model = log_spread.gather(-1, right.unsqueeze(-1)).squeeze(-1)
        one_term = self.parents.xi[0] * (self.parents.xi[0] / model.exp()).log()
        return torch.where(self.vocabulary.level_of(zt) == 2, one_term, exact)


class NoTwoLevelPosterior(TreeProcess):
    """Fault: in the posterior, a mask becomes a cluster but never a leaf token."""

    def reverse_log_probs(self, log_p: Tensor, zt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        log_probs = super().reverse_log_probs(log_p, zt, t, s)
        states = torch.arange(self.vocabulary.num_states)
        far = self.vocabulary.level_of(states) < self.vocabulary.level_of(zt).unsqueeze(-1) - 1
        return log_probs.masked_fill(far, -torch.inf).log_softmax(-1)


class NormalizedLikelihood(TreeProcess):
    """Fault: the likelihoods q_t(z|x) are normalized over the tokens x."""

    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        return super().log_likelihood(zt, t).log_softmax(-1)


class DivergencePlusOne(MixtureProcess):
    """Fault: the divergence lacks the term -1, so it is not 0 for the true token."""

    def divergence(self, prediction: Prediction, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().divergence(prediction, x0, zt, t) + 1.0


class PublishedFactors(MixtureProcess):
    """Fault: weight and divergence are the factors of arXiv 2503.04482 (GIDD).

    With the arrival rate omega, q = q_t(z|x) and the ratio rho of true and predicted q, the factors
    are omega/q and KL + rho - 1 - ln rho. Their product is the correct integrand of the bound, but
    the weight is not the reverse rate, as a loss that clips weights requires.
    """

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().weight(x0, zt, t) / self._elsewhere(x0, zt, interior(t))

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return self.mismatch(prediction, x0, zt, t)


class DoubledDensity(TreeProcess):
    """Fault: the integrand of the bound is doubled, but weight and divergence are not."""

    def density(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return 2.0 * super().density(prediction, x0, zt, t)


class InfinityTimesZero(MixtureProcess):
    """Fault: rows without loss are multiplied by 0 after the logarithm of a probability of 0."""

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        surprise = prediction.log_prob(x0).exp().log() if not isinstance(prediction, Score) else 0.0
        return torch.where(
            self.active(zt), super().divergence(prediction, x0, zt, t), surprise * 0.0
        )


class InfinityMinusInfinity(MixtureProcess):
    """Fault: -ln P(x|z) is the difference of two logarithms that may both be infinite."""

    def decode_nll(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        joint = self._log_decode_weights(prediction, zt, t)
        return joint.logsumexp(-1) - joint.gather(-1, x0.unsqueeze(-1)).squeeze(-1)


class DoubledScoreDensity(MixtureProcess):
    """Fault: the integrand of the bound is doubled if the network predicts scores."""

    def density(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        charged = super().density(prediction, x0, zt, t)
        return 2.0 * charged if isinstance(prediction, Score) else charged


class ScopeOfItself(TreeProcess):
    """Fault: `scope` declares that a leaf token needs predictions only below the token itself."""

    def scope(self, zt: Tensor) -> Tensor:
        return zt


class TooFewTrainedParts(TreeProcess):
    """Fault: `trained_part` names only the tokens below the node, although clusters may be wrong.

    If xi < 1, the bound at a node trains predictions of all tokens.
    """

    def trained_part(self, zt: Tensor) -> Tensor:
        return torch.where(self.active(zt), int(TrainedPart.BELOW_NODE), int(TrainedPart.NONE))


FAULTS = [
    Fault(
        "the decoding term is -ln p(x)",
        derived_formulas.decode_nll_is_derived,
        tree_on_pair(TreeProcess, 0.8),
        tree_on_pair(RawDecoding, 0.8),
    ),
    Fault(
        "the divergence at a node is that of the leaf token",
        derived_formulas.density_is_derived,
        tree_on_pair(TreeProcess),
        tree_on_pair(SurpriseOfTheToken),
    ),
    Fault(
        "the posterior has no two-level jumps",
        derived_formulas.posterior_is_bayes,
        tree_on_pair(TreeProcess),
        tree_on_pair(NoTwoLevelPosterior),
    ),
    Fault(
        "the divergence at the mask has one term only",
        derived_formulas.density_is_derived,
        tree_on_pair(TreeProcess, 0.8),
        tree_on_pair(OneTermOfTheDivergence, 0.8),
    ),
    Fault(
        "the posterior is that of a later time",
        derived_formulas.posterior_is_derived,
        lambda: NoTwoLevelPosterior(FlatVocabulary(3), LogTimeClock((1.0,))),
        uniform_noise(LatePosterior),
    ),
    Fault(
        "likelihoods are normalized over tokens",
        derived_formulas.likelihood_is_derived,
        tree_on_pair(TreeProcess),
        tree_on_pair(NormalizedLikelihood),
    ),
    Fault(
        "the divergence is not 0 for the true token",
        derived_formulas.density_is_a_divergence,
        uniform_noise(MixtureProcess),
        uniform_noise(DivergencePlusOne),
    ),
    Fault(
        "weight and divergence are the published factors",
        derived_formulas.weight_is_derived,
        uniform_noise(MixtureProcess),
        uniform_noise(PublishedFactors),
    ),
    Fault(
        "the gradient is infinity times 0",
        edge_cases.gradients_are_finite,
        masking(MixtureProcess),
        masking(InfinityTimesZero),
    ),
    Fault(
        "the decoding term is inf - inf",
        edge_cases.impossible_truth_is_bayes,
        masking(MixtureProcess),
        masking(InfinityMinusInfinity),
    ),
    Fault(
        "weight times divergence is not the density",
        derived_formulas.weight_times_divergence_is_density,
        tree_on_pair(TreeProcess),
        tree_on_pair(DoubledDensity),
    ),
    Fault(
        "the density of scores is doubled",
        derived_formulas.density_accepts_scores,
        uniform_noise(MixtureProcess),
        uniform_noise(DoubledScoreDensity),
    ),
    Fault(
        "the closing term is 0",
        derived_formulas.closing_kl_is_derived,
        tree_on_pair(TreeProcess),
        tree_on_pair(NoClosingTerm),
    ),
    Fault(
        "masks are inactive",
        derived_formulas.active_covers_density,
        tree_on_pair(TreeProcess),
        tree_on_pair(InactiveMasks),
    ),
    Fault(
        "the scope of a leaf token is the token",
        derived_formulas.scope_suffices,
        tree_on_pair(TreeProcess),
        tree_on_pair(ScopeOfItself),
    ),
    Fault(
        "trained_part is too small",
        derived_formulas.trained_part_suffices,
        tree_on_pair(TreeProcess, 0.8),
        tree_on_pair(TooFewTrainedParts, 0.8),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
