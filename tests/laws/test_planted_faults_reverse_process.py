"""Faults planted in the chain in reverse time, each found by the law meant for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import THREE
from faults import CLOCK3, Fault, LatePosterior, assert_found, late, mixture, on_pair, uneven
from torch import Tensor

from ddiff.core.interpolating import MixtureProcess
from ddiff.core.kernel import InterpolatingKernel, Kernel
from ddiff.core.prediction import Score
from ddiff.core.process import Query
from ddiff.core.tree import TreeProcess
from ddiff.testing import reverse_process


class DecodedByShares(MixtureProcess):
    """A score is decoded by its own shares among the words, as if they were not mixed with noise."""

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        return score.log_ratio[:, : self.vocabulary.num_tokens].log_softmax(-1)


class FromTheNoiseAtZero(MixtureProcess):
    """The operator from the clean token begins at z_0, which has noise in it already."""

    def from_clean(self, t: Tensor) -> Kernel:
        return self.transition(torch.zeros_like(t), t)


class StayingByAlpha(MixtureProcess):
    """A word that is redrawn as itself is taken for changed."""

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.alpha(t)


class EvidenceLeftOut(MixtureProcess):
    """A score decoded by itself, without what the row's own state says."""

    def decode_nll(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        if not hasattr(prediction, "log_ratio"):
            return super().decode_nll(prediction, x0, zt, t)
        return -prediction.log_ratio.log_softmax(-1).gather(-1, x0.unsqueeze(-1)).squeeze(-1)


class OutwardRates(MixtureProcess):
    """Q[z,y] where Q[y,z] is due."""

    def reverse_rates(self, prediction: Any, zt: Tensor, t: Tensor) -> Tensor:
        outward = self.rates(t).row(zt).scatter(-1, zt.unsqueeze(-1), 0.0)
        return outward * self._log_ratio(prediction, zt, t).exp()


class HalfTheRates(MixtureProcess):
    def reverse_rates(self, prediction: Any, zt: Tensor, t: Tensor) -> Tensor:
        return 0.5 * super().reverse_rates(prediction, zt, t)


class ClimbingFromTheStart(TreeProcess):
    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().forward_step(zs, torch.zeros_like(s), t, u)


class StrayingOnceMore(TreeProcess):
    """A climb that strays from the wrong level's parents: as if every row started at its word."""

    def _stray(self, right: Tensor, i: int, j: int, u: Tensor) -> Tensor:
        return super()._stray(right, 0, j, u)


class TakingEveryCandidate(MixtureProcess):
    """No thinning: the bound taken for the rate."""

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().event(query, zt, t, u * torch.tensor([0.0, 1.0], dtype=torch.float64))


class EventsToTheWords(TreeProcess):
    """A mask's event reveals its word, clusters skipped."""

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self.decode(query, zt, t, u)


class EventsTooOften(TreeProcess):
    """Candidates at twice the rate."""

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().event_time(zt, t, u.sqrt())


class NothingForeseen(MixtureProcess):
    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return torch.where(zt == 0, 0.0, super().event_time(zt, t, u))


class AskingTwiceAnEvent(TreeProcess):
    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().event(query, super().event(query, zt, t, u), t, u)


class SaidToReveal(TreeProcess):
    """Clusters may be wrong, and yet a word is said to lie below the cluster seen."""

    is_monotone = True


class DividingByTheDiagonal(InterpolatingKernel):
    def solve(self, vector: Tensor) -> Tensor:
        return vector / self.stay.unsqueeze(-1)


class SolvedByTheDiagonal(MixtureProcess):
    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        kernel = super().transition(s, t)
        return DividingByTheDiagonal(kernel.stay, kernel.arrive)  # type: ignore[attr-defined]


FAULTS = [
    Fault(
        "scores decoded by shares",
        reverse_process.scores_decode_to_posterior,
        mixture(MixtureProcess),
        mixture(DecodedByShares),
    ),
    Fault(
        "from z_0, not from x",
        reverse_process.from_clean_is_marginal,
        lambda: late(MixtureProcess),
        lambda: late(FromTheNoiseAtZero),
    ),
    Fault(
        "alpha for q(x|x)",
        reverse_process.stay_probability_is_derived,
        mixture(MixtureProcess),
        mixture(StayingByAlpha),
    ),
    Fault(
        "a score without evidence",
        reverse_process.scores_at_ends,
        uneven(MixtureProcess),
        uneven(EvidenceLeftOut),
    ),
    Fault(
        "rates turned round",
        reverse_process.reverse_flows_balance,
        uneven(MixtureProcess),
        uneven(OutwardRates),
    ),
    Fault(
        "half the rates",
        reverse_process.reverse_rates_make_density,
        uneven(MixtureProcess),
        uneven(HalfTheRates),
    ),
    Fault(
        "rates of another posterior",
        reverse_process.reverse_rates_make_posterior,
        uneven(MixtureProcess),
        uneven(LatePosterior),
    ),
    Fault(
        "climbing from the start",
        reverse_process.forward_step_follows_transition,
        on_pair(TreeProcess),
        on_pair(ClimbingFromTheStart),
    ),
    Fault(
        "straying as from a word",
        reverse_process.forward_step_follows_transition,
        lambda: TreeProcess(THREE, CLOCK3, (0.8, 0.7)),
        lambda: StrayingOnceMore(THREE, CLOCK3, (0.8, 0.7)),
    ),
    Fault(
        "every candidate taken",
        reverse_process.events_follow_reverse_rates,
        uneven(MixtureProcess),
        uneven(TakingEveryCandidate),
    ),
    Fault(
        "events that skip a level",
        reverse_process.events_follow_reverse_rates,
        on_pair(TreeProcess),
        on_pair(EventsToTheWords),
    ),
    Fault(
        "events too often",
        reverse_process.events_follow_reverse_rates,
        on_pair(TreeProcess),
        on_pair(EventsTooOften),
    ),
    Fault(
        "nothing foreseen",
        reverse_process.events_follow_reverse_rates,
        uneven(MixtureProcess),
        uneven(NothingForeseen),
    ),
    Fault(
        "two visits in an event",
        reverse_process.events_query_once,
        on_pair(TreeProcess),
        on_pair(AskingTwiceAnEvent),
    ),
    Fault(
        "words said to be settled",
        reverse_process.monotone_moves_reveal,
        on_pair(TreeProcess),
        on_pair(SaidToReveal, 0.8),
    ),
    Fault(
        "solved by the diagonal",
        reverse_process.solve_inverts,
        uneven(MixtureProcess),
        uneven(SolvedByTheDiagonal),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_found(fault)
