"""Faults planted in the derived formulas and their edge cases, each found by the law meant for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from faults import (
    Fault,
    FreeClosing,
    IdleMasks,
    LatePosterior,
    RawDecoding,
    assert_found,
    masking,
    mixture,
    on_pair,
)
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.interpolating import MixtureProcess
from ddiff.core.numerics import interior
from ddiff.core.prediction import CleanDistribution, Score
from ddiff.core.process import TrainedPart
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.testing import derived_formulas, edge_cases


class OneLevelOff(TreeProcess):
    """Charges for the word at every node, where only the next node down is due."""

    def _surprise_below(
        self, law: CleanDistribution, x0: Tensor, zt: Tensor, level: Tensor
    ) -> Tensor:
        return -law.log_child(zt, x0)


class OneTermAtTheMask(TreeProcess):
    """For xi < 1 the published loss keeps one term of the divergence, that of the right cluster."""

    def _parent_surprise(
        self, law: CleanDistribution, x0: Tensor, zt: Tensor, level: int
    ) -> Tensor:
        right = self.vocabulary.ancestor(x0, 1) - self.vocabulary.offsets[1]
        model = (
            self.parents.log_spread(0, 1, law.log_mass(1))
            .gather(-1, right.unsqueeze(-1))
            .squeeze(-1)
        )
        return self.parents.xi[0] * (self.parents.xi[0] / model.exp()).log()


class NoTwoLevelJumps(TreeProcess):
    """A posterior that takes a mask to its cluster at most."""

    def reverse_log_probs(self, log_p: Tensor, zt: Tensor, t: Tensor, s: Tensor) -> Tensor:
        log_probs = super().reverse_log_probs(log_p, zt, t, s)
        states = torch.arange(self.vocabulary.num_states)
        far = self.vocabulary.level_of(states) < self.vocabulary.level_of(zt).unsqueeze(-1) - 1
        return log_probs.masked_fill(far, -torch.inf).log_softmax(-1)


class WrongLikelihood(TreeProcess):
    def log_likelihood(self, zt: Tensor, t: Tensor) -> Tensor:
        return super().log_likelihood(zt, t).log_softmax(-1)


class NegativeAtTheTruth(MixtureProcess):
    """KL + rho - ln rho, without the -1 that makes it a divergence."""

    def divergence(self, law: CleanDistribution, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().divergence(law, x0, zt, t) + 1.0


class PublishedSplit(MixtureProcess):
    """omega/q times KL + rho - 1 - ln rho: the same density, and another clipped loss than that of the same chain."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return super().weight(x0, zt, t) / self._elsewhere(x0, zt, interior(t))

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return self.mismatch(prediction, x0, zt, t)


class FactorsOfAnother(TreeProcess):
    def density(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        return 2.0 * super().density(prediction, x0, zt, t)


class DroppedAfterwards(MixtureProcess):
    """Words that no noise reaches are dropped after the logarithm of their probability was read."""

    def divergence(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        surprise = prediction.log_prob(x0).exp().log() if not isinstance(prediction, Score) else 0.0
        return torch.where(
            self.active(zt), super().divergence(prediction, x0, zt, t), surprise * 0.0
        )


class DifferenceOfInfinities(MixtureProcess):
    """-ln P(x|z) as the difference of two logarithms, both infinite where z says what x is."""

    def decode_nll(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        joint = self._decoding(prediction, zt, t)
        return joint.logsumexp(-1) - joint.gather(-1, x0.unsqueeze(-1)).squeeze(-1)


class ScoresTwice(MixtureProcess):
    """A score is charged as if it were a law's marginal, not a ratio."""

    def density(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        charged = super().density(prediction, x0, zt, t)
        return 2.0 * charged if hasattr(prediction, "log_ratio") else charged


class NarrowScope(TreeProcess):
    """What is read of words is settled; what is open below them is not what they ask about."""

    def scope(self, zt: Tensor) -> Tensor:
        return zt


class NarrowlyInformed(TreeProcess):
    def trained_part(self, zt: Tensor) -> Tensor:
        return torch.where(self.active(zt), int(TrainedPart.BELOW_NODE), int(TrainedPart.NONE))


FAULTS = [
    Fault(
        "raw -ln p(x) as decoding term",
        derived_formulas.decode_nll_is_derived,
        on_pair(TreeProcess, 0.8),
        on_pair(RawDecoding, 0.8),
    ),
    Fault(
        "off-by-one level in the bound",
        derived_formulas.density_is_derived,
        on_pair(TreeProcess),
        on_pair(OneLevelOff),
    ),
    Fault(
        "posterior without two-level jumps",
        derived_formulas.posterior_is_bayes,
        on_pair(TreeProcess),
        on_pair(NoTwoLevelJumps),
    ),
    Fault(
        "one-term perturbed-mask loss",
        derived_formulas.density_is_derived,
        on_pair(TreeProcess, 0.8),
        on_pair(OneTermAtTheMask, 0.8),
    ),
    Fault(
        "a posterior of other times",
        derived_formulas.posterior_is_derived,
        lambda: NoTwoLevelJumps(FlatVocabulary(3), LogTimeClock((1.0,))),
        mixture(LatePosterior),
    ),
    Fault(
        "normalised likelihoods",
        derived_formulas.likelihood_is_derived,
        on_pair(TreeProcess),
        on_pair(WrongLikelihood),
    ),
    Fault(
        "a divergence that is not 0 at the truth",
        derived_formulas.density_is_a_divergence,
        mixture(MixtureProcess),
        mixture(NegativeAtTheTruth),
    ),
    Fault(
        "the published split",
        derived_formulas.weight_is_derived,
        mixture(MixtureProcess),
        mixture(PublishedSplit),
    ),
    Fault(
        "dropped infinities",
        edge_cases.gradients_are_finite,
        masking(MixtureProcess),
        masking(DroppedAfterwards),
    ),
    Fault(
        "inf - inf",
        edge_cases.impossible_truth_is_bayes,
        masking(MixtureProcess),
        masking(DifferenceOfInfinities),
    ),
    Fault(
        "factors of another density",
        derived_formulas.weight_times_divergence_is_density,
        on_pair(TreeProcess),
        on_pair(FactorsOfAnother),
    ),
    Fault(
        "scores charged twice",
        derived_formulas.density_accepts_scores,
        mixture(MixtureProcess),
        mixture(ScoresTwice),
    ),
    Fault(
        "no closing term",
        derived_formulas.closing_kl_is_derived,
        on_pair(TreeProcess),
        on_pair(FreeClosing),
    ),
    Fault(
        "masks that are idle",
        derived_formulas.active_covers_density,
        on_pair(TreeProcess),
        on_pair(IdleMasks),
    ),
    Fault(
        "a scope with nothing in it",
        derived_formulas.scope_suffices,
        on_pair(TreeProcess),
        on_pair(NarrowScope),
    ),
    Fault(
        "too little informed",
        derived_formulas.trained_part_suffices,
        on_pair(TreeProcess, 0.8),
        on_pair(NarrowlyInformed, 0.8),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_found(fault)
