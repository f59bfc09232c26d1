"""Hyperschedule sampler: applies an inner sampler along the noise times of a time rule."""

from __future__ import annotations

import pytest
import torch
from joint import JOINT, exact_network, processes

from ddiff.core.elbo import network_from_table
from ddiff.core.times import FlatTimes, WindowTimes
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.grid import InformationGrid
from ddiff.sampling.hyperschedule import HyperscheduleSampler
from ddiff.sampling.loop import Canvas, generate
from ddiff.sampling.predictor_corrector import ForwardBackward, PredictorCorrectorSampler
from ddiff.sampling.psi import ConfidenceRemasking, PsiSampler
from ddiff.sampling.trapezoidal import TrapezoidalSampler
from ddiff.testing.sampler_distribution import measure_sampler

CLOSING = ("masked", "tree", "uncertain tree", "uniform")
POINTS = 20_000
# The distance of 20 000 exact samples over nine cells has mean .008 and standard deviation .002.
# The limit .018 is five standard deviations above the mean; seeds are fixed.
NOISE = 0.018


@pytest.mark.parametrize("name", CLOSING)
def test_sampling_one_position_at_a_time_is_exact(name: str) -> None:
    """With windows of one position, each token is drawn given all earlier tokens."""
    for shape, steps in (("block", 2), ("block", 8), ("slide", 9)):
        sampler = HyperscheduleSampler(AncestralSampler(steps), WindowTimes(1, shape, paired=False))  # type: ignore[arg-type]
        assert (
            measure_sampler(sampler, processes()[name], JOINT, points=POINTS).distance(JOINT)
            < NOISE
        )


@pytest.mark.parametrize("name", CLOSING)
def test_sliding_window_samples_converge_to_the_data_distribution(name: str) -> None:
    """The error is of first order; for 96 steps it is below 0.02 plus the sampling noise."""
    rule = WindowTimes(2, "slide", paired=False)
    far, near = (
        measure_sampler(
            HyperscheduleSampler(AncestralSampler(steps), rule),
            processes()[name],
            JOINT,
            points=POINTS,
        ).distance(JOINT)
        for steps in (3, 96)
    )
    assert near < NOISE + 0.02
    assert far > 2 * near


@pytest.mark.parametrize("name", [*CLOSING, "dense"])
def test_hyperschedule_sampler_with_equal_times_equals_its_inner_sampler(name: str) -> None:
    process = processes()[name]
    settings = {"index": torch.arange(50), "length": 2, "seed": 5}
    plain = generate(
        AncestralSampler(InformationGrid(7)), process, exact_network(process), **settings
    )  # type: ignore[arg-type]
    sampler = HyperscheduleSampler(AncestralSampler(7), FlatTimes())
    along = generate(sampler, process, exact_network(process), **settings)  # type: ignore[arg-type]
    assert torch.equal(plain.ids, along.ids)


INNER = {
    "trapezoidal": TrapezoidalSampler,
    "dfm": lambda grid: PredictorCorrectorSampler(AncestralSampler(grid), ForwardBackward()),
    "remdm confidence": lambda grid: PsiSampler(grid, ConfidenceRemasking()),
}


@pytest.mark.parametrize("name", INNER)
def test_hyperschedule_evaluates_every_stage_and_keeps_the_extras(name: str) -> None:
    """Later stages of a step read their own state; confidences of drawn tokens are passed on."""
    process = processes()["masked"]
    settings = {"index": torch.arange(200), "length": 2, "seed": 5}
    plain = generate(INNER[name](InformationGrid(7)), process, exact_network(process), **settings)  # type: ignore[arg-type]
    sampler = HyperscheduleSampler(INNER[name](7), FlatTimes())  # type: ignore[arg-type]
    along = generate(sampler, process, exact_network(process), **settings)  # type: ignore[arg-type]
    assert torch.equal(plain.ids, along.ids)
    # A stage whose state is that of the start of the step needs no evaluation of its own.
    assert along.nfe <= plain.nfe


def test_hyperschedule_keeps_prompts_clean_and_later_positions_at_the_prior() -> None:
    process, seen = processes()["masked"], []
    prompt, prompt_mask = (
        torch.tensor([[2, 0, 1, 0]] * 6),
        torch.tensor([[False, True, False, False]] * 6),
    )

    def look(step: int, canvas: Canvas) -> None:
        seen.append(canvas)
        waits = canvas.t == 1.0
        assert bool((canvas.zt[waits] == process.vocabulary.root).all())
        assert torch.equal(canvas.zt[:, 1], prompt[:, 1])
        assert bool((canvas.zt[canvas.clean] < 3).all())

    def uniform_table(zt: torch.Tensor, t: torch.Tensor) -> torch.Tensor:
        return torch.full((*zt.shape, 3), 1 / 3, dtype=torch.float64).log()

    sampler = HyperscheduleSampler(AncestralSampler(12), WindowTimes(2, "slide", paired=False))
    drawn = generate(
        sampler,
        process,
        network_from_table(uniform_table, process.vocabulary),
        index=torch.arange(6),
        length=4,
        seed=1,
        prompt=prompt,
        prompt_mask=prompt_mask,
        on_step=look,
    )
    assert len(seen) == sampler.steps
    assert bool((drawn.ids < 3).all())
    assert any(bool((canvas.t == 1.0).any()) for canvas in seen)
