"""Finite terms of the bound have finite gradients, even if a token has probability 1."""

from __future__ import annotations

import pytest
import torch
from all_examples import every_example
from ddiff_hybrid.gamma import GammaHybrid

from ddiff import DenseDistribution, FlatVocabulary, ForwardProcess, TokenHead
from ddiff.core.prediction import LogitDistribution, Prediction
from ddiff.testing.edge_cases import gradients_are_finite
from ddiff.testing.probes import ReachableRows, times
from ddiff.testing.process import PROCESS_LAWS
from ddiff.testing.report import evaluate_laws


@pytest.mark.parametrize("state", [4, 1])
def test_gamma_hybrid_with_gamma_0_has_finite_gradients(state: int) -> None:
    """The logits differ by 2e4, so that the predicted probability of the true token 1 is 1."""
    process = GammaHybrid(FlatVocabulary(4), 0.0)
    head = TokenHead(process.vocabulary, 4)
    with torch.no_grad():
        head.table.copy_(2e4 * torch.eye(4) - 1e4)
    hidden = torch.tensor([[0.0, 1.0, 0.0, 0.0]], requires_grad=True)
    x0 = torch.tensor([1])
    zt = torch.tensor([state])
    t = torch.tensor([0.5], dtype=torch.float64)

    def divergence(prediction: Prediction, idx: torch.Tensor) -> torch.Tensor:
        return process.divergence(prediction, x0[idx], zt[idx], t[idx]).float()

    total, value = head.total(hidden, process.scope(zt), divergence)
    assert value.item() == 0.0
    gradient = torch.autograd.grad(total, hidden)[0]
    assert bool(gradient.isfinite().all())


@pytest.mark.parametrize("process", every_example())
def test_bound_terms_of_every_process_have_finite_gradients(process: ForwardProcess) -> None:
    (report,) = evaluate_laws(process, (gradients_are_finite,))
    assert report.passed, str(report)


@pytest.mark.parametrize("process", every_example())
@pytest.mark.parametrize("difference", [50.0, 2e4])
def test_bound_terms_have_finite_gradients_at_extreme_logits(
    process: ForwardProcess, difference: float
) -> None:
    """The logits give probability 1 to each token in turn: the true token and wrong tokens."""
    vocabulary = process.vocabulary
    certain = difference * torch.eye(vocabulary.num_tokens)
    log_probs = certain.double().log_softmax(-1)
    rows = ReachableRows(process, times((1e-6, 0.5, 1.0 - 1e-6)), log_probs)
    likeliest = torch.nn.functional.one_hot(rows.log_p.argmax(-1), vocabulary.num_tokens)
    logits = difference * likeliest.float()
    for term in (
        lambda prediction: process.divergence(prediction, *rows.args),
        lambda prediction: process.decode_nll(prediction, *rows.args),
        lambda prediction: process.closing_kl(prediction, rows.x0, rows.t),
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


def test_conformance_check_detects_nan_gradient_from_0_times_infinity() -> None:
    """The planted fault masks an infinite value with torch.where, so that its gradient is NaN."""
    process = GammaHybrid(FlatVocabulary(3), 0.0)

    def divergence(
        prediction: DenseDistribution, x0: torch.Tensor, zt: torch.Tensor, t: torch.Tensor
    ) -> torch.Tensor:
        p = prediction.log_prob(torch.where(zt == 3, 0, zt)).exp()
        return torch.where(zt == 3, -prediction.log_prob(x0), p.log() * 0.0)

    process.divergence = divergence  # type: ignore[method-assign, assignment]
    (report,) = evaluate_laws(process, (gradients_are_finite,))
    assert not report.passed
    assert gradients_are_finite in PROCESS_LAWS
