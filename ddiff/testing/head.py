"""Laws of a head: what it says in chunks is one law, in value and in gradient."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import TypeVar

import torch
from torch import Tensor, nn

from ddiff.core.prediction import CleanDistribution
from ddiff.nn.heads import Head
from ddiff.testing.clean_distribution import CLEAN_DISTRIBUTION_LAWS, below
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

ROWS = 17


Module = TypeVar("Module", bound=nn.Module)


def in_float64(module: Module, scale: float = 1.0) -> Module:
    """A float64 copy in evaluation mode with random parameters, so that a start at zero hides nothing."""
    twin = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.copy_(
                scale * torch.randn(parameter.shape, generator=generator, dtype=torch.float64)
            )
    return twin


def _questions(head: Head) -> tuple[Tensor, Tensor, Tensor]:
    """hidden [n,d], and for every row a node that it asks below and a word below that node."""
    vocabulary = head.vocabulary
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(ROWS, head.width, generator=generator, dtype=torch.float64)
    nodes = torch.arange(vocabulary.num_tokens, vocabulary.root + 1)
    node = nodes[torch.arange(ROWS) * 5 % len(nodes)]
    words = [below(vocabulary, n, 0) for n in node.tolist()]
    word = torch.stack([below_node[i % len(below_node)] for i, below_node in enumerate(words)])
    return hidden, node, word


def _query(
    head: Head,
    hidden: Tensor,
    node: Tensor,
    question: Callable[[CleanDistribution, Tensor], Tensor],
) -> Tensor:
    (told,) = head.query(hidden, node, lambda prediction, idx: (question(prediction, idx), idx))[:1]
    return told


def _surprise(node: Tensor, word: Tensor) -> Callable[[CleanDistribution, Tensor], Tensor]:
    return lambda prediction, idx: (
        prediction.log_child(node[idx], word[idx]).square()
        - prediction.log_child(node[idx], word[idx])
    )


@law("head: visit below a node = visit at the root", tolerance=1e-10)
def scopes_agree(head: Head) -> Iterator[Gap]:
    """A row that asks below its node learns the same conditional law as one that asks about everything. Rounding."""
    head = in_float64(head)
    hidden, node, word = _questions(head)
    question = _surprise(node, word)
    whole = _query(head, hidden, torch.full_like(node, head.vocabulary.root), question)
    yield compare(
        _query(head, hidden, node, question), whole, {"node": node, "word": word}, 1.0 + whole.abs()
    )


@law("head: chunks change nothing", tolerance=1e-10)
def chunks_agree(head: Head) -> Iterator[Gap]:
    """Rows one at a time and all together give the same values, from `visit` and `total`, in the rows' order. Rounding."""
    head = in_float64(head)
    hidden, node, word = _questions(head)
    question = _surprise(node, word)
    whole = _query(head, hidden, node, question)
    head.chunk_logits = 1
    total, values = head.total(hidden, node, question)
    yield compare(_query(head, hidden, node, question), whole, {"node": node}, 1.0 + whole.abs())
    yield compare(values, whole, {"node": node}, 1.0 + whole.abs())
    yield compare(total, whole.sum(), {"the": "sum"}, 1.0 + whole.abs().sum())


@law("head: gradients = autograd of the dense law", tolerance=1e-9)
def gradients_agree(head: Head) -> Iterator[Gap]:
    """`total`, chunked, has the gradient that autograd finds for the same sum when all logits exist at once. Relative."""
    twin = in_float64(head)
    hidden, node, word = _questions(head)
    question, everybody = _surprise(node, word), torch.arange(ROWS)
    inputs = [hidden.requires_grad_(), *twin.parameters()]
    whole = twin.dist(
        lambda a, b: hidden @ twin.table[a:b].t() + twin.bias[a:b], twin.vocabulary.root
    )
    expected = torch.autograd.grad(3.0 * question(whole, everybody).sum(), inputs)
    twin.chunk_logits = 1
    got = torch.autograd.grad(3.0 * twin.total(hidden, node, question)[0], inputs)
    for name, ours, dense in zip(
        ("hidden", *(name for name, _ in twin.named_parameters())), got, expected
    ):
        yield compare(ours, dense, {"gradient of": name}, 1.0 + dense.abs().max())


HEAD_LAWS: tuple[Law, ...] = (scopes_agree, chunks_agree, gradients_agree)


def check_head(head: Head) -> list[LawReport]:
    """Every law of a head on a small vocabulary, and those of the laws that it gives at the root and below each node."""
    reports = evaluate_laws(head, HEAD_LAWS)
    for node in (
        head.vocabulary.root,
        *range(head.vocabulary.num_tokens, head.vocabulary.num_states - 1),
    ):
        reports += _law_reports(in_float64(head), node)
    return reports


def _law_reports(head: Head, node: int) -> list[LawReport]:
    hidden = torch.randn(
        3, head.width, generator=torch.Generator().manual_seed(2), dtype=torch.float64
    )
    gathered: list[LawReport] = []

    def question(prediction: CleanDistribution, idx: Tensor) -> Tensor:
        gathered.extend(evaluate_laws(prediction, CLEAN_DISTRIBUTION_LAWS))
        return torch.zeros(len(idx))

    head.query(hidden, torch.full((3,), node), question)
    return gathered
