"""Edits of a text field toward a clean latent, with exact joint predictions."""

from __future__ import annotations

import math

import pytest
import torch
from exact_fields import BITS, MEAN, PROBABILITY, SPREAD, exact_network, make_fields

from ddiff.core.fields import hold
from ddiff.core.times import Noisy
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.editing import edit

COUNT = 3000


@pytest.mark.parametrize("first", [0, 1])
@pytest.mark.parametrize("target", [-1.2, 0.5, 1.5])
def test_text_edit_follows_the_conditional_given_kept_tokens_and_latent(
    target: float, first: int
) -> None:
    """The second token is edited toward a clean number; within 4 standard errors of 3000 edits."""
    fields = make_fields()
    number = torch.full((COUNT, 1, 1), target, dtype=torch.float64)
    zero = torch.zeros(COUNT, 1, dtype=torch.float64)
    clean_number = Noisy(number, zero, zero == 0.0)
    source = torch.tensor([[first, 0]]).expand(COUNT, 2)
    done = edit(
        AncestralSampler(3),
        fields["text"].process,
        hold(exact_network(fields), {"latent": clean_number}, "text"),
        source=source,
        editable=torch.ones_like(source, dtype=torch.bool),
        ratio=0.5,
        mode="suffix",
        index=torch.arange(COUNT),
        seed=1,
    )
    weight = PROBABILITY * torch.exp(-0.5 * ((target - MEAN) / SPREAD) ** 2)
    weight = weight * (BITS[:, 0] == first)
    expected = float((weight * BITS[:, 1]).sum() / weight.sum())
    assert torch.equal(done.samples.ids[:, 0], source[:, 0])
    error = math.sqrt(expected * (1.0 - expected) / COUNT)
    assert float(done.samples.ids[:, 1].double().mean()) == pytest.approx(expected, abs=4 * error)
