"""Faults planted in clean distributions, heads and denoisers.

Each fault must be detected by one conformance check.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from chains import PAIR, THREE
from faults import ONE_LEVEL, Fault, MeanBackbone, assert_detected, build_denoiser
from torch import Tensor

from ddiff.core.prediction import DenseDistribution, SubtreeDistribution
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.nn.denoiser import Context, Denoiser
from ddiff.nn.heads import Logits, TokenHead, TreeHead
from ddiff.testing import clean_distribution, denoiser, head


class UnnormalizedDistribution(SubtreeDistribution):
    """Fault: the probabilities of a level do not sum to 1."""

    def log_below(self, level: int) -> Tensor:
        width = len(clean_distribution.below(self.vocabulary, self.top, level))
        return torch.linspace(-1.0, 0.5, width, dtype=torch.float64).expand(2, -1)


class NormalizedDistribution(UnnormalizedDistribution):
    """Correct counterpart: tokens are normalized, and a node has the sum over its tokens."""

    def log_below(self, level: int) -> Tensor:
        words = super().log_below(0).log_softmax(-1)
        nodes = clean_distribution.below(self.vocabulary, self.top, level)
        spans = [self.vocabulary.node_range(node, 0) for node in nodes]
        return torch.stack([words[:, int(a) : int(b)].logsumexp(-1) for a, b in spans], -1)


class JointAsConditional(NormalizedDistribution):
    """Fault: `log_child` is the joint probability instead of the conditional probability."""

    def log_child(self, node: Tensor, child: Tensor) -> Tensor:
        return self.log_prob(child)


class StepFromTop(NormalizedDistribution):
    """Fault: `log_step` starts at the top node instead of the row's node."""

    def log_step(self, node: Tensor, child: Tensor) -> Tensor:
        return self.log_prob(child)


class DrawsBelowTop(NormalizedDistribution):
    """Fault: `draw` draws below the top node instead of the row's node."""

    def draw(self, node: Tensor, level: Tensor, u: Tensor) -> Tensor:
        return super().draw(torch.full_like(node, self.top), level, u)


class ReversedTokens(TreeHead):
    """Fault: the tokens below a node are in reverse order."""

    def dist(self, logits: Logits, top: int) -> SubtreeDistribution:
        def flipped(a, b):
            return logits(a, b).flip(-1) if top != self.vocabulary.root else logits(a, b)

        return super().dist(flipped, top)


class DetachedHiddenStates(TokenHead):
    """Fault: the head passes no gradient to the backbone."""

    def total(self, hidden: Tensor, node: Tensor, fn: Any) -> Any:
        return super().total(hidden.detach() + 0.0 * hidden, node, fn)


class FirstRowForAll(TokenHead):
    """Fault: the head returns the result of the first row for all rows."""

    def query(self, hidden: Tensor, node: Tensor, fn: Any) -> Any:
        predictions = super().query(hidden, node, fn)
        return tuple(prediction[:1].expand_as(prediction) for prediction in predictions)


class LogitsAsLogProbs(TokenHead):
    """Fault: the head returns logits as log-probabilities."""

    def dist(self, logits: Logits, top: int) -> SubtreeDistribution:
        return DenseDistribution(logits(0, self.vocabulary.num_tokens), self.vocabulary)


class BatchNormalized(MeanBackbone):
    """Fault: hidden states depend on the mean over the batch."""

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        hidden = super().forward(ids, t, context)
        return hidden - hidden.mean((0, 1))


class IgnoresMasks(MeanBackbone):
    """Fault: the backbone ignores padding and document boundaries."""

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        return super().forward(ids, t, Context())


FAULTS = [
    Fault(
        "log_child is a joint probability",
        clean_distribution.children_are_conditional,
        lambda: NormalizedDistribution(THREE, THREE.root),
        lambda: JointAsConditional(THREE, THREE.root),
    ),
    Fault(
        "log_step starts at the top node",
        clean_distribution.children_are_conditional,
        lambda: NormalizedDistribution(THREE, THREE.root),
        lambda: StepFromTop(THREE, THREE.root),
    ),
    Fault(
        "draw starts at the top node",
        clean_distribution.draws_follow_distribution,
        lambda: NormalizedDistribution(THREE, THREE.root),
        lambda: DrawsBelowTop(THREE, THREE.root),
    ),
    Fault(
        "the head returns logits as log-probabilities",
        denoiser.rows_have_distributions,
        lambda: build_denoiser(MeanBackbone),
        lambda: build_denoiser(MeanBackbone, LogitsAsLogProbs),
        {"process": ONE_LEVEL},
    ),
    Fault(
        "probabilities do not sum to 1",
        clean_distribution.masses_add_up,
        lambda: NormalizedDistribution(THREE, THREE.root),
        lambda: UnnormalizedDistribution(THREE, THREE.root),
    ),
    Fault(
        "tokens below a node are reversed",
        head.scopes_agree,
        lambda: TreeHead(PAIR, 4, "tied"),
        lambda: ReversedTokens(PAIR, 4, "tied"),
    ),
    Fault(
        "the backbone gets no gradient",
        head.gradients_agree,
        lambda: TokenHead(PAIR, 4),
        lambda: DetachedHiddenStates(PAIR, 4),
    ),
    Fault(
        "all rows get the result of the first row",
        head.chunks_agree,
        lambda: TokenHead(PAIR, 4),
        lambda: FirstRowForAll(PAIR, 4),
    ),
    Fault(
        "hidden states depend on the batch mean",
        denoiser.batches_agree,
        lambda: build_denoiser(MeanBackbone),
        lambda: build_denoiser(BatchNormalized),
        {"process": ONE_LEVEL},
    ),
    Fault(
        "positions attend to padding",
        denoiser.padding_is_invisible,
        lambda: build_denoiser(MeanBackbone),
        lambda: build_denoiser(IgnoresMasks),
        {"process": ONE_LEVEL},
    ),
    Fault(
        "documents attend to each other",
        denoiser.documents_are_separate,
        lambda: build_denoiser(MeanBackbone),
        lambda: build_denoiser(IgnoresMasks),
        {"process": ONE_LEVEL},
    ),
]


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_conformance_check_fails_on_object_with_planted_fault(fault: Fault) -> None:
    assert_detected(fault)


def test_conformance_check_detects_prediction_that_includes_its_own_state(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ddiff.nn import parameterization as engine

    given_all = Denoiser(MeanBackbone(), TokenHead(FlatVocabulary(3), 4), parameterization="all")
    assert denoiser.evidence_is_dropped(given_all, process=ONE_LEVEL).passed
    monkeypatch.setattr(
        engine.FullConditionalParameterization, "wrap_callback", lambda self, fn, *rest: fn
    )
    assert not denoiser.evidence_is_dropped(given_all, process=ONE_LEVEL).passed
