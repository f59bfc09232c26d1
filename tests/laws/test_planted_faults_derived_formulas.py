"""Faults planted in the derived formulas and their edge cases, found by their laws."""

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
from ddiff.core.prediction import CleanDistribution, Score
from ddiff.core.process import TrainedPart
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.testing import derived_formulas, edge_cases


class SurpriseOfTheToken(TreeProcess):
    """Charges for the leaf token at every node, instead of the next node down."""

    def _kl_below(
        self, prediction: CleanDistribution, x0: Tensor, zt: Tensor, level: Tensor
    ) -> Tensor:
        return -prediction.log_child(zt, x0)


class OneTermOfTheDivergence(TreeProcess):
    """For xi < 1, the published loss keeps only the term of the true cluster."""

    def _kl_at_level(
        self, prediction: CleanDistribution, x0: Tensor, zt: Tensor, level: int
    ) -> Tensor:
        right = self.vocabulary.ancestor(x0, 1) - self.vocabulary.offsets[1]
        model = (
            self.parents.log_spread(0, 1, prediction.log_mass(1))
            .gather(-1, right.unsqueeze(-1))
            .squeeze(-1)
        )
        return self.parents.xi[0] * (self.parents.xi[0] / model.exp()).log()


class NoTwoLevelPosterior(TreeProcess):
    """Posterior in which a mask becomes a cluster at most, never a leaf token."""

    def reverse_log_probs(self, log_p: Tensor, zt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        log_probs = super().reverse_log_probs(log_p, zt, t, s)
        states = torch.arange(self.vocabulary.num_states)
        far = self.vocabulary.level_of(states) < self.vocabulary.level_of(zt).unsqueeze(-1) - 1
        return log_probs.masked_fill(far, -torch.inf).log_softmax(-1)


class NormalizedLikelihood(TreeProcess):
    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        return super().log_likelihood(zt, t).log_softmax(-1)


class DivergencePlusOne(MixtureProcess):
    """KL + rho - ln rho without the -1, so that it is not 0 for the true token."""

    def divergence(
        self, prediction: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor
    ) -> Tensor:
        return super().divergence(prediction, x0, zt, t) + 1.0


class PublishedFactors(MixtureProcess):
    """omega/q times (KL + rho - 1 - ln rho), as published: right density, wrong weight for
    clipping."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().weight(x0, zt, t) / self._elsewhere(x0, zt, interior(t))

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return self.mismatch(prediction, x0, zt, t)


class DoubledDensity(TreeProcess):
    def density(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return 2.0 * super().density(prediction, x0, zt, t)


class InfinityTimesZero(MixtureProcess):
    """Masks inactive rows after the logarithm of a probability of 0 was taken."""

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        surprise = prediction.log_prob(x0).exp().log() if not isinstance(prediction, Score) else 0.0
        return torch.where(
            self.active(zt), super().divergence(prediction, x0, zt, t), surprise * 0.0
        )


class InfinityMinusInfinity(MixtureProcess):
    """-ln P(x|z) as a difference of two logarithms that may both be infinite."""

    def decode_nll(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        joint = self._log_decode_weights(prediction, zt, t)
        return joint.logsumexp(-1) - joint.gather(-1, x0.unsqueeze(-1)).squeeze(-1)


class DoubledScoreDensity(MixtureProcess):
    """Doubles the density of scores."""

    def density(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        charged = super().density(prediction, x0, zt, t)
        return 2.0 * charged if isinstance(prediction, Score) else charged


class ScopeOfItself(TreeProcess):
    """Uses z itself as scope, even if it is a leaf token."""

    def scope(self, zt: Tensor) -> Tensor:
        return zt


class TooFewTrainedParts(TreeProcess):
    def trained_part(self, zt: Tensor) -> Tensor:
        return torch.where(self.active(zt), int(TrainedPart.BELOW_NODE), int(TrainedPart.NONE))


FAULTS = [
    Fault(
        "-ln p(x) as decoding term",
        derived_formulas.decode_nll_is_derived,
        tree_on_pair(TreeProcess, 0.8),
        tree_on_pair(RawDecoding, 0.8),
    ),
    Fault(
        "surprise of the leaf token at every level",
        derived_formulas.density_is_derived,
        tree_on_pair(TreeProcess),
        tree_on_pair(SurpriseOfTheToken),
    ),
    Fault(
        "posterior without two-level jumps",
        derived_formulas.posterior_is_bayes,
        tree_on_pair(TreeProcess),
        tree_on_pair(NoTwoLevelPosterior),
    ),
    Fault(
        "one term of the divergence at the mask",
        derived_formulas.density_is_derived,
        tree_on_pair(TreeProcess, 0.8),
        tree_on_pair(OneTermOfTheDivergence, 0.8),
    ),
    Fault(
        "posterior of a later time",
        derived_formulas.posterior_is_derived,
        lambda: NoTwoLevelPosterior(FlatVocabulary(3), LogTimeClock((1.0,))),
        uniform_noise(LatePosterior),
    ),
    Fault(
        "normalized likelihoods",
        derived_formulas.likelihood_is_derived,
        tree_on_pair(TreeProcess),
        tree_on_pair(NormalizedLikelihood),
    ),
    Fault(
        "divergence not 0 for the true token",
        derived_formulas.density_is_a_divergence,
        uniform_noise(MixtureProcess),
        uniform_noise(DivergencePlusOne),
    ),
    Fault(
        "published weight and divergence",
        derived_formulas.weight_is_derived,
        uniform_noise(MixtureProcess),
        uniform_noise(PublishedFactors),
    ),
    Fault(
        "infinity times zero in the gradient",
        edge_cases.gradients_are_finite,
        masking(MixtureProcess),
        masking(InfinityTimesZero),
    ),
    Fault(
        "inf - inf",
        edge_cases.impossible_truth_is_bayes,
        masking(MixtureProcess),
        masking(InfinityMinusInfinity),
    ),
    Fault(
        "factors that do not multiply to the density",
        derived_formulas.weight_times_divergence_is_density,
        tree_on_pair(TreeProcess),
        tree_on_pair(DoubledDensity),
    ),
    Fault(
        "doubled density of scores",
        derived_formulas.density_accepts_scores,
        uniform_noise(MixtureProcess),
        uniform_noise(DoubledScoreDensity),
    ),
    Fault(
        "closing term of 0",
        derived_formulas.closing_kl_is_derived,
        tree_on_pair(TreeProcess),
        tree_on_pair(NoClosingTerm),
    ),
    Fault(
        "inactive masks",
        derived_formulas.active_covers_density,
        tree_on_pair(TreeProcess),
        tree_on_pair(InactiveMasks),
    ),
    Fault(
        "scope without its siblings",
        derived_formulas.scope_suffices,
        tree_on_pair(TreeProcess),
        tree_on_pair(ScopeOfItself),
    ),
    Fault(
        "trained_part names too little",
        derived_formulas.trained_part_suffices,
        tree_on_pair(TreeProcess, 0.8),
        tree_on_pair(TooFewTrainedParts, 0.8),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
