"""Heads that compute in chunks equal the dense distribution, in value and gradient."""

from __future__ import annotations

import math

import pytest
import torch
from dense_heads import (
    KINDS,
    TREES,
    dense_distribution,
    dense_log_p,
    make_head,
    random_nodes,
    random_token_below,
)
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ddiff.core.prediction import CleanDistribution
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.errors import ArgumentError, NonFiniteError
from ddiff.nn.heads import Head, LevelwiseDistribution, TokenHead, TreeHead

# Chunks sum the same numbers in another order, which changes a float64 value of size one by less
# than 1e-14 per term.
EXACT = {"rtol": 1e-12, "atol": 1e-12}
ROWS = 23


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(7)


@pytest.fixture(params=[(tree, kind) for tree in TREES for kind in KINDS], ids="-".join)
def head(request: pytest.FixtureRequest) -> Head:
    tree, kind = request.param
    return make_head(kind, TREES[tree])


def rows_of(head: Head, rows: int = ROWS) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Return random inputs of a head for `rows` rows.

    - Hidden states [rows, width], a leaf tensor of autograd.
    - Nodes [rows].
    - A token [rows] below each node.
    - A state [rows] between the node and the token, at a random level.
    """
    generator = torch.Generator().manual_seed(3)
    vocabulary = head.vocabulary
    hidden = torch.randn(
        rows, head.width, generator=generator, dtype=torch.float64, requires_grad=True
    )
    node = random_nodes(vocabulary, rows, generator)
    word = random_token_below(vocabulary, node, generator)
    depth = (torch.rand(rows, generator=generator) * vocabulary.level_of(node)).long()
    return hidden, node, word, vocabulary.ancestor(word, depth)


def weighted_surprise(node: Tensor, child: Tensor, weight: Tensor) -> object:
    def fn(dist: CleanDistribution, idx: Tensor) -> tuple[Tensor, Tensor]:
        surprise = -dist.log_child(node[idx], child[idx])
        return weight[idx] * surprise + surprise.square(), surprise

    return fn


def gradients(value: Tensor, hidden: Tensor, head: Head) -> list[Tensor]:
    return list(torch.autograd.grad(value, [hidden, head.table, head.bias]))


@pytest.mark.parametrize("chunk_logits", [1, 20, 2**22])
def test_chunked_loss_of_a_head_equals_the_dense_loss_with_gradients(
    head: Head, chunk_logits: int
) -> None:
    head.chunk_logits = chunk_logits
    hidden, node, _, child = rows_of(head)
    weight = torch.rand(ROWS, dtype=torch.float64)
    fn = weighted_surprise(node, child, weight)
    total, values, surprise = head.total(hidden, node, fn)
    dense_values, dense_surprise = fn(dense_distribution(head, hidden), torch.arange(ROWS))
    torch.testing.assert_close(total, dense_values.sum(), **EXACT)
    torch.testing.assert_close(values, dense_values.detach(), **EXACT)
    torch.testing.assert_close(surprise, dense_surprise.detach(), **EXACT)
    assert not values.requires_grad
    for ours, dense in zip(
        gradients(3.0 * total, hidden, head),
        gradients(3.0 * dense_values.sum(), hidden, head),
        strict=True,
    ):
        torch.testing.assert_close(ours, dense, **EXACT)


def test_head_distribution_at_the_root_has_probabilities_of_every_level(head: Head) -> None:
    hidden, _, word, _ = rows_of(head)
    root = torch.full_like(word, head.vocabulary.root)
    dense = dense_distribution(head, hidden)
    levels = range(max(head.vocabulary.num_levels, 1))

    def fn(dist: CleanDistribution, idx: Tensor) -> tuple[Tensor, ...]:
        return (
            dist.log_mass(0).logsumexp(-1),
            dist.log_prob(word[idx]),
            *(dist.log_mass(level) for level in levels),
        )

    whole, log_prob, *masses = head.query(hidden, root, fn)
    torch.testing.assert_close(whole, torch.zeros_like(whole), **EXACT)
    torch.testing.assert_close(log_prob, dense.log_prob(word).detach(), **EXACT)
    for level, mass in zip(levels, masses, strict=True):
        assert (
            mass.shape[1] == head.vocabulary.level_sizes[level]
        )  # level 0 has only tokens: the mask has no logit
        torch.testing.assert_close(mass, dense.log_mass(level).detach(), **EXACT)


def test_gradient_of_a_node_probability_reaches_the_logits_of_all_levels(head: Head) -> None:
    """The function is the entropy at every level, whose gradient reaches all logits."""
    hidden, _, word, _ = rows_of(head)
    root = torch.full_like(word, head.vocabulary.root)

    def fn(dist: CleanDistribution, idx: Tensor) -> Tensor:
        masses = [dist.log_mass(level) for level in range(max(head.vocabulary.num_levels, 1))]
        return sum(
            (-(mass.exp() * mass).sum(-1) for mass in masses),
            torch.zeros(len(idx), dtype=torch.float64),
        )

    total = head.total(hidden, root, fn)[0]
    dense = fn(dense_distribution(head, hidden), torch.arange(ROWS)).sum()
    for ours, expected in zip(
        gradients(total, hidden, head), gradients(dense, hidden, head), strict=True
    ):
        torch.testing.assert_close(ours, expected, **EXACT)


def test_head_methods_query_and_total_return_equal_results_for_each_row(head: Head) -> None:
    hidden, node, _, child = rows_of(head)
    fn = weighted_surprise(node, child, torch.rand(ROWS, dtype=torch.float64))
    head.chunk_logits = 20
    for visited, returned in zip(
        head.query(hidden, node, fn), head.total(hidden, node, fn)[1:], strict=True
    ):
        torch.testing.assert_close(visited, returned, **EXACT)


def test_head_draws_equal_draws_of_the_dense_distribution(head: Head) -> None:
    hidden, node, _, _ = rows_of(head, 200)
    level, u = torch.zeros_like(node), torch.rand(200, dtype=torch.float64)
    fn = lambda dist, idx: dist.draw(node[idx], level[idx], u[idx])  # noqa: E731
    drawn = head.query(hidden, node, fn)
    assert torch.equal(drawn, fn(dense_distribution(head, hidden.detach()), torch.arange(200)))


def test_chunked_loss_of_a_head_passes_gradcheck() -> None:
    """The gradients of a chunked head equal finite differences."""
    head = make_head("levelwise", TREES["three levels"], width=3)
    head.chunk_logits = 10
    hidden, node, _, child = rows_of(head, 6)
    fn = weighted_surprise(node, child, torch.rand(6, dtype=torch.float64))

    def value(hidden: Tensor, table: Tensor, bias: Tensor) -> Tensor:
        return torch.func.functional_call(
            _Total(head), {"head.table": table, "head.bias": bias}, (hidden, node, fn)
        )

    assert torch.autograd.gradcheck(value, (hidden, head.table, head.bias))


class _Total(torch.nn.Module):
    def __init__(self, head: Head) -> None:
        super().__init__()
        self.head = head

    def forward(self, hidden: Tensor, node: Tensor, fn: object) -> Tensor:
        return self.head.total(hidden, node, fn)[0]


def test_chunked_loss_of_no_rows_is_zero_with_zero_gradients(head: Head) -> None:
    """Every parameter gets a gradient, because other ranks wait for its reduction."""
    hidden, node, _, child = rows_of(head)
    fn = weighted_surprise(node[:0], child[:0], torch.rand(0, dtype=torch.float64))
    total, values, _ = head.total(hidden[:0], node[:0], fn)
    assert total == 0
    assert len(values) == 0
    assert all(not gradient.any() for gradient in gradients(total, hidden, head))
    assert len(head.query(hidden[:0], node[:0], fn)[0]) == 0


def test_head_computes_no_logits_at_positions_with_clean_tokens() -> None:
    """Rows at clean tokens cost no logits and change no result of other rows.

    A process may query such rows, although it leaves clean tokens unchanged.
    """
    head = make_head("tied", TREES["two levels"])
    hidden, node, word, _ = rows_of(head)
    node[::3] = word[::3]
    fn = weighted_surprise(node, word, torch.ones(ROWS, dtype=torch.float64))
    total, _, surprise = head.total(hidden, node, fn)
    assert not surprise[::3].any()
    assert not gradients(total, hidden, head)[0][::3].any()
    with pytest.raises(ArgumentError, match="below which there is nothing"):
        head.query(hidden, word, lambda dist, idx: dist.log_below(0))


def test_head_computes_no_gradient_if_autograd_is_off(head: Head) -> None:
    hidden, node, _, child = rows_of(head)
    with torch.no_grad():
        total, *_ = head.total(hidden, node, weighted_surprise(node, child, torch.ones(ROWS)))
    assert not total.requires_grad


def test_head_gradients_scale_with_a_factor_of_the_loss(head: Head) -> None:
    hidden, node, _, child = rows_of(head)
    total = head.total(hidden, node, weighted_surprise(node, child, torch.ones(ROWS)))[0]
    once = torch.autograd.grad(total, head.table, retain_graph=True)[0]
    assert torch.equal(torch.autograd.grad(2 * total, head.table)[0], 2 * once)


class Allocations(TorchDispatchMode):
    """Dispatch mode that counts new tensors of a given size which are not views of an argument."""

    def __init__(self, elements: int) -> None:
        super().__init__()
        self.elements, self.count = elements, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        result = func(*args, **(kwargs or {}))
        if isinstance(result, Tensor) and result.numel() == self.elements:
            arguments = {a.untyped_storage().data_ptr() for a in args if isinstance(a, Tensor)}
            self.count += result.untyped_storage().data_ptr() not in arguments
        return result


@pytest.mark.parametrize("kind", ["tied", "levelwise"])
def test_head_uses_one_gradient_buffer_for_any_number_of_chunks(kind: str) -> None:
    """A query of 64 nodes makes only two tensors of the size of the table.

    These are the buffer of the table's gradient, and the product of this buffer with the incoming
    gradient. Slices of the table under autograd would make a tensor for each node, which is 36
    times slower for a vocabulary of 50k.
    """
    vocabulary = HierarchicalVocabulary([torch.arange(512) % 64])
    head = make_head(kind, vocabulary, width=3)
    node = vocabulary.offsets[1] + torch.arange(64).repeat(2)
    word = node - vocabulary.offsets[1]
    hidden = torch.randn(128, 3, dtype=torch.float64, requires_grad=True)
    with Allocations(head.table.numel()) as allocations:
        head.total(hidden, node, lambda dist, idx: -dist.log_child(node[idx], word[idx]))[
            0
        ].backward()
    assert head.table.grad is not None
    assert allocations.count <= 2


@pytest.mark.parametrize("kind", ["tied", "levelwise"])
def test_head_computes_only_logits_below_the_queried_node(kind: str) -> None:
    head = make_head(kind, TREES["three levels"])
    assert isinstance(head, TreeHead)
    vocabulary, read = head.vocabulary, []
    node = vocabulary.offsets[2]

    def logits(start: int, stop: int) -> Tensor:
        read.append(stop - start)
        return torch.zeros(2, stop - start, dtype=torch.float64)

    dist = head.dist(logits, node)
    children = vocabulary.children(node)
    dist.log_child(torch.tensor([node, node]), children[[0, -1]])
    words = int((vocabulary.ancestor(torch.arange(vocabulary.num_tokens), 2) == node).sum())
    assert read == [words if kind == "tied" else len(children)]


def test_new_head_predicts_the_uniform_distribution() -> None:
    vocabulary = TREES["three levels"]
    root = torch.tensor([vocabulary.root])
    mass = lambda dist, idx: dist.log_mass(0)  # noqa: E731
    for head in (TokenHead(vocabulary, 4), TreeHead(vocabulary, 4, "tied")):
        log_p = head.query(torch.randn(1, 4), root, mass)
        torch.testing.assert_close(log_p, torch.full_like(log_p, -math.log(vocabulary.num_tokens)))
    head = TreeHead(vocabulary, 4, "levelwise")
    log_p = head.query(torch.randn(1, 4), root, mass)[0]
    for word in range(vocabulary.num_tokens):
        path = [
            int(vocabulary.ancestor(torch.tensor(word), level))
            for level in range(1, vocabulary.num_levels + 1)
        ]
        choices = math.prod(int(vocabulary.num_children(torch.tensor(node))) for node in path)
        assert log_p[word] == pytest.approx(-math.log(choices), abs=1e-6)  # float32


def test_head_initialized_from_counts_predicts_the_unigram_distribution() -> None:
    for vocabulary in TREES.values():
        counts = torch.randint(50, (vocabulary.num_tokens,))
        counts[0] = 0  # a token with count 0 has a finite loss
        unigram = ((counts + 1).double() / (counts + 1).sum()).log()
        for kind in KINDS:
            head = make_head(kind, vocabulary)
            torch.nn.init.zeros_(head.table)
            head.start_from_counts(counts)
            log_p = dense_log_p(head, torch.randn(1, head.width, dtype=torch.float64))[0]
            torch.testing.assert_close(log_p, unigram, **EXACT)


def test_head_state_dict_survives_a_round_trip(head: Head) -> None:
    kind = head.kind or "tokens"
    again = make_head(kind, head.vocabulary)
    again.load_state_dict(head.state_dict())
    hidden, _, word, _ = rows_of(head)
    root = torch.full_like(word, head.vocabulary.root)
    mass = lambda dist, idx: dist.log_mass(0)  # noqa: E731
    assert torch.equal(again.query(hidden, root, mass), head.query(hidden, root, mass))


def test_predicted_distributions_are_float32_under_autocast() -> None:
    """Logits may be rounded to bfloat16, but the softmax is float32 and must sum to one."""
    head = make_head("levelwise", TREES["two levels"]).float()
    hidden, node, _, child = rows_of(head)
    hidden = hidden.detach().float().requires_grad_()
    seen = []

    def fn(dist: CleanDistribution, idx: Tensor) -> Tensor:
        value = -dist.log_child(node[idx], child[idx])
        seen.append(value.dtype)
        return value

    with torch.autocast("cpu", dtype=torch.bfloat16):
        total, _ = head.total(hidden, node, fn)
        root = torch.full_like(node, head.vocabulary.root)
        log_p = head.query(hidden, root, lambda dist, idx: dist.log_mass(0))
    total.backward()
    assert set(seen) == {torch.float32}
    torch.testing.assert_close(log_p.exp().sum(-1), torch.ones(ROWS))
    assert head.table.grad is not None
    exact = head.total(hidden, node, fn)[0]
    torch.testing.assert_close(total, exact, rtol=2e-2, atol=0)
    ours, expected = head.table.grad.flatten(), torch.autograd.grad(exact, head.table)[0].flatten()
    assert torch.nn.functional.cosine_similarity(ours, expected, dim=0) > 0.999


def test_heads_have_is_table_true_for_the_optimizer() -> None:
    assert all(make_head(kind, FlatVocabulary(4)).is_table for kind in KINDS)


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_head_query_refuses_logits_that_are_not_finite(head: Head, value: float) -> None:
    hidden, node, _, child = rows_of(head)
    with torch.no_grad():
        hidden[4, 2] = value
    with pytest.raises(NonFiniteError, match="checkpoint"):
        head.query(hidden, node, lambda dist, idx: dist.log_child(node[idx], child[idx]))


def test_tree_head_error_for_an_unknown_kind_lists_the_valid_kinds() -> None:
    with pytest.raises(ArgumentError, match="tied"):
        TreeHead(FlatVocabulary(4), 3, "flat")  # type: ignore[arg-type]


def test_levelwise_distribution_computes_each_level_once() -> None:
    calls = []

    def logits(start: int, stop: int) -> Tensor:
        calls.append(start)
        return torch.zeros(1, stop - start, dtype=torch.float64)

    vocabulary = TREES["three levels"]
    dist = LevelwiseDistribution(logits, vocabulary, vocabulary.root)
    dist.log_mass(0), dist.log_mass(0), dist.log_mass(1)
    assert len(calls) == len(set(calls)) == 3
