"""Faults planted in draws of a process, each found by the law meant for it."""

from __future__ import annotations

import pytest
import torch
from faults import Fault, assert_found, mixture, on_pair, uneven
from torch import Tensor

from ddiff.core.interpolating import MixtureProcess
from ddiff.core.process import Query
from ddiff.core.tree import TreeProcess
from ddiff.testing import draws


class MovingToTheSameTime(MixtureProcess):
    """A step that draws from the marginal at t, where that at s is due."""

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        return self._leave(query, zt, t, t, self._arrive_at(zt, s, t), u)


class MovingWithTheBound(MixtureProcess):
    """A step whose candidates all move."""

    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        arrive, before, now = self._arrive_at(zt, s, t), self.noise_at(zt, s), self.noise_at(zt, t)
        below = u[:, :1] < (arrive * (1.0 - before) / now).unsqueeze(-1)
        return super().step(
            query, zt, t, s, torch.where(below, u * torch.tensor([0.0, 1.0]).double(), u)
        )


class OneLevelTooFew(TreeProcess):
    """An off-by-one level in the draw."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        level = (u[:, :1] < self.clock.cdf(t)[:, :-1]).sum(-1)
        return self.vocabulary.ancestor(x0, level)


class NeighboursUniforms(TreeProcess):
    """Draws with the right law from the uniforms of the row before."""

    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().sample(x0, t, u.roll(1, 0))


class WritingIntoX0(TreeProcess):
    def sample(self, x0: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return x0.copy_(super().sample(x0, t, u))


class StepByStep(TreeProcess):
    """A step that descends one level at most, so that a mask never becomes a word at once."""

    def _down_to(self, query: Query, zt: Tensor, target: Tensor, u: Tensor) -> Tensor:
        return super()._down_to(
            query, zt, torch.maximum(target, self.vocabulary.level_of(zt) - 1), u
        )


class MostLikely(TreeProcess):
    """A last draw that is no draw."""

    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        return super().decode(query, zt, t, torch.full_like(u, 0.5))


class AskingTwice(TreeProcess):
    def step(self, query: Query, zt: Tensor, t: Tensor, s: Tensor, u: Tensor) -> Tensor:
        halfway = super().step(query, zt, t, (s + t) / 2.0, u)
        return super().step(query, halfway, (s + t) / 2.0, s, u)


class AskingAlways(MixtureProcess):
    def decode(self, query: Query, zt: Tensor, t: Tensor, u: Tensor) -> Tensor:
        query(torch.arange(len(zt)), self.scope(zt), lambda prediction: torch.arange(len(zt)))
        return super().decode(query, zt, t, u)


FAULTS = [
    Fault(
        "off-by-one level in the draw",
        draws.sample_follows_marginal,
        on_pair(TreeProcess),
        on_pair(OneLevelTooFew),
    ),
    Fault(
        "step without two-level jumps",
        draws.step_follows_posterior,
        on_pair(TreeProcess),
        on_pair(StepByStep),
    ),
    Fault(
        "another position's uniforms",
        draws.draws_depend_on_own_uniforms,
        on_pair(TreeProcess),
        on_pair(NeighboursUniforms),
    ),
    Fault(
        "moving to the same time",
        draws.step_follows_posterior,
        uneven(MixtureProcess),
        uneven(MovingToTheSameTime),
    ),
    Fault(
        "moving with the bound",
        draws.step_follows_posterior,
        uneven(MixtureProcess),
        uneven(MovingWithTheBound),
    ),
    Fault(
        "an arg-max last draw",
        draws.decode_follows_bayes,
        on_pair(TreeProcess),
        on_pair(MostLikely),
    ),
    Fault(
        "two visits in a step", draws.step_queries_once, on_pair(TreeProcess), on_pair(AskingTwice)
    ),
    Fault(
        "a visit for nothing",
        draws.decode_queries_once,
        mixture(MixtureProcess),
        mixture(AskingAlways),
    ),
    Fault(
        "an argument that is written to",
        draws.arguments_are_unchanged,
        on_pair(TreeProcess),
        on_pair(WritingIntoX0),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_found(fault)
