"""Every recipe key of the built-in components reaches the object that the component builds."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddiff_core import samplers
from ddiff_core.objectives import Block, Clip, Flat, Quenched, Slide, WindowConfig

from ddiff.core.times import FlatTimes, WindowTimes
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.plugin.loader import survey_plugins
from ddiff.sampling.gaussian import DdimSampler, EulerMaruyamaSampler, EulerSampler, HeunSampler
from ddiff.sampling.grid import Grid, InformationGrid, LogSnrGrid, LoopGrid
from ddiff.sampling.psi import CapRemasking, ConfidenceRemasking, LoopRemasking, RescaleRemasking
from ddiff.sampling.shaping import MinP, Temperature, TopK, TopP

TREE = HierarchicalVocabulary([[0, 1, 0]])


SAMPLERS = [
    component.load()
    for component in survey_plugins().registry.components()
    if (component.kind, component.plugin) == ("sampler", "core")
]
TOKEN_SAMPLERS = [one for one in SAMPLERS if "vectors" not in getattr(one, "states", ())]
WITHOUT_STEPS = (samplers.FirstHitting, samplers.EntropyBound)
"""Samplers whose number of steps is random, so that they have neither steps nor a grid."""
INSIDE = (samplers.SelfCorrection, samplers.Blockwise, samplers.Hyperschedule)
"""Samplers around another sampler, which has the grid."""


def built(component: Any, **settings: Any) -> Any:
    steps = {} if component in WITHOUT_STEPS else {"steps": 7}
    return component.build(component.Config(**settings), **steps)


@pytest.mark.parametrize(
    "component",
    [one for one in TOKEN_SAMPLERS if one not in WITHOUT_STEPS],
    ids=lambda one: one.__name__,
)
def test_sampler_uses_the_time_grid_in_its_settings(component: Any) -> None:
    for spacing in ("uniform", "cosine", "log"):
        sampler = built(component, grid=spacing)
        sampler = sampler.inner if component in INSIDE else sampler
        assert sampler.grid.times() == Grid(spacing, 7).times()


@pytest.mark.parametrize("component", TOKEN_SAMPLERS, ids=lambda one: one.__name__)
def test_sampler_applies_temperature_top_k_top_p_min_p_in_this_order(component: Any) -> None:
    shaped = built(component, temperature=0.5, top_k=3, top_p=0.8, min_p=0.1)
    assert [type(shaper) for shaper in shaped.shapers] == [Temperature, TopK, TopP, MinP]
    temperature, top_k, top_p, min_p = shaped.shapers
    assert (temperature.temperature, top_k.k, top_p.p, min_p.share) == (0.5, 3, 0.8, 0.1)


@pytest.mark.parametrize(
    ("component", "settings", "attributes"),
    [
        (samplers.Ancestral, {"last": "argmax"}, {"last": "argmax"}),
        (samplers.Trapezoidal, {"theta": 0.3}, {"theta": 0.3}),
        (samplers.Trapezoidal, {}, {"theta": 0.5}),
        (samplers.FirstHitting, {"until": 0.01}, {"until": 0.01}),
        (samplers.Confidence, {"by": "entropy", "noise": 0.7}, {"by": "entropy", "noise": 0.7}),
        (samplers.Confidence, {}, {"by": "confidence", "noise": 0.0}),
        (samplers.Margin, {"noise": 0.7}, {"by": "margin", "noise": 0.7}),
        (samplers.EntropyBound, {"bound": 0.4}, {"bound": 0.4}),
        (samplers.AdaptiveCorrection, {"eta": 0.6}, {"eta": 0.6}),
        (
            samplers.PredictorCorrector,
            {"rounds": 3, "share": 0.4},
            {"rounds": 3, "corrector.share": 0.4},
        ),
        (
            samplers.SelfCorrection,
            {"rounds": 5, "commit": 2, "sharpness": 0.3, "at": 0.2, "patience": 4},
            {"rounds": 5, "commit": 2, "temperature": 0.3, "at": 0.2, "patience": 4},
        ),
        (samplers.Psi, {"kappa": 0.3}, {"kappa.kappa": 0.3}),
        (samplers.Psi, {"kappa": 0.0}, {"kappa.kappa": 0.0}),
        (samplers.Blockwise, {"width": 5, "sight": "all"}, {"width": 5, "sight": "all"}),
        (
            samplers.Hyperschedule,
            {"width": 5, "shape": "block"},
            {"rule.width": 5, "rule.shape": "block"},
        ),
        (
            samplers.Hyperschedule,
            {},
            {"rule.width": 16, "rule.shape": "slide", "rule.paired": False},
        ),
    ],
    ids=str,
)
def test_sampler_components_pass_their_settings_to_the_sampler(
    component: Any, settings: Any, attributes: dict[str, Any]
) -> None:
    sampler = built(component, **settings)
    for path, value in attributes.items():
        found = sampler
        for name in path.split("."):
            found = getattr(found, name)
        assert found == value, path


@pytest.mark.parametrize(
    ("setting", "rule"),
    [
        ("cap", CapRemasking),
        ("rescale", RescaleRemasking),
        ("confidence", ConfidenceRemasking),
        ("loop", LoopRemasking),
    ],
)
def test_remasking_setting_selects_the_remasking_rule(setting: Any, rule: type) -> None:
    sampler = built(samplers.Remasking, setting=setting, eta=0.3)
    assert isinstance(sampler.kappa, rule)
    assert sampler.kappa.eta == 0.3


def test_remasking_rule_loop_builds_a_grid_that_stays_at_time_hold() -> None:
    assert (
        built(samplers.Remasking, setting="loop", hold=0.3).grid.times()
        == LoopGrid(7, hold=0.3).times()
    )
    assert built(samplers.Remasking, setting="loop").grid.times() == LoopGrid(7, hold=0.1).times()


@pytest.mark.parametrize(
    "inner", ["ancestral", "tau_leaping", "confidence", "psi", "first_hitting", "entropy"]
)
def test_blockwise_sampler_uses_the_named_inner_sampler(inner: Any) -> None:
    expected = {
        "ancestral": "AncestralSampler",
        "tau_leaping": "TauLeapingSampler",
        "confidence": "UnmaskingSampler",
        "psi": "PsiSampler",
        "first_hitting": "FirstHittingSampler",
        "entropy": "EntropyBoundSampler",
    }
    assert type(built(samplers.Blockwise, inner=inner).inner).__name__ == expected[inner]


# ---------------------------------------------------------------------- losses and times


def test_clip_loss_limits_weights_to_smallest_and_largest() -> None:
    from ddiff_mdlm.process import MaskedDiffusion

    process = MaskedDiffusion.build(MaskedDiffusion.Config(), vocabulary=FlatVocabulary(3))
    x0, t = torch.zeros(3, dtype=torch.long), torch.tensor([0.1, 0.5, 0.9], dtype=torch.float64)
    weight = Clip.build(Clip.Config(smallest=1.5, largest=4.0), process=process).weight(
        process, x0, torch.full_like(x0, 3), t
    )
    assert weight.tolist() == pytest.approx([4.0, 2.0, 1.5])
    assert (Clip.Config().smallest, Clip.Config().largest) == (0.0, 2.0)


def test_time_rule_components_pass_their_keys_to_window_times() -> None:
    block = Block.build(WindowConfig(width=3, start=0.1, stop=0.8, paired=False))
    slide = Slide.build(WindowConfig(width=4))
    single = Quenched.build(Quenched.Config())
    assert all(isinstance(rule, WindowTimes) for rule in (block, slide, single))
    assert (block.width, block.shape, block.paired) == (3, "block", False)
    assert (slide.width, slide.shape, slide.paired) == (4, "slide", True)
    assert (single.width, single.shape, single.paired) == (1, "block", True)
    assert isinstance(Flat.build(Flat.Config()), FlatTimes)


@pytest.mark.parametrize(
    ("component", "settings", "built_class", "attributes"),
    [
        (samplers.Ddim, {"eta": 0.3, "last": "mean"}, DdimSampler, {"eta": 0.3, "last": "mean"}),
        (samplers.Ddim, {}, DdimSampler, {"eta": 0.0, "last": "draw"}),
        (samplers.Ddpm, {}, DdimSampler, {"eta": 1.0, "last": "draw"}),
        (samplers.Euler, {"last": "mean"}, EulerSampler, {"last": "mean"}),
        (samplers.Heun, {}, HeunSampler, {"last": "draw"}),
        (samplers.ReverseSde, {}, EulerMaruyamaSampler, {"last": "draw"}),
    ],
)
def test_samplers_of_vectors_get_their_settings_and_grid(
    component: Any, settings: Any, built_class: Any, attributes: Any
) -> None:
    for name, grid in (
        ("uniform", Grid),
        ("information", InformationGrid),
        ("log_snr", LogSnrGrid),
    ):
        sampler = built(component, grid=name, **settings)
        assert isinstance(sampler, built_class)
        assert isinstance(sampler.grid, grid)
        assert sampler.steps == 7
        for attribute, value in attributes.items():
            assert getattr(sampler, attribute) == value
