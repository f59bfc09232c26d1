"""Predicted distributions: sums over tokens, draws, and division by the own likelihood q_t(z|x)."""

from __future__ import annotations

import itertools

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from random_trees import below, forward_step, trees
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.components import MixtureProcess
from ddiff.core.prediction import DenseDistribution, drop_own_evidence, segment_logsumexp
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import LinearSchedule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary, Vocabulary
from ddiff.errors import ArgumentError, NonFiniteError

EXACT = {"rtol": 0.0, "atol": 1e-12, "check_dtype": False}  # float64 sums of at most ten terms
many = settings(max_examples=15, deadline=None)
some_tree = HierarchicalVocabulary([[2, 0, 1, 0, 1, 2, 3], [1, 0, 1, 0]])


def random_log_p(num_tokens: int, seed: int, rows: int = 2, impossible: bool = False) -> Tensor:
    logits = 3.0 * torch.randn(
        rows, num_tokens, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)
    )
    if impossible and num_tokens > 1:
        logits[:, seed % num_tokens] = -torch.inf
    return logits.log_softmax(-1)


def mass(tree: Vocabulary, log_p: Tensor, node: int) -> Tensor:
    """Return the probability [r] of a node: the sum over the tokens below the node."""
    return log_p[:, sorted(below(tree, node, 0))].exp().sum(-1)


@given(trees(), st.integers(0, 99), st.booleans())
@many
def test_log_mass_is_log_of_sum_over_tokens_below_node(
    tree: HierarchicalVocabulary, seed: int, impossible: bool
) -> None:
    log_p = random_log_p(tree.num_tokens, seed, impossible=impossible)
    dist = DenseDistribution(log_p, tree)
    for level, (first, size) in enumerate(zip(tree.offsets, tree.level_sizes)):
        expected = torch.stack([mass(tree, log_p, node) for node in range(first, first + size)], -1)
        torch.testing.assert_close(dist.log_mass(level).exp(), expected, **EXACT)
        places = tree.order(level) - first
        torch.testing.assert_close(dist.log_below(level).exp(), expected[:, places], **EXACT)
    for node in range(tree.num_states):
        torch.testing.assert_close(
            dist.log_prob(torch.tensor([node] * 2)).exp(), mass(tree, log_p, node), **EXACT
        )


@given(trees(), st.integers(0, 99))
@many
def test_log_child_is_the_conditional_log_probability_at_any_depth(
    tree: HierarchicalVocabulary, seed: int
) -> None:
    log_p = random_log_p(tree.num_tokens, seed)
    dist = DenseDistribution(log_p, tree)
    for child in range(tree.num_states):
        for node in forward_step(tree, child):
            expected = (mass(tree, log_p, child) / mass(tree, log_p, node)).log()
            got = dist.log_child(torch.tensor([node] * 2), torch.tensor([child] * 2))
            torch.testing.assert_close(got, expected, rtol=0.0, atol=1e-11, check_dtype=False)


def test_log_p_of_a_node_given_itself_is_0_even_if_its_probability_is_0() -> None:
    dist = DenseDistribution(
        torch.tensor([[-torch.inf, 0.0]]).double(), HierarchicalVocabulary([[0, 1]])
    )
    for node in (0, 1, 2, 3):
        assert dist.log_child(torch.tensor([node]), torch.tensor([node])).tolist() == [0.0]


def test_clean_distribution_methods_return_the_dtype_of_log_p() -> None:
    dist = DenseDistribution(random_log_p(7, 0).float(), some_tree)
    assert {dist.log_mass(level).dtype for level in range(3)} == {torch.float32}


@given(trees(), st.integers(0, 99), st.booleans())
@many
def test_clean_distribution_draw_is_inverse_cdf_over_tokens_below_a_node(
    tree: HierarchicalVocabulary, seed: int, impossible: bool
) -> None:
    log_p = random_log_p(tree.num_tokens, seed, rows=1, impossible=impossible)
    uniforms = torch.rand(9, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    for node, level in itertools.product(range(tree.num_states), range(tree.num_levels + 1)):
        inside = [z for z in tree.order(level).tolist() if z in below(tree, node, level)]
        if mass(tree, log_p, node) == 0 or (
            not inside and level < int(tree.level_of(torch.tensor(node)))
        ):
            continue
        rows = len(uniforms)
        dist = DenseDistribution(log_p.expand(rows, -1), tree)
        drawn = dist.draw(torch.full((rows,), node), torch.full((rows,), level), uniforms).tolist()
        if not inside or level == int(tree.level_of(torch.tensor(node))):
            assert (
                drawn == [node] * rows
            )  # rows without a node at that level below them do not change
            continue
        share = torch.cat([mass(tree, log_p, z) for z in inside])
        edges = (share / share.sum()).cumsum(0)
        assert drawn == [inside[min(int((edges <= u).sum()), len(inside) - 1)] for u in uniforms]


def test_draws_below_a_node_follow_the_conditional_distribution() -> None:
    """N grid uniforms draw a node of probability p between N p - 1 and N p + 1 times."""
    points = 2000
    grid = (torch.arange(points, dtype=torch.float64) + 0.5) / points
    log_p = random_log_p(7, 3, rows=1)
    dist = DenseDistribution(log_p.expand(points, -1), some_tree)
    for node, level in [
        (some_tree.root, 0),
        (some_tree.root, 1),
        (some_tree.root, 2),
        (11, 0),
        (11, 1),
        (7, 0),
    ]:
        drawn = dist.draw(torch.full((points,), node), torch.full((points,), level), grid)
        share = torch.bincount(drawn, minlength=some_tree.num_states) / points
        expected = torch.zeros(some_tree.num_states)
        for z in below(some_tree, node, level):
            expected[z] = mass(some_tree, log_p, z) / mass(some_tree, log_p, node)
        torch.testing.assert_close(share, expected, rtol=0.0, atol=1.01 / points)


def test_draw_below_nodes_uses_the_node_and_level_of_each_row() -> None:
    dist = DenseDistribution(random_log_p(7, 5, rows=1).expand(4, -1), some_tree)
    node, level = torch.tensor([13, 13, 11, 4]), torch.tensor([2, 0, 1, 0])
    u = torch.tensor([0.1, 0.7, 0.5, 0.9], dtype=torch.float64)
    together = dist.draw(node, level, u)
    alone = [
        int(
            DenseDistribution(random_log_p(7, 5, rows=1), some_tree).draw(
                node[[i]], level[[i]], u[[i]]
            )
        )
        for i in range(4)
    ]
    assert together.tolist() == alone
    assert some_tree.level_of(together).tolist() == level.tolist()


def test_draws_below_a_node_stay_below_it_for_uniforms_near_0_and_1() -> None:
    """Draws stay below the node although float32 cumulative sums may end below or above 1."""
    ends = torch.tensor([0.0, 1.0 - 2.0**-53], dtype=torch.float64)
    tree = HierarchicalVocabulary([[i % 7 for i in range(500)]])
    for seed in range(20):
        dist = DenseDistribution(random_log_p(500, seed).float(), tree)
        for node in range(500, 507):
            drawn = dist.draw(torch.full((2,), node), torch.zeros(2).long(), ends)
            assert tree.parent(drawn).tolist() == [node, node]


def test_token_of_probability_zero_is_never_drawn() -> None:
    log_p = torch.tensor([[-torch.inf, 0.5, 0.0, 0.5, -torch.inf]]).log_softmax(-1).double()
    grid = torch.linspace(0, 1 - 2.0**-53, 101, dtype=torch.float64)
    drawn = DenseDistribution(log_p.expand(101, -1), FlatVocabulary(5)).draw(
        torch.full((101,), 5), torch.zeros(101).long(), grid
    )
    assert set(drawn.tolist()) == {1, 2, 3}


def test_draw_from_nan_distribution_raises() -> None:
    log_p = random_log_p(7, 0)
    log_p[1, 2] = torch.nan
    dist = DenseDistribution(log_p, some_tree)
    with pytest.raises(NonFiniteError, match="the predicted distribution holds NaN"):
        dist.draw(torch.tensor([13, 13]), torch.zeros(2).long(), torch.tensor([0.1, 0.2]).double())


def test_draw_below_a_node_of_probability_zero_raises() -> None:
    log_p = random_log_p(7, 0)
    log_p[:, sorted(below(some_tree, 8, 0))] = -torch.inf
    dist = DenseDistribution(log_p, some_tree)
    with pytest.raises(NonFiniteError, match="gives no probability to anything below"):
        dist.draw(torch.tensor([8, 8]), torch.zeros(2).long(), torch.tensor([0.1, 0.2]).double())


@given(trees(max_levels=3), st.integers(0, 99))
@many
def test_subtree_distribution_equals_full_distribution_below_its_top_node(
    tree: HierarchicalVocabulary, seed: int
) -> None:
    log_p, u = random_log_p(tree.num_tokens, seed), torch.tensor([0.2, 0.8], dtype=torch.float64)
    whole = DenseDistribution(log_p, tree)
    for top in range(tree.num_tokens, tree.num_states):
        start, stop = tree.node_range(torch.tensor(top), 0)
        words = tree.order(0)[int(start) : int(stop)]
        local = DenseDistribution(log_p[:, words].log_softmax(-1), tree, top)
        for level in range(int(tree.level_of(torch.tensor(top)))):
            drawn = local.draw(torch.tensor([top, top]), torch.tensor([level, level]), u)
            assert torch.equal(
                drawn, whole.draw(torch.tensor([top, top]), torch.tensor([level, level]), u)
            )
            for child in below(tree, top, level):
                for node in forward_step(tree, child)[
                    : int(tree.level_of(torch.tensor(top))) - level + 1
                ]:
                    pair = torch.tensor([node] * 2), torch.tensor([child] * 2)
                    torch.testing.assert_close(
                        local.log_child(*pair), whole.log_child(*pair), rtol=0.0, atol=1e-11
                    )


def test_subtree_distribution_rejects_nodes_above_its_top_node() -> None:
    dist = DenseDistribution(torch.zeros(1, 2).double().log_softmax(-1), some_tree, top=7)
    for network in (lambda: dist.log_prob(torch.tensor([1])), lambda: dist.log_mass(0)):
        with pytest.raises(ArgumentError, match="the rows were queried below node 7 only"):
            network()


def test_segment_logsumexp_handles_certain_and_impossible_segments() -> None:
    values = torch.tensor([[-1000.0, -1001.0, -torch.inf, 5.0, 800.0]], dtype=torch.float64)
    sums = segment_logsumexp(values, torch.tensor([0, 0, 1, 2, 2]), 3)
    torch.testing.assert_close(
        sums, torch.tensor([[-1000.0 + 0.31326168751822286, -torch.inf, 800.0]]).double()
    )


def test_segment_logsumexp_has_gradient_of_logsumexp() -> None:
    values = random_log_p(6, 1).requires_grad_()
    segment_logsumexp(values, torch.tensor([0, 0, 0, 1, 1, 2]), 3).pow(2).sum().backward()
    plain = values.detach().clone().requires_grad_()
    sums = [plain[:, :3].logsumexp(-1), plain[:, 3:5].logsumexp(-1), plain[:, 5]]
    torch.stack(sums).pow(2).sum().backward()
    torch.testing.assert_close(values.grad, plain.grad)


def test_segment_logsumexp_gradient_is_zero_at_logits_of_minus_infinity() -> None:
    values = torch.tensor(
        [[0.3, -0.2, -torch.inf, -torch.inf]], dtype=torch.float64, requires_grad=True
    )
    segment_logsumexp(values, torch.tensor([0, 0, 1, 1]), 2)[:, 0].sum().backward()
    weights = values.detach()[:, :2].softmax(-1)
    torch.testing.assert_close(values.grad, torch.nn.functional.pad(weights, (0, 2)), **EXACT)


# ---------------------------------------------------------------------- own evidence


def test_drop_own_evidence_gradient_is_zero_at_tokens_not_below_the_noisy_state() -> None:
    process = TreeProcess(HierarchicalVocabulary([[0, 1, 0, 1]]), LogTimeClock((1.0, 1.0)))
    logits = torch.tensor([[0.1, 0.2, -0.3, 0.4]], dtype=torch.float64, requires_grad=True)
    node, x0, t = torch.tensor([4]), torch.tensor([2]), torch.tensor([0.4], dtype=torch.float64)
    rest = drop_own_evidence(logits.log_softmax(-1), process.log_likelihood(node, t))
    process.divergence(DenseDistribution(rest, process.vocabulary), x0, node, t).sum().backward()
    share = logits.detach()[0, [0, 2]].softmax(-1)  # -ln P(token 2 | tokens 0 and 2)
    expected = torch.tensor(
        [[float(share[0]), 0.0, float(share[1]) - 1.0, 0.0]], dtype=torch.float64
    )
    torch.testing.assert_close(logits.grad, expected, **EXACT)


def conditionals(
    process: ForwardProcess, zt: Tensor, t: float, joint: Tensor
) -> tuple[Tensor, Tensor]:
    """Return P(x_i | z) and P(x_i | z without z_i), each [2,V].

    `joint` [V,V] is the distribution of two tokens x, and zt are their states z at time t.
    """
    evidence = process.log_likelihood(zt, torch.full((2,), t, dtype=torch.float64)).exp()
    first, second = evidence[0].unsqueeze(1), evidence[1].unsqueeze(0)
    full = joint * first * second
    dists = [full.sum(1), full.sum(0)], [(joint * second).sum(1), (joint * first).sum(0)]
    full, rest = (torch.stack([p / p.sum() for p in dist]) for dist in dists)
    return full, rest


@pytest.mark.parametrize(
    "process",
    [
        TreeProcess(HierarchicalVocabulary([[0, 1, 0, 1]]), LogTimeClock((0.5, 1.0)), xi=0.8),
        MixtureProcess(FlatVocabulary(4, mask=False), LinearSchedule(), torch.full((4,), 0.25)),
    ],
    ids=["stochastic parents", "uniform noise"],
)
def test_drop_own_evidence_turns_full_conditional_into_leave_one_out(
    process: ForwardProcess,
) -> None:
    joint = torch.rand(4, 4, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    joint /= joint.sum()
    t, checked = 0.4, 0
    for zt in itertools.product(range(process.vocabulary.num_states), repeat=2):
        state = torch.tensor(zt)
        likelihood = process.log_likelihood(state, torch.full((2,), t, dtype=torch.float64))
        full, rest = conditionals(process, state, t, joint)
        got = drop_own_evidence(full.log(), likelihood).exp()
        informative = likelihood.isfinite().all(-1)  # every token may have become z_i
        torch.testing.assert_close(got[informative], rest[informative], **EXACT)
        checked += int(informative.sum())
        possible = torch.where(likelihood.isfinite(), rest, 0.0)
        torch.testing.assert_close(got, possible / possible.sum(-1, keepdim=True), **EXACT)
    assert checked >= process.vocabulary.num_states  # at least one case per state was compared
