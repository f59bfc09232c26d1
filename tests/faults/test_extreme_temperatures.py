"""Extreme temperatures and guidance weights are applied exactly, or refused by name."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from ddiff import (
    ArgumentError,
    FlatVocabulary,
    HierarchicalVocabulary,
    LogTimeClock,
    MinP,
    Noisy,
    Temperature,
    TopK,
    TopP,
    TreeProcess,
    guide_by_classifier,
    guide_network,
    network_from_table,
)
from ddiff.core.numerics import apply_temperature
from ddiff.plugin.loader import load_plugins
from ddiff.recipe.component import ComponentSpec

P = torch.tensor([[0.5, 0.3, 0.2]], dtype=torch.float64)
TIES = torch.tensor([[0.2, 0.4, 0.4]], dtype=torch.float64)


def distribution(shaper: Any, p: Tensor = P, dtype: torch.dtype = torch.float32) -> list[float]:
    return shaper(p.log().to(dtype)).softmax(-1)[0].tolist()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("temperature", [1e-40, 1e-308, 5e-324, 1e-12])
def test_tiny_temperature_keeps_only_the_likeliest_token(
    temperature: float, dtype: torch.dtype
) -> None:
    assert distribution(Temperature(temperature), dtype=dtype) == [1.0, 0.0, 0.0]


@pytest.mark.parametrize("temperature", [1e20, 1e300])
def test_huge_temperature_gives_the_uniform_distribution(temperature: float) -> None:
    assert distribution(Temperature(temperature)) == pytest.approx([1 / 3] * 3)


def test_tiny_temperature_divides_probability_among_ties_zero_temperature_does_not() -> None:
    assert distribution(Temperature(1e-30), TIES) == [0.0, 0.5, 0.5]
    assert distribution(Temperature(0.0), TIES) == [0.0, 1.0, 0.0]
    assert distribution(TopK(1), TIES) == distribution(Temperature(0.0), TIES)


def test_impossible_tokens_stay_impossible_at_every_temperature() -> None:
    log_p = torch.tensor([[-math.inf, -1.0, -2.0]])
    for temperature in (0.0, 1e-40, 0.5, 1.0, 1e30):
        assert apply_temperature(log_p, temperature).softmax(-1)[0, 0] == 0.0


@pytest.mark.parametrize("temperature", [-1e-9, math.inf, math.nan, -math.inf])
def test_sampling_temperature_rejects_negative_and_non_finite_values(temperature: float) -> None:
    with pytest.raises(ArgumentError, match="Temperature: temperature must be"):
        Temperature(temperature)


@pytest.mark.parametrize("share", [1e-320, 1e-12, 1.0])
def test_extreme_top_p_keeps_the_likeliest_token(share: float) -> None:
    assert distribution(TopP(share))[0] >= 0.5
    assert sum(distribution(TopP(share))) == pytest.approx(1.0)


def test_extreme_min_p_and_top_k_keep_the_expected_tokens() -> None:
    assert distribution(MinP(1.0)) == [1.0, 0.0, 0.0]
    assert distribution(MinP(0.0)) == pytest.approx(P[0].tolist())
    assert distribution(TopK(2**31 - 1)) == pytest.approx(P[0].tolist())
    for build in (
        lambda: TopP(math.nan),
        lambda: MinP(math.nan),
        lambda: TopP(0.0),
        lambda: MinP(1.0 + 1e-9),
    ):
        with pytest.raises(ArgumentError):
            build()


# ---------------------------------------------------------------------- guidance

VOCABULARIES = [FlatVocabulary(3), HierarchicalVocabulary([[0, 0, 1]])]


def guided_distribution(vocabulary: Any, weight: float) -> list[float]:
    """Return the distribution of a masked position under guidance with the given weight.

    The network predicts (0.5, 0.3, 0.2) with the condition, and (0.2, 0.3, 0.5) without it.
    """
    log_p = P.log().float()
    network = network_from_table(lambda zt, t: log_p.expand(*zt.shape, 3), vocabulary)
    null = network_from_table(lambda zt, t: log_p.flip(-1).expand(*zt.shape, 3), vocabulary)
    noisy = Noisy(
        torch.full((1, 1), vocabulary.root),
        torch.ones(1, 1).double(),
        torch.zeros(1, 1, dtype=torch.bool),
    )
    query = guide_network(network, null, weight)(noisy)
    node = torch.tensor([vocabulary.root])
    return query(torch.tensor([0]), node, lambda prediction: prediction.log_mass(0).exp())[
        0
    ].tolist()


@pytest.mark.parametrize("vocabulary", VOCABULARIES, ids=["flat", "tree"])
@pytest.mark.parametrize("weight", [1e30, 1e38, 1e308])
def test_huge_guidance_weight_selects_token_with_largest_probability_ratio(
    vocabulary: Any, weight: float
) -> None:
    assert guided_distribution(vocabulary, weight) == pytest.approx([1.0, 0.0, 0.0], abs=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.5, 1.0, 1.000001, 3.0])
def test_guided_distribution_matches_the_guidance_formula(weight: float) -> None:
    expected = (weight * P.log() + (1 - weight) * P.flip(-1).log()).softmax(-1)[0].tolist()
    assert guided_distribution(VOCABULARIES[0], weight) == pytest.approx(expected, abs=1e-5)


@pytest.mark.parametrize("weight", [math.inf, -math.inf, math.nan])
def test_classifier_free_guidance_rejects_non_finite_weights(weight: float) -> None:
    network = network_from_table(lambda zt, t: P.log().expand(*zt.shape, 3), FlatVocabulary(3))
    with pytest.raises(ArgumentError, match="guide_network: weight must be a finite number"):
        guide_network(network, network, weight)
    with pytest.raises(ArgumentError, match="guide_by_classifier: weight must be a finite number"):
        guide_by_classifier(network, lambda noisy, rows: torch.zeros(len(rows), 3), weight)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_guide_by_classifier_rejects_non_finite_classifier_outputs(value: float) -> None:
    vocabulary = FlatVocabulary(3)
    network = network_from_table(lambda zt, t: P.log().expand(*zt.shape, 3), vocabulary)
    noisy = Noisy(
        torch.full((1, 1), 3), torch.ones(1, 1).double(), torch.zeros(1, 1, dtype=torch.bool)
    )
    query = guide_by_classifier(
        network, lambda noisy, rows: torch.full((len(rows), 3), value).double()
    )(noisy)
    with pytest.raises(ArgumentError, match=r"guide_by_classifier: .*Fix log_likelihood"):
        query(torch.tensor([0]), torch.tensor([3]), lambda prediction: prediction.log_mass(0))


# ---------------------------------------------------------------------- samplers

SHAPED = sorted(
    component.name
    for component in load_plugins([]).components("sampler")
    if "temperature" in component.config_class().model_fields
)


@pytest.mark.parametrize("name", SHAPED)
def test_samplers_accept_temperatures_0_and_1e_minus_320(name: str) -> None:
    from ddiff import generate

    assert len(SHAPED) >= 15
    process = TreeProcess(VOCABULARIES[1], LogTimeClock((1.0, 1.0)))
    network = network_from_table(
        lambda zt, t: P.log().float().expand(*zt.shape, 3), process.vocabulary
    )
    component = load_plugins([]).component("sampler", name)
    for temperature in (0.0, 1e-320):
        config = component.config_class()(temperature=temperature)
        sampler = ComponentSpec(component, config).build(steps=3, vocabulary=None)
        try:
            sampler.check_supported(process, "distribution")
        except ArgumentError:
            pytest.skip("needs another process")
        drawn = generate(sampler, process, network, index=torch.arange(4), length=4, seed=0)
        assert set(drawn.ids.reshape(-1).tolist()) <= {0, 1, 2}
