"""Faults planted in clean distributions, heads and denoisers, each found by the law meant for it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import PAIR, THREE
from faults import ONE_LEVEL, Fault, Trunk, assert_found, network
from torch import Tensor

from ddiff.core.prediction import DenseDistribution, SubtreeDistribution
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.nn.denoiser import Context, Denoiser
from ddiff.nn.heads import Logits, TokenHead, TreeHead
from ddiff.testing import clean_distribution, denoiser, head


class HalfALaw(SubtreeDistribution):
    """Level-wise logits that were never normalised among siblings."""

    def log_below(self, level: int) -> Tensor:
        width = len(clean_distribution.below(self.vocabulary, self.top, level))
        return torch.linspace(-1.0, 0.5, width, dtype=torch.float64).expand(2, -1)


class ALaw(HalfALaw):
    """The healthy twin: words normalised, nodes their sums."""

    def log_below(self, level: int) -> Tensor:
        words = super().log_below(0).log_softmax(-1)
        nodes = clean_distribution.below(self.vocabulary, self.top, level)
        spans = [self.vocabulary.node_range(node, 0) for node in nodes]
        return torch.stack([words[:, int(a) : int(b)].logsumexp(-1) for a, b in spans], -1)


class Unconditional(ALaw):
    def log_child(self, node: Tensor, child: Tensor) -> Tensor:
        return self.log_prob(child)


class SteppingFromTheTop(ALaw):
    """A step to the node where the row is already costs what it takes to get there."""

    def log_step(self, node: Tensor, child: Tensor) -> Tensor:
        return self.log_prob(child)


class ForgettingWhere(ALaw):
    """Draws below the root, wherever a row is."""

    def draw(self, node: Tensor, level: Tensor, u: Tensor) -> Tensor:
        return super().draw(torch.full_like(node, self.top), level, u)


class Reversed(TreeHead):
    """The words of a node in another order than the table's."""

    def dist(self, logits: Logits, top: int) -> SubtreeDistribution:
        def flipped(a, b):
            return logits(a, b).flip(-1) if top != self.vocabulary.root else logits(a, b)

        return super().dist(flipped, top)


class DetachedHidden(TokenHead):
    """A head that trains its table and not the trunk."""

    def total(self, hidden: Tensor, node: Tensor, fn: Any) -> Any:
        return super().total(hidden.detach() + 0.0 * hidden, node, fn)


class FirstChunkOnly(TokenHead):
    def query(self, hidden: Tensor, node: Tensor, fn: Any) -> Any:
        predictions = super().query(hidden, node, fn)
        return tuple(prediction[:1].expand_as(prediction) for prediction in predictions)


class BareLogits(TokenHead):
    """Logits handed on as if they were a law."""

    def dist(self, logits: Logits, top: int) -> SubtreeDistribution:
        return DenseDistribution(logits(0, self.vocabulary.num_tokens), self.vocabulary)


class BatchNormalised(Trunk):
    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        hidden = super().forward(ids, t, context)
        return hidden - hidden.mean((0, 1))


class Unmasked(Trunk):
    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        return super().forward(ids, t, Context())


FAULTS = [
    Fault(
        "children with their nodes' mass",
        clean_distribution.children_are_conditional,
        lambda: ALaw(THREE, THREE.root),
        lambda: Unconditional(THREE, THREE.root),
    ),
    Fault(
        "steps that start at the top",
        clean_distribution.children_are_conditional,
        lambda: ALaw(THREE, THREE.root),
        lambda: SteppingFromTheTop(THREE, THREE.root),
    ),
    Fault(
        "draws that forget the node",
        clean_distribution.draws_follow_distribution,
        lambda: ALaw(THREE, THREE.root),
        lambda: ForgettingWhere(THREE, THREE.root),
    ),
    Fault(
        "logits for a law",
        denoiser.rows_have_distributions,
        lambda: network(Trunk),
        lambda: network(Trunk, BareLogits),
        {"process": ONE_LEVEL},
    ),
    Fault(
        "a law that is not normalised",
        clean_distribution.masses_add_up,
        lambda: ALaw(THREE, THREE.root),
        lambda: HalfALaw(THREE, THREE.root),
    ),
    Fault(
        "words of a node in another order",
        head.scopes_agree,
        lambda: TreeHead(PAIR, 4, "tied"),
        lambda: Reversed(PAIR, 4, "tied"),
    ),
    Fault(
        "no gradient to the trunk",
        head.gradients_agree,
        lambda: TokenHead(PAIR, 4),
        lambda: DetachedHidden(PAIR, 4),
    ),
    Fault(
        "rows that all get the first answer",
        head.chunks_agree,
        lambda: TokenHead(PAIR, 4),
        lambda: FirstChunkOnly(PAIR, 4),
    ),
    Fault(
        "statistics over the batch",
        denoiser.batches_agree,
        lambda: network(Trunk),
        lambda: network(BatchNormalised),
        {"process": ONE_LEVEL},
    ),
    Fault(
        "padding that is seen",
        denoiser.padding_is_invisible,
        lambda: network(Trunk),
        lambda: network(Unmasked),
        {"process": ONE_LEVEL},
    ),
    Fault(
        "documents that leak",
        denoiser.documents_are_separate,
        lambda: network(Trunk),
        lambda: network(Unmasked),
        {"process": ONE_LEVEL},
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.what)
def test_law_detects_planted_fault(fault: Fault) -> None:
    assert_found(fault)


def test_a_full_conditional_that_is_not_converted_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    from ddiff.nn import denoiser as engine

    given_all = Denoiser(Trunk(), TokenHead(FlatVocabulary(3), 4), given="all")
    assert denoiser.evidence_is_dropped(given_all, process=ONE_LEVEL).passed
    monkeypatch.setattr(engine.FullParameterization, "question", lambda self, fn, *rest: fn)
    assert not denoiser.evidence_is_dropped(given_all, process=ONE_LEVEL).passed
