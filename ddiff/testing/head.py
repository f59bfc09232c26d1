"""Conformance checks of a head, the layer that predicts tokens from hidden states.

A head computes its results in chunks of rows. Values and gradients must equal those of one dense
distribution over all tokens.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor, nn

from ddiff.core.prediction import CleanDistribution
from ddiff.nn.heads import Head
from ddiff.testing.clean_distribution import CLEAN_DISTRIBUTION_LAWS, below
from ddiff.testing.report import Gap, Law, LawReport, compare, evaluate_laws, law

ROWS = 17

Module = TypeVar("Module", bound=nn.Module)
RowValue = Callable[[CleanDistribution, Tensor], Tensor]  # (prediction, row indices [k]) -> [k]


def randomize_in_float64(
    module: Module,
    scale: float = 1.0,
) -> Module:
    """Copy a module to float64, in evaluation mode, with random parameters.

    Parameters that are initialized to zero would hide faults. `scale` is the standard deviation of
    the new parameters.
    """
    twin = copy.deepcopy(module).double().eval()
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in twin.parameters():
            values = torch.randn(
                parameter.shape,
                generator=generator,
                dtype=torch.float64,
            )
            parameter.copy_(scale * values)
    return twin


class HeadRows(NamedTuple):
    """Rows on which a head is queried.

    Attributes:
        hidden: [n,d] hidden states.
        node: [n] nodes of the vocabulary's tree; a row is queried for the tokens below its node.
        token: [n] one leaf token below each node.
    """

    hidden: Tensor
    node: Tensor
    token: Tensor

    def value(
        self,
        prediction: CleanDistribution,
        idx: Tensor,
    ) -> Tensor:
        """Return (log P)^2 - log P for the rows idx, where P is the predicted P(token | node).

        The square makes the gradient depend on the value, which exposes wrong gradients.
        """
        log_p = prediction.log_child(self.node[idx], self.token[idx])
        return log_p.square() - log_p

    @property
    def labels(self) -> dict[str, Tensor]:
        return {"node": self.node, "token": self.token}


def _make_rows(head: Head) -> HeadRows:
    vocabulary = head.vocabulary
    generator = torch.Generator().manual_seed(1)
    hidden = torch.randn(
        ROWS,
        head.width,
        generator=generator,
        dtype=torch.float64,
    )
    nodes = torch.arange(
        vocabulary.num_tokens,
        vocabulary.root + 1,
    )
    # 5 is coprime to most counts, so that rows of one node are not contiguous
    node = nodes[torch.arange(ROWS) * 5 % len(nodes)]
    tokens = []
    for row, top in enumerate(node.tolist()):
        candidates = below(vocabulary, top, 0)
        tokens.append(candidates[row % len(candidates)])
    return HeadRows(hidden, node, torch.stack(tokens))


def _query_values(
    head: Head,
    hidden: Tensor,
    node: Tensor,
    value: RowValue,
) -> Tensor:
    def with_index(
        prediction: CleanDistribution,
        idx: Tensor,
    ) -> tuple[Tensor, Tensor]:
        return value(prediction, idx), idx

    return head.query(hidden, node, with_index)[0]


@law("head: query below a node = query at the root", tolerance=1e-10)
def scopes_agree(head: Head) -> Iterator[Gap]:
    """Check that a query below a node gives the same probabilities as a query at the root.

    The compared values are (log P)^2 - log P, where P is P(token | node). The error is relative.
    Tolerance 1e-10: float64 rounding.
    """
    head = randomize_in_float64(head)
    rows = _make_rows(head)
    at_root = torch.full_like(rows.node, head.vocabulary.root)
    whole = _query_values(head, rows.hidden, at_root, rows.value)
    got = _query_values(
        head,
        rows.hidden,
        rows.node,
        rows.value,
    )
    yield compare(
        got,
        whole,
        rows.labels,
        relative_to=1.0 + whole.abs(),
    )


@law("head: results do not depend on the chunk size", tolerance=1e-10)
def chunks_agree(head: Head) -> Iterator[Gap]:
    """Check that a head returns the same values for chunks of one row as for all rows at once.

    `query` returns a value for each row, and `total` also returns the sum of the values. Both
    methods are evaluated in chunks of one row and compared with `query` at the default chunk size.
    Values must be in row order. The error is relative. Tolerance 1e-10: float64 rounding.
    """
    head = randomize_in_float64(head)
    rows = _make_rows(head)
    labels = {"node": rows.node}
    whole = _query_values(
        head,
        rows.hidden,
        rows.node,
        rows.value,
    )
    scale = 1.0 + whole.abs()
    # the smallest chunks have one row each
    head.chunk_logits = 1
    total, values = head.total(rows.hidden, rows.node, rows.value)
    chunked = _query_values(
        head,
        rows.hidden,
        rows.node,
        rows.value,
    )
    yield compare(chunked, whole, labels, relative_to=scale)
    yield compare(values, whole, labels, relative_to=scale)
    yield compare(
        total,
        whole.sum(),
        {"the": "sum"},
        relative_to=1.0 + whole.abs().sum(),
    )


@law("head: gradients = autograd of the dense distribution", tolerance=1e-9)
def gradients_agree(head: Head) -> Iterator[Gap]:
    """Check that `Head.total`, which sums values over rows in chunks, has the exact gradient.

    The chunks have one row. The expected gradient is that of autograd through the same sum,
    computed from the logits of all rows at once. Gradients with respect to the hidden states and
    all parameters are compared, relative to the largest entry. Tolerance 1e-9: float64 rounding.
    """
    twin = randomize_in_float64(head)
    rows = _make_rows(head)
    hidden = rows.hidden.requires_grad_()
    parameters = dict(twin.named_parameters())
    inputs = [hidden, *parameters.values()]

    def logits(start: int, stop: int) -> Tensor:
        return hidden @ twin.table[start:stop].t() + twin.bias[start:stop]

    whole = twin.dist(logits, twin.vocabulary.root)
    expected = torch.autograd.grad(
        3.0 * rows.value(whole, torch.arange(ROWS)).sum(),
        inputs,
    )
    twin.chunk_logits = 1
    total = twin.total(hidden, rows.node, rows.value)[0]
    got = torch.autograd.grad(3.0 * total, inputs)
    for name, chunked, dense in zip(("hidden", *parameters), got, expected):
        yield compare(
            chunked,
            dense,
            {"gradient of": name},
            relative_to=1.0 + dense.abs().max(),
        )


HEAD_LAWS: tuple[Law, ...] = (scopes_agree, chunks_agree, gradients_agree)


def check_head(head: Head) -> list[LawReport]:
    """Apply every conformance check of heads to a head on a small vocabulary.

    The checks for clean-token distributions are applied to the distributions that the head predicts
    at the root and below each node of the vocabulary's tree.
    """
    reports = evaluate_laws(head, HEAD_LAWS)
    vocabulary = head.vocabulary
    # the root is the last id
    nodes = [vocabulary.root, *range(vocabulary.num_tokens, vocabulary.num_states - 1)]
    for node in nodes:
        reports += _check_distributions(randomize_in_float64(head), node)
    return reports


def _check_distributions(
    head: Head,
    node: int,
) -> list[LawReport]:
    generator = torch.Generator().manual_seed(2)
    hidden = torch.randn(
        3,
        head.width,
        generator=generator,
        dtype=torch.float64,
    )
    reports: list[LawReport] = []

    def check(prediction: CleanDistribution, idx: Tensor) -> Tensor:
        reports.extend(evaluate_laws(prediction, CLEAN_DISTRIBUTION_LAWS))
        return torch.zeros(len(idx))

    head.query(hidden, torch.full((3,), node), check)
    return reports
