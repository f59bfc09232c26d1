"""Block diffusion: any process within a block, and a key-value cache of finished blocks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddiff_core.objectives import Block, PairedConfig, Quenched, Slide, WindowConfig
from ddiff_core.samplers import Blockwise
from ddiff_dit.dit import DiT
from torch import Tensor

import ddiff
from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import WindowTimes
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.nn.denoiser import Denoiser
from ddiff.nn.heads import TokenHead, TreeHead
from ddiff.nn.network import as_network
from ddiff.sampling.loop import Samples, generate

LENGTH = 14  # three blocks of four and one of two
TREE = HierarchicalVocabulary([[0, 1, 0, 2, 1, 0, 2]])
PROCESSES: dict[str, ForwardProcess] = {
    "masked": TreeProcess(FlatVocabulary(7), CdfClock([LinearSchedule()])),
    "tree": TreeProcess(TREE, LogTimeClock((1.0, 1.0))),
    "uncertain tree": TreeProcess(TREE, LogTimeClock((1.0, 1.0)), xi=0.8),
    "uniform": ddiff.MixtureProcess(
        FlatVocabulary(7, mask=False), LinearSchedule(), torch.full((7,), 1 / 7)
    ),
}


def denoiser(process: ForwardProcess, time: bool) -> Denoiser:
    """Make a float64 denoiser whose weights are all random; `time`: the backbone reads t."""
    torch.manual_seed(3)
    vocabulary = process.vocabulary
    backbone = DiT(vocabulary, 16, layers=2, heads=2, time=time)
    head = (
        TreeHead(vocabulary, 16, "levelwise")
        if vocabulary.num_levels > 1
        else TokenHead(vocabulary, 16)
    )
    model = Denoiser(backbone, head).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if not parameter.any():
                parameter.normal_(std=0.2)
    return model


def drawn(process: ForwardProcess, cached: bool, time: bool, **settings: Any) -> Samples:
    config = Blockwise.Config(width=4, inner=settings.pop("inner", "ancestral"))
    sampler = Blockwise.build(config, steps=5)
    assert sampler.cached
    network = as_network(denoiser(process, time), process, cached=cached)
    return generate(
        sampler, process, network, index=torch.arange(6), length=LENGTH, seed=2, **settings
    )


def prompts() -> tuple[Tensor, Tensor]:
    """Return (prompt ids, prompt mask), with at least one token in each prompt.

    Without a prompt, all masked positions would have equal predictions, and rounding errors would
    decide which position is revealed first.
    """
    prompt = torch.randint(7, (6, LENGTH), generator=torch.Generator().manual_seed(1))
    return prompt, torch.arange(LENGTH) < torch.tensor([[1], [3], [4], [5], [9], [14]])


@pytest.mark.parametrize("time", [True, False], ids=["time", "no time"])
@pytest.mark.parametrize("name", PROCESSES)
def test_blockwise_samples_with_and_without_cache_are_identical(name: str, time: bool) -> None:
    process = PROCESSES[name]
    cached, plain = (drawn(process, cache, time).ids for cache in (True, False))
    assert torch.equal(cached, plain)
    assert len(cached.unique(dim=0)) == 6


@pytest.mark.parametrize("inner", ["confidence", "first_hitting", "psi"])
def test_blockwise_cache_changes_no_token_for_any_inner_sampler(inner: str) -> None:
    prompt, prompt_mask = prompts()
    cached, plain = (
        drawn(
            PROCESSES["masked"], cache, False, inner=inner, prompt=prompt, prompt_mask=prompt_mask
        ).ids
        for cache in (True, False)
    )
    assert torch.equal(cached, plain)
    assert torch.equal(cached[prompt_mask], prompt[prompt_mask])


def test_blockwise_earlier_blocks_do_not_attend_to_later_ones() -> None:
    """Samples of more blocks begin with the samples of fewer blocks."""
    process = PROCESSES["masked"]
    sampler, network = (
        Blockwise.build(Blockwise.Config(width=4), steps=5),
        as_network(denoiser(process, True), process, cached=True),
    )
    short, long = (
        generate(sampler, process, network, index=torch.arange(3), length=length, seed=2).ids
        for length in (8, 16)
    )
    assert torch.equal(short, long[:, :8])


def test_components_block_slide_and_quenched_build_a_window_times_object() -> None:
    rule = Block.build(WindowConfig(width=16))
    assert (rule.width, rule.shape, rule.paired, rule.start, rule.stop) == (
        16,
        "block",
        True,
        1e-3,
        1.0,
    )
    assert Slide.build(WindowConfig(width=3, paired=False, start=0.1, stop=0.9)).shape == "slide"
    assert Quenched.build(PairedConfig()).width == 1
    times = ddiff.read_recipe("bd3_small").times
    assert times is not None
    assert isinstance(times.build(), WindowTimes)
