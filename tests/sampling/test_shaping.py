"""Sampling filters (temperature, top-k, top-p, min-p) and guidance: their effect on predictions."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddiff_ar.sampler import LeftToRight
from ddiff_core.samplers import Ancestral
from joint import exact_network, processes
from torch import Tensor

from ddiff.core.elbo import network_from_table
from ddiff.core.network import count_evaluations
from ddiff.core.prediction import DenseDistribution
from ddiff.core.times import Noisy
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.first_hitting import FirstHittingSampler
from ddiff.sampling.loop import generate
from ddiff.sampling.shaping import (
    MinP,
    ShapedDistribution,
    ShapedSampler,
    Temperature,
    TopK,
    TopP,
    guide_by_classifier,
    guide_network,
    shape_network,
)
from ddiff.sampling.tau_leaping import TauLeapingSampler
from ddiff.sampling.unmasking import UnmaskingSampler
from ddiff.testing.sampler_distribution import ExactNetwork

TREE = HierarchicalVocabulary([[0, 1, 0, 1, 1, 0], [0, 0, 0]][:1])
PROBS = torch.tensor([[0.05, 0.30, 0.15, 0.20, 0.10, 0.20]], dtype=torch.float64)
LOG_PROBS = torch.tensor([[0.90, 0.08, 0.02]], dtype=torch.float64).log()


def filtered_probs(shape: Any, log_p: Tensor = LOG_PROBS) -> list[float]:
    return shape(log_p).softmax(-1)[0].tolist()


def test_sampling_filters_on_three_tokens_equal_their_closed_form() -> None:
    assert filtered_probs(TopK(2)) == pytest.approx([0.90 / 0.98, 0.08 / 0.98, 0.0])
    assert filtered_probs(TopP(0.9)) == pytest.approx([1.0, 0.0, 0.0])
    assert filtered_probs(TopP(0.91)) == pytest.approx([0.90 / 0.98, 0.08 / 0.98, 0.0])
    assert filtered_probs(MinP(0.05)) == pytest.approx([0.90 / 0.98, 0.08 / 0.98, 0.0])
    squares = [0.81, 0.0064, 0.0004]
    assert filtered_probs(Temperature(0.5)) == pytest.approx([x / sum(squares) for x in squares])
    for nothing in (TopK(3), TopP(1.0), MinP(0.0), Temperature(1.0)):
        assert filtered_probs(nothing) == pytest.approx([0.90, 0.08, 0.02])


def test_sampling_filters_out_of_range_are_refused() -> None:
    wrong: list[Any] = [
        lambda: Temperature(-0.1),
        lambda: TopK(0),
        lambda: TopP(0.0),
        lambda: MinP(1.5),
    ]
    for build in wrong:
        with pytest.raises(ArgumentError, match="got"):
            build()


@pytest.mark.parametrize(
    "build",
    [
        AncestralSampler,
        TauLeapingSampler,
        lambda n: FirstHittingSampler(),
        lambda n: UnmaskingSampler(n, "top"),
    ],
)
def test_every_sampler_draws_tokens_from_the_filtered_distribution(build: Any) -> None:
    """Every sampler draws the second token with probability 4/49 under the filters.

    The filters keep two of three tokens. The tolerance 0.04 is five standard deviations of 1200
    draws.
    """
    process = processes()["masked"]
    network = network_from_table(lambda zt, t: LOG_PROBS.expand(*zt.shape, 3), process.vocabulary)
    sampler = ShapedSampler(build(5), [TopK(2)])
    ids = generate(sampler, process, network, index=torch.arange(200), length=6, seed=1).ids
    found = torch.bincount(ids.flatten(), minlength=3) / ids.numel()
    assert found[2] == 0
    assert float(found[1]) == pytest.approx(4 / 49, abs=0.04)


def sharpened(dist: Tensor) -> Tensor:
    return dist**2 / (dist**2).sum(-1, keepdim=True)


def test_filters_on_a_tree_apply_to_clusters_and_to_tokens_of_a_cluster() -> None:
    dist = ShapedDistribution([DenseDistribution(PROBS.log(), TREE)], Temperature(0.5))
    parent = torch.tensor([0, 1, 0, 1, 1, 0])
    mass = torch.stack([PROBS[0][parent == node].sum() for node in (0, 1)])
    expected = torch.zeros(6, dtype=torch.float64)
    for node in (0, 1):
        expected[parent == node] = sharpened(mass)[node] * sharpened(
            PROBS[0][parent == node] / mass[node]
        )
    assert dist.log_mass(0).exp()[0].tolist() == pytest.approx(expected.tolist())
    assert dist.log_mass(1).exp()[0].tolist() == pytest.approx(sharpened(mass).tolist())
    assert float((dist.log_mass(0).exp() - sharpened(PROBS)).abs().max()) > 0.004
    word, node = torch.tensor([3]), torch.tensor([7])
    assert float(dist.log_prob(word)) == pytest.approx(float(expected[3].log()))
    assert float(dist.log_child(node, word)) == pytest.approx(
        float((expected[3] / sharpened(mass)[1]).log())
    )


@pytest.mark.parametrize("vocabulary", [TREE, FlatVocabulary(6), FlatVocabulary(6, mask=False)])
def test_filtered_draw_is_exact_with_one_uniform_for_all_levels_of_a_tree(vocabulary: Any) -> None:
    """20 001 evenly spaced uniforms draw every token in proportion to its probability.

    An error of one draw is allowed for each level and each boundary between tokens.
    """
    count = 20_001
    dist = ShapedDistribution(
        [DenseDistribution(PROBS.log().expand(count, -1), vocabulary)], TopP(0.8)
    )
    u = (torch.arange(count).double() + 0.5) / count
    drawn = dist.draw(
        torch.full((count,), vocabulary.root), torch.zeros(count, dtype=torch.long), u
    )
    found = torch.bincount(drawn, minlength=6) / count
    assert found.tolist() == pytest.approx(dist.log_mass(0).exp()[0].tolist(), abs=4 / count)
    assert float(found.min()) == 0.0


def test_filtered_draw_given_a_cluster_returns_a_token_of_this_cluster() -> None:
    """The clusters are node 6 with tokens 0, 2 and 5, and node 7 with tokens 1, 3 and 4.

    A uniform near 1 draws the last token of a cluster, and a uniform of 0 draws the first token. A
    draw at the level of the cluster returns the cluster.
    """
    dist = ShapedDistribution(
        [DenseDistribution(PROBS.log().expand(2, -1), TREE)], Temperature(0.7)
    )
    node, u = torch.tensor([6, 7]), torch.tensor([0.999, 0.0]).double()
    assert dist.draw(node, torch.tensor([0, 0]), u).tolist() == [5, 1]
    assert dist.draw(node, torch.tensor([1, 1]), u).tolist() == [6, 7]


def read(network: Any, rows: int = 4, root: int = 3) -> Tensor:
    """Return the distributions [rows,3] that a network predicts at the first `rows` positions.

    The batch has two sequences of two positions."""
    noisy = Noisy(
        torch.full((2, 2), 3), torch.ones(2, 2).double(), torch.zeros(2, 2, dtype=torch.bool)
    )
    return network(noisy)(
        torch.arange(rows), torch.full((rows,), root), lambda dist: dist.log_mass(0)
    ).exp()


def table(shift: float) -> Any:
    return network_from_table(
        lambda zt, t: (
            torch.randn(*zt.shape, 3, generator=torch.Generator().manual_seed(int(shift)))
            .double()
            .log_softmax(-1)
        ),
        FlatVocabulary(3),
    )


def in_chunks(network: Any, sizes: tuple[int, ...]) -> Any:
    """Wrap a network so that each query is answered in chunks of the given sizes."""

    def chunked(noisy: Noisy) -> Any:
        query = network(noisy)

        def parts(rows: Tensor, node: Tensor, fn: Any, *per_row: Tensor) -> Tensor:
            places, start = [], 0
            for size in (*sizes, len(rows)):
                places.append(torch.arange(start, min(start + size, len(rows))))
                start = min(start + size, len(rows))
            used = [place for place in places if len(place)]
            results = [query(rows[p], node[p], fn, *(value[p] for value in per_row)) for p in used]
            return torch.cat(results)

        return parts

    return chunked


@pytest.mark.parametrize("weight", [0.0, 1.0, 2.5])
def test_guidance_mixes_log_probabilities_for_any_chunk_size(weight: float) -> None:
    conditional, unconditional = read(table(1)), read(table(2))
    expected = (conditional.log() * weight + unconditional.log() * (1 - weight)).softmax(-1)
    for cut, null_cut in (((), ()), ((1,), ()), ((), (2,)), ((3,), (1, 1))):
        network = guide_network(in_chunks(table(1), cut), in_chunks(table(2), null_cut), weight)
        assert torch.allclose(read(network), expected)


def test_guidance_counts_conditional_and_unconditional_evaluations() -> None:
    process = processes()["masked"]
    network = guide_network(exact_network(process), exact_network(process), 1.5)
    drawn = generate(AncestralSampler(1), process, network, index=torch.arange(3), length=2, seed=0)
    assert (drawn.nfe, drawn.runs.tolist()) == (2, [2, 2, 2])


def test_classifier_guidance_is_bayes_rule_on_tokens() -> None:
    evidence = torch.rand(4, 3, generator=torch.Generator().manual_seed(5)).double()
    plain = read(table(1))
    steered_probs = read(
        guide_by_classifier(
            in_chunks(table(1), (1, 2)), lambda noisy, rows: evidence[rows].log(), 2.0
        )
    )
    expected = plain * evidence**2
    assert torch.allclose(steered_probs, expected / expected.sum(-1, keepdim=True))
    with pytest.raises(ArgumentError, match=r"must return a tensor \[4, 3\].*\(4, 2\)"):
        read(guide_by_classifier(table(1), lambda noisy, rows: evidence[rows, :2]))


def test_sampling_filters_refuse_a_network_that_predicts_scores() -> None:
    process = processes()["masked"]
    score = count_evaluations(
        ExactNetwork(process, torch.full((3, 3), 1 / 9).double(), "score"), "score"
    )
    makers: list[Any] = [
        lambda: shape_network(score, [TopK(1)]),
        lambda: guide_network(score, score, 2.0),
        lambda: guide_by_classifier(score, lambda noisy, rows: LOG_PROBS),
    ]
    for make in makers:
        with pytest.raises(ArgumentError, match=r"predicts? a score"):
            make()


@pytest.mark.parametrize("by", ["top", "margin", "entropy"])
def test_order_of_reveal_is_computed_before_temperature_and_filters(by: Any) -> None:
    """After a low temperature every entropy would be 0, and the order of reveal would be lost."""
    process = processes()["masked"]
    generator = torch.Generator().manual_seed(3)
    dist = torch.randn(12, 3, generator=generator).double().log_softmax(-1)
    network = network_from_table(lambda zt, t: dist.expand(len(zt), -1, -1), process.vocabulary)

    def order(shapers: list[Any]) -> list[list[int]]:
        seen: list[list[int]] = []
        keep = lambda k, canvas: seen.append((canvas.zt[0] == 3).nonzero().flatten().tolist())  # noqa: E731
        sampler = ShapedSampler(UnmaskingSampler(12, by), shapers)
        generate(sampler, process, network, index=torch.arange(1), length=12, seed=1, on_step=keep)
        return seen

    assert order([Temperature(0.01)]) == order([])


def filtered_distribution(sampler: Any, p: Tensor) -> list[float]:
    """Return the distribution that a sampler draws from if the network predicts p."""
    log_p = p.log().unsqueeze(0)
    for shaper in sampler.shapers:
        log_p = shaper(log_p).log_softmax(-1)
    shaped_p: list[float] = log_p.exp()[0].tolist()
    return shaped_p


def configured(settings: dict[str, float]) -> list[Any]:
    """Build the two sampler components with filters from `settings`: ancestral, autoregressive."""
    ancestral = Ancestral.build(Ancestral.Config(**settings), steps=4)
    left_to_right = LeftToRight.build(LeftToRight.Config(**settings), vocabulary=FlatVocabulary(4))
    return [ancestral, left_to_right]


@pytest.mark.parametrize("which", [0, 1], ids=["ancestral", "left_to_right"])
def test_filter_order_is_temperature_top_k_top_p_min_p(which: int) -> None:
    """The temperature 0.5 first changes p = (.4, .3, .2, .1) to (16, 9, 4, 1)/30.

    Two tokens then have at least 0.8 of the probability; before the change, three tokens do.
    """
    p = torch.tensor([0.4, 0.3, 0.2, 0.1], dtype=torch.float64)
    got = filtered_distribution(configured({"temperature": 0.5, "top_p": 0.8})[which], p)
    assert got == pytest.approx([0.64, 0.36, 0.0, 0.0])
    # top_p keeps two of the three tokens of top_k, because .4/.9 < .75 <= .7/.9. Without top_k it
    # would keep three tokens.
    got = filtered_distribution(configured({"top_k": 3, "top_p": 0.75})[which], p)
    assert got == pytest.approx([4 / 7, 3 / 7, 0.0, 0.0])
    got = filtered_distribution(configured({"temperature": 0.5, "min_p": 0.3})[which], p)
    assert got == pytest.approx([0.64, 0.36, 0.0, 0.0])  # 4/16 < .3 <= 9/16, and .2/.4 > .3


@pytest.mark.parametrize("which", [0, 1], ids=["ancestral", "left_to_right"])
def test_sampler_has_no_filters_if_all_filter_settings_have_default_values(which: int) -> None:
    for settings in ({}, {"temperature": 1.0, "top_p": 1.0, "min_p": 0.0}):
        assert not isinstance(configured(settings)[which], ShapedSampler)
    for one in ({"temperature": 0.9}, {"top_k": 1}, {"top_p": 0.99}, {"min_p": 0.01}):
        assert len(configured(one)[which].shapers) == 1


def test_min_p_keeps_tokens_exactly_at_its_threshold() -> None:
    """With the threshold 1, all tokens whose probability is the largest are kept."""
    log_p = torch.tensor([[0.4, 0.4, 0.2]], dtype=torch.float64).log()
    assert filtered_probs(MinP(1.0), log_p) == pytest.approx([0.5, 0.5, 0.0])
    assert filtered_probs(MinP(0.0), log_p) == pytest.approx([0.4, 0.4, 0.2])
