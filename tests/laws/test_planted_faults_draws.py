"""Faults planted in random draws of a process; each must be detected by one conformance check."""

from __future__ import annotations

import pytest
import torch
from faults import Fault, assert_detected, tree_on_pair, uneven_noise, uniform_noise
from torch import Tensor

from ddiff.core.components import MixtureProcess
from ddiff.core.process import Query
from ddiff.core.tree import TreeProcess
from ddiff.testing import draws


class StepDrawsAtT(MixtureProcess):
    """Fault: `step` from t to s draws states with the noise of time t."""

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        return self._leave(query, zt, t, t, self._arrive_at(zt, s, t), u)


class StepAcceptsAll(MixtureProcess):
    """Fault: `step` accepts all candidate moves."""

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        arrive, before, now = self._arrive_at(zt, s, t), self.noise_at(zt, s), self.noise_at(zt, t)
        below = u[:, :1] < (arrive * (1.0 - before) / now).unsqueeze(-1)
        return super().step(
            query, zt, t, s, torch.where(below, u * torch.tensor([0.0, 1.0]).double(), u)
        )


class SampleOneLevelOff(TreeProcess):
    """Fault: `sample` returns states that are one level too low."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        level = (u[:, :1] < self.clock.cdf(t)[:, :-1]).sum(-1)
        return self.vocabulary.ancestor(x0, level)


class UniformsOfNeighbours(TreeProcess):
    """Fault: `sample` uses the uniforms of the previous row."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().sample(x0, t, u.roll(1, 0))


class WritesIntoX0(TreeProcess):
    """Fault: `sample` writes its result into the argument x0."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return x0.copy_(super().sample(x0, t, u))


class StepOneLevelAtATime(TreeProcess):
    """Fault: `step` descends at most one level, so a mask never becomes a leaf token."""

    def _draw_at_level(self, query: Query, zt: Tensor, target: Tensor, u: Tensor) -> Tensor:
        return super()._draw_at_level(
            query, zt, torch.maximum(target, self.vocabulary.level_of(zt) - 1), u
        )


class MedianDecode(TreeProcess):
    """Fault: `decode` ignores the given uniforms and uses 0.5 for all rows."""

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().decode(query, zt, t, torch.full_like(u, 0.5))


class TwoQueriesInAStep(TreeProcess):
    """Fault: `step` queries the network twice."""

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        halfway = super().step(query, zt, t, (s + t) / 2.0, u)
        return super().step(query, halfway, (s + t) / 2.0, s, u)


class QueryForNothing(MixtureProcess):
    """Fault: `decode` queries the network once more and ignores the result."""

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        query(torch.arange(len(zt)), self.scope(zt), lambda prediction: torch.arange(len(zt)))
        return super().decode(query, zt, t, u)


FAULTS = [
    Fault(
        "sample returns states one level too low",
        draws.sample_follows_marginal,
        tree_on_pair(TreeProcess),
        tree_on_pair(SampleOneLevelOff),
    ),
    Fault(
        "step has no two-level jumps",
        draws.step_follows_posterior,
        tree_on_pair(TreeProcess),
        tree_on_pair(StepOneLevelAtATime),
    ),
    Fault(
        "sample uses the uniforms of another row",
        draws.draws_depend_on_own_uniforms,
        tree_on_pair(TreeProcess),
        tree_on_pair(UniformsOfNeighbours),
    ),
    Fault(
        "step draws from the marginal at t",
        draws.step_follows_posterior,
        uneven_noise(MixtureProcess),
        uneven_noise(StepDrawsAtT),
    ),
    Fault(
        "step accepts all candidates",
        draws.step_follows_posterior,
        uneven_noise(MixtureProcess),
        uneven_noise(StepAcceptsAll),
    ),
    Fault(
        "decode uses no randomness",
        draws.decode_follows_bayes,
        tree_on_pair(TreeProcess),
        tree_on_pair(MedianDecode),
    ),
    Fault(
        "step queries the network twice",
        draws.step_queries_once,
        tree_on_pair(TreeProcess),
        tree_on_pair(TwoQueriesInAStep),
    ),
    Fault(
        "decode queries the network without need",
        draws.decode_queries_once,
        uniform_noise(MixtureProcess),
        uniform_noise(QueryForNothing),
    ),
    Fault(
        "an argument is modified",
        draws.arguments_are_unchanged,
        tree_on_pair(TreeProcess),
        tree_on_pair(WritesIntoX0),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)
