"""Faults planted in the bound, each found by the law meant for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import uniform
from faults import (
    ONE_LEVEL,
    STRAYING,
    Fault,
    FreeClosing,
    IdleMasks,
    LatePosterior,
    RawDecoding,
    assert_found,
    mixture,
    on_pair,
)
from torch import Tensor

from ddiff.core.interpolating import MixtureProcess
from ddiff.core.tree import TreeProcess
from ddiff.testing import bound
from ddiff.testing.bound import bent_path, full_conditional_table


class SwappedWeights(TreeProcess):
    def weight(self, x0: Tensor, zt: Tensor, t: Tensor) -> Tensor:
        other = torch.where(
            zt == self.vocabulary.root, self.vocabulary.ancestor(x0, 1), self.vocabulary.root
        )
        return super().weight(x0, torch.where(self.active(zt), other, zt), t)


FAULTS = [
    Fault(
        "raw -ln p(x) breaks the bound",
        bound.constant_denoiser,
        on_pair(TreeProcess, 0.8),
        on_pair(RawDecoding, 0.8),
    ),
    Fault(
        "swapped level weights",
        bound.weights_are_level_flows,
        on_pair(TreeProcess),
        on_pair(SwappedWeights),
    ),
    Fault(
        "a posterior of other times in the limit",
        bound.discrete_bound_converges,
        mixture(MixtureProcess),
        mixture(LatePosterior),
    ),
    Fault(
        "no closing term in the bound",
        bound.constant_denoiser,
        on_pair(TreeProcess),
        on_pair(FreeClosing),
    ),
    Fault(
        "masks that are idle, in the bound",
        bound.entropy_equality,
        on_pair(TreeProcess),
        on_pair(IdleMasks),
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_found(fault)


@pytest.mark.parametrize("process", [uniform(), STRAYING], ids=["uniform", "xi < 1"])
def test_the_full_conditional_breaks_the_entropy_equality(process: Any) -> None:
    assert bound.entropy_equality(process).passed
    report = bound.entropy_equality(process, denoiser=full_conditional_table)
    assert report.error > 0.05  # tenths of a nat on these joints


def test_at_masks_both_conditionals_agree_which_hides_the_mistake() -> None:
    assert bound.entropy_equality(ONE_LEVEL, denoiser=full_conditional_table).passed


@pytest.mark.parametrize(
    "process", [uniform(), STRAYING, ONE_LEVEL], ids=["uniform", "xi < 1", "masked"]
)
def test_a_missing_speed_factor_breaks_the_speed_equality(process: Any) -> None:
    assert bound.speed_equality(process).passed
    forgetful = lambda v, position: (bent_path(v, position)[0], torch.ones_like(v))  # noqa: E731
    assert not bound.speed_equality(process, path=forgetful).passed


def test_a_bound_that_forgets_speed_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddiff.core import elbo

    original = elbo.diffusion_term

    def careless(process: Any, network: Any, x0: Tensor, noisy: Any, speed: Tensor) -> Tensor:
        return original(process, network, x0, noisy, speed.mean(-1, keepdim=True).expand_as(speed))

    assert bound.speed_equality(STRAYING).passed
    monkeypatch.setattr(elbo, "diffusion_term", careless)
    assert not bound.speed_equality(STRAYING).passed


@pytest.mark.parametrize("term", ["closing_term", "decoding_term"])
def test_a_bound_without_an_end_term_is_found(term: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from ddiff.core import elbo

    assert bound.constant_denoiser(STRAYING).passed
    monkeypatch.setattr(
        elbo, term, lambda process, network, x0, *rest: torch.zeros(x0.shape, dtype=torch.float64)
    )
    assert not bound.constant_denoiser(STRAYING).passed
