"""The gradient of every term is finite wherever the term is, for networks that are sure of a token."""

from __future__ import annotations

import pytest
import torch
from all_examples import every_example
from ddiff_hybrid.gamma import GammaHybrid

from ddiff import DenseDistribution, FlatVocabulary, ForwardProcess, TokenHead
from ddiff.core.prediction import LogitDistribution
from ddiff.testing.edge_cases import gradients_are_finite
from ddiff.testing.probes import ReachableRows, times
from ddiff.testing.process import PROCESS_LAWS
from ddiff.testing.report import evaluate_laws


@pytest.mark.parametrize("state", [4, 1])
def test_hybrid_gamma_without_redrawing_has_a_gradient_at_masks_and_tokens(state: int) -> None:
    """A head whose logits are 2e4 apart is sure of token 1, and right."""
    process = GammaHybrid(FlatVocabulary(4), 0.0)
    head = TokenHead(process.vocabulary, 4)
    with torch.no_grad():
        head.table.copy_(2e4 * torch.eye(4) - 1e4)
    hidden = torch.tensor([[0.0, 1.0, 0.0, 0.0]], requires_grad=True)
    x0, zt = torch.tensor([1]), torch.tensor([state])
    t = torch.tensor([0.5], dtype=torch.float64)
    total, value = head.total(
        hidden,
        process.scope(zt),
        lambda law, idx: process.divergence(law, x0[idx], zt[idx], t[idx]).float(),
    )
    assert value.item() == 0.0
    gradient = torch.autograd.grad(total, hidden)[0]
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("process", every_example())
def test_terms_have_finite_gradients_by_the_law_of_the_kit(process: ForwardProcess) -> None:
    (report,) = evaluate_laws(process, (gradients_are_finite,))
    assert report.passed, str(report)


@pytest.mark.parametrize("process", every_example())
@pytest.mark.parametrize("apart", [50.0, 2e4])
def test_terms_have_finite_gradients_by_logits(process: ForwardProcess, apart: float) -> None:
    """Logits as a head says them, in float32: sure of one token after the other, the right one and wrong ones."""
    vocabulary = process.vocabulary
    sure = apart * torch.eye(vocabulary.num_tokens)
    rows = ReachableRows(process, times((1e-6, 0.5, 1.0 - 1e-6)), sure.double().log_softmax(-1))
    logits = (
        apart * torch.nn.functional.one_hot(rows.log_p.argmax(-1), vocabulary.num_tokens).float()
    )
    asked = (rows.x0, rows.zt, rows.t)
    for term in (
        lambda law: process.divergence(law, *asked),
        lambda law: process.decode_nll(law, *asked),
        lambda law: process.closing_kl(law, rows.x0, rows.t),
    ):
        leaf = logits.clone().requires_grad_()
        value = term(LogitDistribution(leaf, vocabulary))
        assert not bool(value.isnan().any())
        finite = value.isfinite()
        if not value.requires_grad:
            continue
        torch.where(finite, value, 0.0).sum().backward()
        assert leaf.grad is not None
        assert bool(leaf.grad[finite].isfinite().all())


def test_kit_finds_the_gradient_that_was_nan() -> None:
    """The planted fault drops an infinite value and keeps its gradient, 0 * inf."""
    process = GammaHybrid(FlatVocabulary(3), 0.0)

    def divergence(
        answer: DenseDistribution, x0: torch.Tensor, zt: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        law = answer.log_prob(torch.where(zt == 3, 0, zt)).exp()
        return torch.where(zt == 3, -answer.log_prob(x0), law.log() * 0.0)

    process.divergence = divergence  # type: ignore[method-assign, assignment]
    (report,) = evaluate_laws(process, (gradients_are_finite,))
    assert not report.passed
    assert gradients_are_finite in PROCESS_LAWS
