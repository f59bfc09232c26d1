"""Faults planted in the reverse-time chain; each must be detected by one conformance check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import THREE
from faults import (
    Fault,
    LatePosterior,
    assert_detected,
    build_with_parents,
    noisy_from_the_start,
    tree_on_pair,
    uneven_noise,
    uniform_noise,
)
from torch import Tensor

from ddiff.core.components import MixtureProcess
from ddiff.core.kernel import InterpolatingKernel, Kernel
from ddiff.core.prediction import Score
from ddiff.core.process import Query
from ddiff.core.tree import TreeProcess
from ddiff.core.tree_parents import StochasticParents
from ddiff.testing import reverse_process


class DecodedWithoutNoise(MixtureProcess):
    """Fault: `tweedie` returns the normalized score of the tokens and ignores the noise."""

    def tweedie(self, score: Score, t: Tensor) -> Tensor:
        return score.log_ratio[:, : self.vocabulary.num_tokens].log_softmax(-1)


class FromNoisyStart(MixtureProcess):
    """Fault: `from_clean` starts at z_0, which is already noisy."""

    def from_clean(self, t: Tensor) -> Kernel:
        return self.transition(torch.zeros_like(t), t)


class AlphaAsStayProbability(MixtureProcess):
    """Fault: `stay_probability` leaves out tokens that noise replaces by themselves."""

    def stay_probability(self, x0: Tensor, t: Tensor) -> Tensor:
        return self.alpha(t)


class DecodedWithoutEvidence(MixtureProcess):
    """Fault: `decode_nll` of a score ignores the current state of the row."""

    def decode_nll(self, prediction: Any, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        if not isinstance(prediction, Score):
            return super().decode_nll(prediction, x0, zt, t)
        return -prediction.log_ratio.log_softmax(-1).gather(-1, x0.unsqueeze(-1)).squeeze(-1)


class ForwardRatesOut(MixtureProcess):
    """Fault: reverse rates from z to y use the forward rate Q[z,y] in place of Q[y,z]."""

    def reverse_rates(self, prediction: Any, zt: Tensor, t: Tensor) -> Tensor:
        outward = self.rates(t).row(zt).scatter(-1, zt.unsqueeze(-1), 0.0)
        return outward * self._log_ratio(prediction, zt, t).exp()


class HalvedRates(MixtureProcess):
    """Fault: reverse rates are half the true rates."""

    def reverse_rates(self, prediction: Any, zt: Tensor, t: Tensor) -> Tensor:
        return 0.5 * super().reverse_rates(prediction, zt, t)


class ForwardStepFromZero(TreeProcess):
    """Fault: `forward_step` starts at time 0 instead of s."""

    def forward_step(self, zs: Tensor, s: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().forward_step(zs, torch.zeros_like(s), t, u)


class ParentsOfTheWrongLevel(StochasticParents):
    """Fault: wrong parents are drawn as if every state were a leaf token before the step."""

    def _draw_stray(self, ancestor: Tensor, i: int, j: int, u: Tensor) -> Tensor:
        return super()._draw_stray(ancestor, 0, j, u)


class AcceptEveryEvent(MixtureProcess):
    """Fault: every candidate event is accepted."""

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().event(query, zt, t, u * torch.tensor([0.0, 1.0], dtype=torch.float64))


class EventsSkipLevels(TreeProcess):
    """Fault: an event reveals the leaf token and skips the clusters."""

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return self.decode(query, zt, t, u)


class EventsAtDoubleRate(TreeProcess):
    """Fault: candidate events occur at twice the rate."""

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().event_time(zt, t, u.sqrt())


class MissedEvents(MixtureProcess):
    """Fault: `event_time` finds no event at token 0."""

    def event_time(self, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return torch.where(zt == 0, 0.0, super().event_time(zt, t, u))


class TwoQueriesInAnEvent(TreeProcess):
    """Fault: `event` queries the network twice."""

    def event(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().event(query, super().event(query, zt, t, u), t, u)


class FalselyMonotone(TreeProcess):
    """Fault: the process declares `is_monotone`, although its clusters may be wrong.

    The reversed chain can then leave the descendants of the current state.
    """

    is_monotone = True


class DiagonalSolveKernel(InterpolatingKernel):
    """Fault: `solve` divides by the diagonal, as if the matrix were diagonal."""

    def solve(self, vector: Tensor) -> Tensor:
        return vector / self.stay.unsqueeze(-1)


class DiagonalSolve(MixtureProcess):
    """Fault: the transition has the kernel `DiagonalSolveKernel`."""

    def transition(self, s: Tensor, t: Tensor) -> Kernel:
        kernel = super().transition(s, t)
        return DiagonalSolveKernel(kernel.stay, kernel.arrive)  # type: ignore[attr-defined]


FAULTS = [
    Fault(
        "tweedie ignores the noise",
        reverse_process.scores_decode_to_posterior,
        uniform_noise(MixtureProcess),
        uniform_noise(DecodedWithoutNoise),
    ),
    Fault(
        "from_clean starts at z_0 instead of x",
        reverse_process.from_clean_is_marginal,
        noisy_from_the_start(MixtureProcess),
        noisy_from_the_start(FromNoisyStart),
    ),
    Fault(
        "stay_probability is alpha instead of q(x|x)",
        reverse_process.stay_probability_is_derived,
        uniform_noise(MixtureProcess),
        uniform_noise(AlphaAsStayProbability),
    ),
    Fault(
        "decode_nll of a score ignores the own state",
        reverse_process.scores_at_ends,
        uneven_noise(MixtureProcess),
        uneven_noise(DecodedWithoutEvidence),
    ),
    Fault(
        "reverse rates use the forward rates out of the state",
        reverse_process.reverse_flows_balance,
        uneven_noise(MixtureProcess),
        uneven_noise(ForwardRatesOut),
    ),
    Fault(
        "reverse rates are halved",
        reverse_process.reverse_rates_make_density,
        uneven_noise(MixtureProcess),
        uneven_noise(HalvedRates),
    ),
    Fault(
        "the posterior is that of a later time",
        reverse_process.reverse_rates_make_posterior,
        uneven_noise(MixtureProcess),
        uneven_noise(LatePosterior),
    ),
    Fault(
        "forward_step starts at time 0",
        reverse_process.forward_step_follows_transition,
        tree_on_pair(TreeProcess),
        tree_on_pair(ForwardStepFromZero),
    ),
    Fault(
        "wrong parents are drawn for the wrong level",
        reverse_process.forward_step_follows_transition,
        lambda: build_with_parents(StochasticParents, THREE, 0.8),
        lambda: build_with_parents(ParentsOfTheWrongLevel, THREE, 0.8),
    ),
    Fault(
        "every candidate event is accepted",
        reverse_process.events_follow_reverse_rates,
        uneven_noise(MixtureProcess),
        uneven_noise(AcceptEveryEvent),
    ),
    Fault(
        "events skip a level",
        reverse_process.events_follow_reverse_rates,
        tree_on_pair(TreeProcess),
        tree_on_pair(EventsSkipLevels),
    ),
    Fault(
        "events occur at twice the rate",
        reverse_process.events_follow_reverse_rates,
        tree_on_pair(TreeProcess),
        tree_on_pair(EventsAtDoubleRate),
    ),
    Fault(
        "event_time misses events",
        reverse_process.events_follow_reverse_rates,
        uneven_noise(MixtureProcess),
        uneven_noise(MissedEvents),
    ),
    Fault(
        "event queries the network twice",
        reverse_process.events_query_once,
        tree_on_pair(TreeProcess),
        tree_on_pair(TwoQueriesInAnEvent),
    ),
    Fault(
        "the process is not monotone as declared",
        reverse_process.monotone_moves_reveal,
        tree_on_pair(TreeProcess),
        tree_on_pair(FalselyMonotone, 0.8),
    ),
    Fault(
        "solve divides by the diagonal",
        reverse_process.solve_inverts,
        uneven_noise(MixtureProcess),
        uneven_noise(DiagonalSolve),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
