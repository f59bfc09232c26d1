"""Faults planted in the bound; each must be detected by one conformance check."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import uniform
from faults import (
    ONE_LEVEL,
    STOCHASTIC_PARENTS,
    Fault,
    InactiveMasks,
    LatePosterior,
    NoClosingTerm,
    RawDecoding,
    assert_detected,
    full_conditional_table,
    tree_on_pair,
    uniform_noise,
)
from torch import Tensor

from ddiff.core.components import MixtureProcess
from ddiff.core.tree import TreeProcess
from ddiff.testing import bound
from ddiff.testing.bound import bent_path


class SwappedWeights(TreeProcess):
    """Fault: masks have the loss weight of clusters, and clusters that of masks."""

    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        other = torch.where(
            zt == self.vocabulary.root, self.vocabulary.ancestor(x0, 1), self.vocabulary.root
        )
        return super().weight(x0, torch.where(self.active(zt), other, zt), t)


FAULTS = [
    Fault(
        "the bound has -ln p(x) as decoding term",
        bound.constant_denoiser,
        tree_on_pair(TreeProcess, 0.8),
        tree_on_pair(RawDecoding, 0.8),
    ),
    Fault(
        "the weights of two levels are swapped",
        bound.weights_are_level_flows,
        tree_on_pair(TreeProcess),
        tree_on_pair(SwappedWeights),
    ),
    Fault(
        "the discrete bound uses the posterior of a later time",
        bound.discrete_bound_converges,
        uniform_noise(MixtureProcess),
        uniform_noise(LatePosterior),
    ),
    Fault(
        "the bound has no closing term",
        bound.constant_denoiser,
        tree_on_pair(TreeProcess),
        tree_on_pair(NoClosingTerm),
    ),
    Fault(
        "the bound skips masks",
        bound.entropy_equality,
        tree_on_pair(TreeProcess),
        tree_on_pair(InactiveMasks),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)


@pytest.mark.parametrize("process", [uniform(), STOCHASTIC_PARENTS], ids=["uniform", "xi < 1"])
def test_entropy_check_rejects_a_network_that_conditions_on_the_state_of_the_position(
    process: Any,
) -> None:
    assert bound.entropy_equality(process).passed
    report = bound.entropy_equality(process, denoiser=full_conditional_table)
    assert report.error > 0.05  # nats


def test_entropy_check_accepts_masked_network_that_conditions_on_all_positions() -> None:
    """A mask gives no information on its token, so the conditionals with and without it agree."""
    assert bound.entropy_equality(ONE_LEVEL, denoiser=full_conditional_table).passed


@pytest.mark.parametrize(
    "process", [uniform(), STOCHASTIC_PARENTS, ONE_LEVEL], ids=["uniform", "xi < 1", "masked"]
)
def test_conformance_check_detects_bound_without_weights_of_positions(process: Any) -> None:
    assert bound.speed_equality(process).passed
    assert not bound.speed_equality(process, path=path_without_speed).passed


def path_without_speed(v: Tensor, position: int) -> tuple[Tensor, Tensor]:
    return bent_path(v, position)[0], torch.ones_like(v)


def test_conformance_check_detects_bound_with_the_mean_weight_at_all_positions(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ddiff.core import elbo

    original = elbo.diffusion_term

    def use_mean_speed(process: Any, network: Any, x0: Tensor, noisy: Any, speed: Tensor) -> Tensor:
        return original(process, network, x0, noisy, speed.mean(-1, keepdim=True).expand_as(speed))

    assert bound.speed_equality(STOCHASTIC_PARENTS).passed
    monkeypatch.setattr(elbo, "diffusion_term", use_mean_speed)
    assert not bound.speed_equality(STOCHASTIC_PARENTS).passed


@pytest.mark.parametrize("term", ["closing_term", "decoding_term"])
def test_conformance_check_detects_bound_without_prior_or_decoding_term(
    term: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ddiff.core import elbo

    assert bound.constant_denoiser(STOCHASTIC_PARENTS).passed

    def zero(process: Any, network: Any, x0: Tensor, *rest: Any) -> Tensor:
        return torch.zeros(x0.shape, dtype=torch.float64)

    monkeypatch.setattr(elbo, term, zero)
    assert not bound.constant_denoiser(STOCHASTIC_PARENTS).passed
