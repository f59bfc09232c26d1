"""Estimates of the bound of each sequence: gradients, expectation, errors, mirrored noise."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from ddiff_dit.dit import DiT
from ddiff_gidd.process import GeneralizedInterpolation
from ddiff_hdlm.process import HierarchicalDiffusion
from ddiff_mdlm.process import MaskedDiffusion
from ddiff_sedd.head import ScoreHead
from ddiff_sedd.process import ScoreEntropyDiffusion
from torch import Tensor

from ddiff.core.elbo import Network, network_from_noisy, network_from_table
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.sequence_bounds import Points, SequenceBounds
from ddiff.core.times import Noisy
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.errors import ArgumentError
from ddiff.evaluation.intervals import student95
from ddiff.nn.denoiser import UNPADDED, Denoiser
from ddiff.nn.gradients import as_differentiable_network
from ddiff.nn.heads import Head, TokenHead, TreeHead
from ddiff.nn.network import as_network

FLAT = FlatVocabulary(5)
TREE = HierarchicalVocabulary([[0, 1, 0, 1, 1]])
BATCH, LENGTH, WIDTH = 3, 4, 8
POINTS: tuple[Points, ...] = ("independent", "strata", "quadrature")


def build(kind: Any, vocabulary: Any = FLAT, **keys: Any) -> ForwardProcess:
    process: ForwardProcess = kind.build(kind.Config(**keys), vocabulary=vocabulary)
    return process


def make_denoiser(head: Head, vocabulary: Any = FLAT, dropout: float = 0.0) -> Denoiser:
    torch.manual_seed(0)
    backbone = DiT(vocabulary, WIDTH, layers=1, heads=2, dropout=dropout)
    denoiser = Denoiser(backbone, head).double()
    with torch.no_grad():
        for parameter in denoiser.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return denoiser.eval()


def make_inputs(seed: int = 0) -> tuple[Tensor, Tensor, CounterRng]:
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(5, (BATCH, LENGTH), generator=generator)
    scored = torch.ones_like(ids, dtype=torch.bool)
    scored[0, 0] = False  # a prompt
    return ids, scored, CounterRng(seed, 0, torch.arange(BATCH), LENGTH)


def dense_network(denoiser: Denoiser, vocabulary: Any) -> Network:
    """Return the network of a token head with ordinary autograd through all logits."""

    def log_probs(noisy: Noisy) -> Tensor:
        hidden = denoiser.hidden_states(noisy, UNPADDED)
        logits = hidden @ denoiser.head.table.T + denoiser.head.bias
        return logits.log_softmax(-1)

    return network_from_noisy(log_probs, vocabulary)


def gradients_of(denoiser: Denoiser, loss: Tensor) -> list[Tensor]:
    found = torch.autograd.grad(loss, list(denoiser.parameters()), allow_unused=True)
    return [torch.zeros(()) if each is None else each for each in found]


# ---------------------------------------------------------------------- gradients


@pytest.mark.parametrize(
    "process",
    [build(MaskedDiffusion), build(GeneralizedInterpolation, p_uniform=0.2)],
    ids=["masks", "uniform noise"],
)
def test_gradients_of_weighted_bounds_are_those_of_dense_autograd(process: ForwardProcess) -> None:
    denoiser = make_denoiser(TokenHead(FLAT, WIDTH))
    ids, scored, rng = make_inputs()
    estimator = SequenceBounds(process, count=3, groups=2)
    weights = torch.tensor([1.0, -2.0, 0.0], dtype=torch.float64)
    results = []
    for network in (as_differentiable_network(denoiser, process), dense_network(denoiser, FLAT)):
        estimate = estimator(network, ids, scored, rng)
        gradients = gradients_of(denoiser, (weights * estimate.nats).sum())
        results.append((estimate.nats.detach(), gradients))
    (ours, our_gradients), (theirs, their_gradients) = results
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-10)
    assert any(gradient.abs().max() > 0.1 for gradient in their_gradients)
    for own, other in zip(our_gradients, their_gradients, strict=True):
        torch.testing.assert_close(own, other.expand_as(own), rtol=0, atol=1e-10)


@pytest.mark.parametrize("family", ["tree", "score"])
def test_values_equal_those_of_evaluation_and_gradients_their_differences(family: str) -> None:
    if family == "tree":
        process = build(HierarchicalDiffusion, TREE)
        denoiser = make_denoiser(TreeHead(TREE, WIDTH, "levelwise"), TREE)
    else:
        process = build(ScoreEntropyDiffusion)
        denoiser = make_denoiser(ScoreHead(FLAT, WIDTH, scaled=True))
    ids, scored, rng = make_inputs()
    # without times near the ends, where random scores have divergences of 1e9
    estimator = SequenceBounds(process, points="quadrature", count=2, groups=2)
    network = as_differentiable_network(denoiser, process)
    estimate = estimator(network, ids, scored, rng)
    same = estimator(as_network(denoiser, process), ids, scored, rng)
    torch.testing.assert_close(estimate.nats.detach(), same.nats, rtol=0, atol=1e-10)
    (gradient,) = torch.autograd.grad(estimate.nats[1], denoiser.head.bias)
    step = 1e-6
    for number in range(len(gradient)):
        moved = []
        for sign in (1.0, -1.0):
            with torch.no_grad():
                denoiser.head.bias[number] += sign * step
            network_at = as_network(denoiser, process)
            moved.append(estimator(network_at, ids, scored, rng).nats[1])
            with torch.no_grad():
                denoiser.head.bias[number] -= sign * step
        difference = (moved[0] - moved[1]) / (2 * step)
        # central differences of values near 10 with steps of 1e-6
        torch.testing.assert_close(gradient[number], difference, rtol=1e-5, atol=1e-7)


def test_backward_pass_repeats_the_dropout_of_the_forward_pass() -> None:
    process = build(MaskedDiffusion)
    denoiser = make_denoiser(TokenHead(FLAT, WIDTH), dropout=0.5).train()
    ids, scored, rng = make_inputs()
    estimator = SequenceBounds(process, count=1, groups=1)
    results = []
    for network in (as_differentiable_network(denoiser, process), dense_network(denoiser, FLAT)):
        torch.manual_seed(5)
        estimate = estimator(network, ids, scored, rng)
        torch.manual_seed(6)  # training has used other random numbers in between
        results.append(gradients_of(denoiser, estimate.nats.sum()))
        assert torch.initial_seed() == 6
    for own, other in zip(*results, strict=True):
        torch.testing.assert_close(own, other.expand_as(own), rtol=0, atol=1e-10)


# ---------------------------------------------------------------------- expectation and error

TABLE = torch.tensor([0.5, 0.2, 0.15, 0.1, 0.05], dtype=torch.float64)


def wrong_network(vocabulary: Any) -> Network:
    """Return a network whose prediction depends on the other states and on the time."""

    def predict(zt: Tensor, t: Tensor) -> Tensor:
        counts = (zt == 0).double().sum(-1, keepdim=True).unsqueeze(-1)
        logits = TABLE.log() * (1.0 + 0.3 * counts) * (1.0 + t.unsqueeze(-1))
        return logits.expand(*zt.shape, 5).log_softmax(-1)

    return network_from_table(predict, vocabulary)


def estimate_many(
    process: ForwardProcess, count: int, repetitions: int, repeats: int = 1, **keys: Any
) -> tuple[Tensor, Tensor]:
    """Return estimates [n] and standard errors [n] of one sequence, from independent generators."""
    ids = torch.tensor([[0, 1, 2, 4] * repeats]).expand(repetitions, -1)
    scored = torch.ones_like(ids, dtype=torch.bool)
    rng = CounterRng(1, 0, torch.arange(repetitions), ids.shape[1])
    estimator = SequenceBounds(process, count=count, **keys)
    estimate = estimator(wrong_network(process.vocabulary), ids, scored, rng)
    assert estimate.standard_error is not None
    return estimate.nats, estimate.standard_error


@pytest.mark.parametrize("mirrored", [False, True])
@pytest.mark.parametrize("points", POINTS)
def test_all_points_have_the_same_expectation(points: Points, mirrored: bool) -> None:
    """GIDD has decoding terms, and its noise is not mirrored exactly."""
    process = build(GeneralizedInterpolation, p_uniform=0.2)
    reference, _ = estimate_many(process, 4, 2000, groups=2)
    found, _ = estimate_many(process, 4, 2000, groups=2, points=points, mirrored=mirrored)
    error = (reference.var() + found.var()).div(2000).sqrt()
    # four standard errors, and the error of the rule of quadrature with four points
    assert abs(float(found.mean() - reference.mean())) < 4.0 * float(error) + 0.02


def test_stratified_and_mirrored_draws_have_less_variance() -> None:
    process = build(MaskedDiffusion)
    variance = {}
    for points in POINTS:
        for mirrored in (False, True):
            count = 2 if mirrored else 4  # as many evaluations of the network
            found, _ = estimate_many(process, count, 1000, points=points, mirrored=mirrored)
            variance[points, mirrored] = float(found.var())
    # measured: 10.5 independent, 9.2 strata, 9.9 quadrature; mirrored 6.0, 5.8 and 6.0
    plain = variance["independent", False]
    assert variance["strata", False] < plain
    for points in POINTS:
        assert variance[points, True] < 0.75 * plain


@pytest.mark.parametrize("points", POINTS)
def test_standard_error_covers_the_expectation(points: Points) -> None:
    process = build(MaskedDiffusion)
    groups = 8
    # 16 tokens: the estimates of shorter sequences are more skewed, and the intervals too narrow
    found, error = estimate_many(process, 2, 1000, repeats=4, groups=groups, points=points)
    width = student95(groups - 1) * error
    covered = ((found - found.mean()).abs() <= width).double().mean()
    # four standard errors of a share of 0.95 of 1,000 are 0.028; the estimates are still skewed
    assert 0.91 < float(covered) < 0.985


# ---------------------------------------------------------------------- mirrored noise


def test_mirrored_generator_returns_the_other_end_of_the_same_grid() -> None:
    rng = CounterRng(0, 0, torch.arange(4), 100)
    u, mirrored = rng.uniform("a", 2), rng.mirror().uniform("a", 2)
    assert torch.equal(u + mirrored, torch.full_like(u, 1.0 - 2.0**-53))
    assert torch.equal(rng.mirror().mirror().uniform("a", 2), u)
    derived = rng.mirror().derive("b", 100).uniform("a")
    assert torch.equal(derived, rng.derive("b", 100).mirror().uniform("a"))


# ---------------------------------------------------------------------- arguments


def test_one_group_has_no_standard_error_and_equal_generators_equal_estimates() -> None:
    process = build(MaskedDiffusion)
    ids, scored, rng = make_inputs()
    estimator = SequenceBounds(process, groups=1)
    first = estimator(wrong_network(FLAT), ids, scored, rng)
    assert first.standard_error is None
    assert torch.equal(first.nats, estimator(wrong_network(FLAT), ids, scored, rng).nats)


@pytest.mark.parametrize(
    ("keys", "message"),
    [
        ({"points": "grid"}, "points must be one of independent, strata, quadrature; got 'grid'"),
        ({"count": 0}, "count must be at least 1; got 0"),
        ({"groups": 0}, "groups must be at least 1; got 0"),
    ],
)
def test_estimator_refuses_wrong_arguments(keys: dict[str, Any], message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        SequenceBounds(build(MaskedDiffusion), **keys)
