"""Ancestral sampling and `generate`: distributions, prompts, batches and network evaluations."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from joint import (
    JOINT,
    EarlyNoise,
    distance,
    distribution_after_steps,
    exact_conditionals,
    exact_network,
    processes,
)
from torch import Tensor

from ddiff.core.components import MixtureProcess
from ddiff.core.elbo import network_from_table
from ddiff.core.process import ForwardProcess
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.loop import Canvas, Samples, generate

NAMES = list(processes())


class BatchRng:
    """Random generator that draws the uniforms of all samples from one `torch.Generator`.

    It is faster than `CounterRng`, which seeds every sample separately.
    """

    def __init__(self, shape: tuple[int, int], generator: torch.Generator) -> None:
        self.shape, self.generator = shape, generator

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        drawn = torch.rand(*self.shape, count, generator=self.generator, dtype=torch.float64)
        return drawn.squeeze(-1) if count == 1 else drawn


def many(process: ForwardProcess, num_steps: int, count: int) -> Tensor:
    """Draw `count` samples [count,2] with the ancestral sampler and the exact network."""
    noise = BatchRng((count, 2), torch.Generator().manual_seed(7))
    start = process.prior.draw(noise.uniform("start"))
    free = torch.ones(count, 2, dtype=torch.bool)
    canvas = Canvas(start, torch.ones(count, 2).double(), ~free, free)
    sampler = AncestralSampler(num_steps)
    return list(sampler.run(process, exact_network(process), canvas, lambda step: noise))[-1].zt  # type: ignore[arg-type,return-value]


def draw(
    process: ForwardProcess, index: list[int], length: int = 2, steps: int = 6, **settings: Any
) -> Samples:
    settings = {
        "sampler": AncestralSampler(steps),
        "network": exact_network(process),
        "seed": 3,
    } | settings
    return generate(process=process, index=torch.tensor(index), length=length, **settings)


@pytest.mark.parametrize("name", NAMES)
def test_ancestral_sampling_error_is_inversely_proportional_to_number_of_steps(name: str) -> None:
    """Four times as many steps divide the distance by four (3.5 to 4.5 from 16 to 64 steps).

    The distance to JOINT is computed exactly, without sampling. A single step draws both tokens
    from their marginals. For masked diffusion, the error is known: of N equal steps, the same step
    reveals both tokens with probability 1/N.
    """
    process = processes()[name]
    far, nearer, near, nearest = (
        distance(distribution_after_steps(process, steps)) for steps in (1, 4, 16, 64)
    )
    marginals = torch.outer(JOINT.sum(1), JOINT.sum(0))
    assert far == pytest.approx(0.5 * float((marginals - JOINT).abs().sum()), abs=1e-9)
    assert far > nearer > 2.5 * near
    assert 3.5 < near / nearest < 4.5
    if name == "masked":
        assert [nearer, near, nearest] == pytest.approx([far / 4, far / 16, far / 64], rel=1e-9)


@pytest.mark.parametrize("steps", [1, 3])
@pytest.mark.parametrize("name", NAMES)
def test_ancestral_samples_follow_the_exactly_computed_distribution(name: str, steps: int) -> None:
    """Compare the frequencies of nine pairs of tokens with `distribution_after_steps`.

    By chance, the chi-square statistic is above its limit 35 with probability 2.7e-5. There are ten
    cases of 20 000 samples, and the seed is fixed.
    """
    process, count = processes()[name], 20_000
    ids = many(process, steps, count)
    found = torch.bincount(ids[:, 0] * 3 + ids[:, 1], minlength=9).double()
    expected = count * distribution_after_steps(process, steps)[:3, :3].reshape(-1)
    assert float(expected.sum()) == pytest.approx(count, abs=1e-6), (
        "not all final states are tokens"
    )
    assert float(((found - expected) ** 2 / expected).sum()) < 35


@pytest.mark.parametrize("name", NAMES)
def test_prompt_tokens_are_unchanged_and_condition_the_other_tokens(name: str) -> None:
    process, prompt = processes()[name], torch.tensor([[1, 0]] * 400)
    prompt_mask = torch.tensor([[True, False]] * 400)
    seen: list[Tensor] = []
    keep = lambda step, canvas: seen.append(canvas.zt[:, 0].clone())  # noqa: E731
    drawn = draw(process, list(range(400)), prompt=prompt, prompt_mask=prompt_mask, on_step=keep)
    assert len(seen) == 6
    assert all(bool((states == 1).all()) for states in seen)
    # With one free symbol the chain is exact: P(x_2 = 1 | x_1 = 1) = 0.8. Tolerance: five standard
    # deviations.
    assert abs(float((drawn.ids[:, 1] == 1).double().mean()) - 0.8) < 0.1


@pytest.mark.parametrize("name", NAMES)
def test_sample_does_not_depend_on_other_samples_of_its_batch(name: str) -> None:
    process = processes()[name]
    together = draw(process, list(range(12))).ids
    assert torch.equal(draw(process, [7]).ids, together[7:8])
    assert torch.equal(draw(process, [11, 0, 4]).ids, together[[11, 0, 4]])
    assert not torch.equal(draw(process, list(range(12)), seed=4).ids, together)


@pytest.mark.parametrize("name", NAMES)
def test_generate_counts_network_evaluations(name: str) -> None:
    process, calls = processes()[name], 0

    def table(zt: Tensor, t: Tensor) -> Tensor:
        nonlocal calls
        calls += 1
        return exact_conditionals(process)(zt, t)

    drawn = draw(process, [0, 1], steps=40, network=network_from_table(table, process.vocabulary))
    assert drawn.nfe == calls
    assert 1 <= calls <= 40
    if (
        name == "masked"
    ):  # four positions move once each, so at most four of forty steps query the network
        assert calls <= 4


@pytest.mark.parametrize("name", NAMES)
def test_network_is_not_evaluated_if_no_position_moves(name: str) -> None:
    prompt = torch.tensor([[0, 2], [1, 1]])
    drawn = draw(
        processes()[name], [0, 1], prompt=prompt, prompt_mask=torch.ones(2, 2, dtype=torch.bool)
    )
    assert drawn.nfe == 0
    assert torch.equal(drawn.ids, prompt)


@pytest.mark.parametrize("name", NAMES)
def test_ancestral_with_last_argmax_decodes_the_most_likely_token(name: str) -> None:
    """A single step from the prior gives each position the most likely token of its marginal."""
    drawn = draw(processes()[name], list(range(20)), sampler=AncestralSampler(1, last="argmax"))
    assert drawn.ids.tolist() == [[int(JOINT.sum(1).argmax()), int(JOINT.sum(0).argmax())]] * 20
    assert drawn.nfe == 1
    assert len(set(map(tuple, draw(processes()[name], list(range(20)), steps=1).ids.tolist()))) > 1


@pytest.mark.parametrize("last", ["draw", "argmax"])
def test_final_decoding_replaces_masks_left_at_time_zero(last: Any) -> None:
    """A tenth of the tokens is masked at t = 0 and must be replaced by the final decoding step."""
    point = torch.tensor([0.0, 0.0, 0.0, 1.0])
    process = MixtureProcess(FlatVocabulary(3), EarlyNoise(), point)
    seen: list[Tensor] = []
    keep = lambda step, canvas: seen.append(canvas.zt)  # noqa: E731
    drawn = draw(process, list(range(300)), sampler=AncestralSampler(8, last), on_step=keep)
    assert bool((seen[-2] == 3).any())
    assert bool((drawn.ids < 3).all())
    assert len(seen) == 8
    if (
        last == "draw"
    ):  # marginals are exact for any number of steps; five standard deviations are 0.15
        found = torch.bincount(drawn.ids[:, 0], minlength=3) / 300
        assert float((found - JOINT.sum(1)).abs().max()) < 0.15


def test_generate_refuses_prompts_of_wrong_shape_or_with_invalid_tokens() -> None:
    process, keep = processes()["masked"], torch.ones(2, 2, dtype=torch.bool)
    with pytest.raises(ArgumentError, match=r"must have the shape \[2, 2\].*\(2, 3\)"):
        draw(process, [0, 1], prompt=torch.zeros(2, 3, dtype=torch.long), prompt_mask=keep)
    with pytest.raises(ArgumentError, match=r"must have the shape \[2, 2\].*\(1, 2\)"):
        draw(process, [0, 1], prompt=torch.zeros(2, 2, dtype=torch.long), prompt_mask=keep[:1])
    with pytest.raises(ArgumentError, match=r"tokens.*0\.\.2"):
        draw(process, [0, 1], prompt=torch.full((2, 2), 3), prompt_mask=keep)
    with pytest.raises(ArgumentError, match=r"tokens.*0\.\.2"):
        draw(process, [0, 1], prompt=torch.full((2, 2), -1), prompt_mask=keep)
    with pytest.raises(ArgumentError, match="prompt_mask needs prompt"):
        draw(process, [0, 1], prompt_mask=keep)


def test_grid_sampler_refuses_zero_steps() -> None:
    with pytest.raises(ArgumentError, match=r"steps must be at least 1.*got 0"):
        AncestralSampler(0)
