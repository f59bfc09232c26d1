"""Predictions that give the true token probability 0: the bound is infinite or exact, not NaN."""

from __future__ import annotations

import math

import pytest
import torch
from all_examples import every_example
from ddiff_hybrid.gamma import GammaHybrid
from ddiff_mdlm.process import MaskedDiffusion
from ddiff_sedd.process import ScoreEntropyDiffusion

from ddiff import (
    CounterRng,
    DenseDistribution,
    DenseProcess,
    FlatVocabulary,
    ForwardProcess,
    HierarchicalVocabulary,
    nelbo,
    network_from_table,
)
from ddiff.core.times import FlatTimes
from ddiff.testing.edge_cases import impossible_truth_is_bayes
from ddiff.testing.process import PROCESS_LAWS
from ddiff.testing.report import evaluate_laws


def absorbing(num_tokens: int = 2) -> list[ForwardProcess]:
    """Return all implementations of the masked process."""
    vocabulary = FlatVocabulary(num_tokens)
    states = num_tokens + 1
    rates = -torch.eye(states, dtype=torch.float64)
    rates[:, -1] = 1.0
    rates[-1] = 0.0
    build = ScoreEntropyDiffusion.build
    return [
        build(ScoreEntropyDiffusion.Config(graph="absorb", floor=0.0), vocabulary=vocabulary),
        MaskedDiffusion.build(MaskedDiffusion.Config(), vocabulary=vocabulary),
        GammaHybrid(vocabulary, 0.0),
        DenseProcess(vocabulary, rates),
    ]


IDS = ["sedd", "mdlm", "hybrid_gamma", "dense"]


@pytest.mark.parametrize("process", absorbing(), ids=IDS)
def test_bound_of_a_visible_token_is_zero_in_masked_processes(process: ForwardProcess) -> None:
    prediction = DenseDistribution(
        torch.tensor([[-torch.inf, 0.0]], dtype=torch.float64), process.vocabulary
    )
    x0 = torch.tensor([0])
    t = torch.tensor([1e-3], dtype=torch.float64)
    for term in (process.decode_nll, process.divergence, process.density):
        assert float(term(prediction, x0, x0, t)) == 0.0, term
    mask = torch.tensor([2])
    for term in (process.decode_nll, process.divergence, process.density):
        assert float(term(prediction, x0, mask, t)) == math.inf, term
    assert float(process.closing_kl(prediction, x0, t)) == math.inf


def test_sedd_decoding_term_of_visible_tokens_is_zero() -> None:
    """With geometric noise, states are noisy at t = 0, so visible tokens have a decoding term."""
    config = ScoreEntropyDiffusion.Config(graph="absorb", noise="geometric")
    process = ScoreEntropyDiffusion.build(config, vocabulary=FlatVocabulary(2))
    prediction = DenseDistribution(
        torch.tensor([[-torch.inf, 0.0]], dtype=torch.float64), process.vocabulary
    )
    zero = torch.tensor([0])
    assert (
        float(process.decode_nll(prediction, zero, zero, torch.tensor([1e-3], dtype=torch.float64)))
        == 0.0
    )


@pytest.mark.parametrize("process", every_example())
def test_every_process_allows_predictions_that_exclude_the_true_token(
    process: ForwardProcess,
) -> None:
    (report,) = evaluate_laws(process, (impossible_truth_is_bayes,))
    assert report.passed, str(report)
    assert impossible_truth_is_bayes in PROCESS_LAWS


@pytest.mark.parametrize("process", every_example())
def test_nelbo_is_not_nan_if_predictions_exclude_the_true_token(process: ForwardProcess) -> None:
    """The network predicts token 0 with probability 1 at every position."""
    num_tokens = process.vocabulary.num_tokens
    certain = torch.full((num_tokens,), -torch.inf, dtype=torch.float64)
    certain[0] = 0.0
    network = network_from_table(lambda zt, t: certain.expand(*zt.shape, -1), process.vocabulary)
    x0 = torch.arange(num_tokens).repeat(16).unsqueeze(-1)
    index = torch.arange(len(x0))
    for window in ((0.0, 1.0), (1e-3, 0.9)):
        terms = nelbo(
            process,
            network,
            x0,
            torch.ones_like(x0, dtype=torch.bool),
            FlatTimes(*window),
            CounterRng(0, 0, index, 1),
            index,
            len(index),
        )
        assert not bool(terms.total.isnan().any())
        assert bool(terms.total[x0[:, 0] == 0].isfinite().all())


def test_log_child_is_not_nan_below_a_node_of_probability_zero() -> None:
    vocabulary = HierarchicalVocabulary([[0, 0, 1]])
    prediction = DenseDistribution(
        torch.tensor([[-torch.inf, -torch.inf, 0.0]], dtype=torch.float64), vocabulary
    )
    other = DenseDistribution(
        torch.tensor([[0.5, 0.5, 0.0]], dtype=torch.float64).log(), vocabulary
    )
    first = torch.tensor([3])
    second = torch.tensor([4])
    assert prediction.log_child(first, torch.tensor([1])).item() == -math.inf
    assert prediction.log_child(first, first).item() == 0.0
    assert (
        other.log_child(second, torch.tensor([2])).item() == 0.0
    )  # token 2 is the only one below node 4
