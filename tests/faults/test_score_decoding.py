"""Tweedie's formula decodes the exact score to the exact posterior P(x|z).

A score contains the ratios q_t(y)/q_t(z) for the current state z and all states y.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from all_examples import every_example
from ddiff_hybrid.epsilon import EpsilonHybrid
from ddiff_hybrid.gamma import GammaHybrid
from torch import Tensor

from ddiff import (
    AnalyticSampler,
    ArgumentError,
    DenseDistribution,
    DenseProcess,
    FlatVocabulary,
    ForwardProcess,
    GeometricSchedule,
    LinearSchedule,
    MixtureProcess,
    Score,
    TauLeapingSampler,
    mask_distribution,
    token_distribution,
)
from ddiff.testing.derived_formulas import score_from_distribution
from ddiff.testing.probes import (
    ReachableRows,
    likelihoods,
    random_log_probs,
    times,
    token_likelihoods,
)
from ddiff.testing.report import evaluate_laws
from ddiff.testing.reverse_process import (
    READABLE,
    condition_number,
    scores_at_ends,
    scores_decode_to_posterior,
)
from ddiff.testing.sampler_distribution import measure_sampler

JOINT = torch.tensor(
    [[0.30, 0.02, 0.08], [0.02, 0.20, 0.03], [0.05, 0.05, 0.25]], dtype=torch.float64
)
PATH = (1e-6, 1e-4, 1e-2, 0.1, 0.3, 0.5, 0.7, 0.9, 0.99, 0.999, 1.0)


def uniform(num_tokens: int) -> MixtureProcess:
    vocabulary = FlatVocabulary(num_tokens, mask=False)
    return MixtureProcess(vocabulary, LinearSchedule(), token_distribution(vocabulary))


def posterior(process: ForwardProcess, log_p: Tensor, zt: Tensor, t: Tensor) -> Tensor:
    joint = log_p.exp() * token_likelihoods(process, zt, t)
    return joint / joint.sum(-1, keepdim=True)


def test_decoding_the_score_of_constant_data_gives_its_only_token() -> None:
    """The data are always token 1 of 7, so P(x = 1 | z) = 1 at the noisy state z = 6."""
    process = uniform(7)
    log_p = torch.full((1, 7), -torch.inf, dtype=torch.float64)
    log_p[0, 1] = 0.0
    zt = torch.tensor([6])
    t = times((0.7,))
    score = score_from_distribution(process, log_p, zt, t)
    assert float(process.decode_nll(score, torch.tensor([1]), zt, t).exp()) == pytest.approx(
        1.0, abs=1e-12
    )
    u = (
        torch.linspace(0.001, 0.999, 64, dtype=torch.float64)
        .unsqueeze(-1)
        .expand(-1, process.uniforms_per_decode)
    )

    def query(rows: Tensor, node: Tensor, fn: Any, *per_row: Tensor) -> Any:
        return fn(Score(score.log_ratio.expand(len(rows), -1)), *per_row)

    assert process.decode(query, zt.expand(64), t.expand(64), u).tolist() == [1] * 64


@pytest.mark.parametrize("process", every_example())
def test_decoding_the_exact_score_gives_the_exact_posterior(process: ForwardProcess) -> None:
    """Decoding inverts a transition matrix, which amplifies rounding errors of the score.

    The tolerance is 1e-14 times the condition number of the matrix, and at least 1e-12.
    """
    path = times(PATH)
    rows = ReachableRows(process, path, random_log_probs(process.vocabulary.num_tokens))
    now = process.clamp_score_time(rows.t)
    condition = condition_number(process, process.clamp_score_time(path))[
        torch.searchsorted(path, rows.t)
    ]
    score = score_from_distribution(process, rows.log_p, rows.zt, now)
    got = process._log_decode_weights(score, rows.zt, rows.t).softmax(-1)
    error = (got - posterior(process, rows.log_p, rows.zt, rows.t)).abs().amax(-1)
    readable = condition < READABLE
    assert bool((error[readable] <= 1e-12 * (condition[readable] / 100.0).clamp(min=1.0)).all())
    early = (rows.t <= 0.5) & (condition < 100.0)
    assert bool(early.any())
    assert float(error[early].max()) <= 1e-12


@pytest.mark.parametrize("process", every_example())
def test_decoding_term_of_exact_scores_equals_that_of_exact_posteriors(
    process: ForwardProcess,
) -> None:
    """The decoding term -ln P(x|z) is compared at t = 0 and at t = 0.1, within 1e-9."""
    rows = ReachableRows(process, times((0.0, 0.1)))
    score = score_from_distribution(process, rows.log_p, rows.zt, rows.t)
    of_score = process.decode_nll(score, rows.x0, rows.zt, rows.t)
    of_distribution = process.decode_nll(rows.dist, rows.x0, rows.zt, rows.t)
    assert float((of_score - of_distribution).abs().max()) < 1e-9


@pytest.mark.parametrize("process", every_example())
def test_every_process_passes_the_conformance_checks_of_scores(process: ForwardProcess) -> None:
    for report in evaluate_laws(process, (scores_at_ends, scores_decode_to_posterior)):
        assert report.passed, str(report)


def test_conformance_checks_detect_decoding_without_tweedies_formula() -> None:
    """The planted fault gives token x the weight s(x) q_t(z|x), where s is the score."""
    faulty = uniform(4)

    def tweedie(score: Score, t: Tensor) -> Tensor:
        return score.log_ratio[:, :4].double().log_softmax(-1)

    faulty.tweedie = tweedie  # type: ignore[method-assign]
    for report in evaluate_laws(faulty, (scores_at_ends, scores_decode_to_posterior)):
        assert not report.passed, str(report)


@pytest.mark.parametrize("sampler", [TauLeapingSampler, AnalyticSampler])
@pytest.mark.parametrize(
    "process",
    [
        pytest.param(uniform(3), id="uniform"),
        pytest.param(
            MixtureProcess(
                FlatVocabulary(3, mask=False), GeometricSchedule(), torch.full((3,), 1 / 3)
            ),
            id="geometric",
        ),
        pytest.param(EpsilonHybrid(FlatVocabulary(3), LinearSchedule(), 0.1), id="hybrid_epsilon"),
        pytest.param(GammaHybrid(FlatVocabulary(3), 0.3), id="hybrid_gamma"),
        pytest.param(
            DenseProcess(FlatVocabulary(3, mask=False), [[-3, 2, 1], [0.5, -1.5, 1], [1, 1, -2]]),
            id="dense",
        ),
    ],
)
def test_sampler_distribution_error_is_equal_for_score_and_distribution_networks(
    sampler: Any, process: ForwardProcess
) -> None:
    """Both samplers use the same random numbers, so that results differ only by rounding."""
    for steps in (8, 32):
        of_distribution, of_score = (
            measure_sampler(
                sampler(steps), process, JOINT, points=512, apart=True, predicts=predicts
            ).distance(JOINT)
            for predicts in ("distribution", "score")
        )
        assert of_score == pytest.approx(of_distribution, abs=1e-3)


def test_score_samplers_draw_no_token_of_probability_zero() -> None:
    """The data never contain tokens 4 and 5, but the uniform noise on 6 tokens does."""
    process = uniform(6)
    p = torch.tensor([0.5, 0.3, 0.15, 0.05, 0.0, 0.0], dtype=torch.float64)
    joint = torch.outer(p, p)
    dist = measure_sampler(
        AnalyticSampler(16), process, joint, points=512, apart=True, predicts="score"
    ).dist
    assert float(dist[4:].sum() + dist[:, 4:].sum()) < 1e-6
    dist = measure_sampler(
        TauLeapingSampler(8), process, joint, points=512, apart=True, predicts="score"
    ).dist
    assert float(dist[4:].sum() + dist[:, 4:].sum()) < 1e-6


@pytest.mark.parametrize("process", every_example())
def test_arbitrary_scores_have_finite_decoding_term_and_gradient(process: ForwardProcess) -> None:
    """The scores are random, as those of an untrained network, and belong to no distribution."""
    rows = ReachableRows(process, times((1e-3, 0.02, 0.5, 0.97)))
    generator = torch.Generator().manual_seed(1)
    raw = 6.0 * torch.randn(
        len(rows.zt), process.vocabulary.num_states, generator=generator, dtype=torch.float64
    )
    raw = raw.scatter(-1, rows.zt.unsqueeze(-1), 0.0).requires_grad_()
    nll = process.decode_nll(Score(raw), rows.x0, rows.zt, rows.t)
    assert bool(nll.isfinite().all())
    nll.sum().backward()
    assert raw.grad is not None
    assert bool(raw.grad.isfinite().all())
    words = torch.arange(process.vocabulary.num_tokens)
    every = torch.stack(
        [
            process.decode_nll(Score(raw.detach()), x.expand_as(rows.zt), rows.zt, rows.t)
            for x in words
        ],
        -1,
    )
    total = every.neg().exp().sum(-1)
    torch.testing.assert_close(total, torch.ones_like(total), rtol=1e-9, atol=0.0)


def test_uninformative_score_decodes_to_the_uniform_distribution() -> None:
    """At t = 1 the state gives no information on the token, and decoding is uniform."""
    unmasked = FlatVocabulary(3, mask=False)
    dense = DenseProcess(unmasked, [[-3, 2, 1], [0.5, -1.5, 1], [1, 1, -2]])
    log_p = torch.tensor([[0.7, 0.2, 0.1]], dtype=torch.float64).log()
    zt = torch.tensor([0])
    t = times((1.0,))
    for process in (dense, uniform(3)):
        score = score_from_distribution(process, log_p, zt, t)
        torch.testing.assert_close(
            process.tweedie(score, t).exp(), torch.full((1, 3), 1 / 3).double(), atol=1e-3, rtol=0
        )
    masked = FlatVocabulary(3)
    absorbing = MixtureProcess(masked, LinearSchedule(), mask_distribution(masked))
    late = absorbing.clamp_score_time(t)
    mask = torch.tensor([3])
    score = score_from_distribution(absorbing, log_p, mask, late)
    torch.testing.assert_close(
        absorbing.tweedie(score, t), log_p, atol=1e-12, rtol=0
    )  # masks do not mix tokens: the ratios are those of p


def test_transition_from_the_clean_token_includes_the_noise_at_time_0() -> None:
    """With sigma_min = 0.2, states are noisy at t = 0.

    `from_clean(t)` includes this noise, and `transition(0, t)` does not.
    """
    vocabulary = FlatVocabulary(4, mask=False)
    process = MixtureProcess(
        vocabulary, GeometricSchedule(0.2, 5.0), token_distribution(vocabulary)
    )
    t = times((0.0, 0.4))
    x0 = torch.tensor([1, 1])
    marginal = likelihoods(process, t)[torch.arange(2), x0]
    torch.testing.assert_close(process.from_clean(t).row(x0), marginal, atol=1e-14, rtol=0)
    torch.testing.assert_close(
        ForwardProcess.from_clean(process, t).row(x0),
        marginal,
        atol=1e-9,
        rtol=0,
        msg="derived from marginals",
    )
    from_start = process.transition(torch.zeros_like(t), t).row(x0)
    assert float((from_start - marginal).abs().max()) > 0.05


def test_dense_kernel_rejects_singular_matrices() -> None:
    """`solve` raises for a singular matrix, in contrast to decoding, which has a fallback."""
    process = DenseProcess(FlatVocabulary(2, mask=False), [[-1.0, 1.0], [1.0, -1.0]])
    kernel = process.transition(times((0.0,)), times((1.0,)))
    with pytest.raises(ArgumentError, match="must be invertible in every row"):
        kernel.solve(torch.tensor([[0.6, 0.4]], dtype=torch.float64))
    prediction = DenseDistribution(
        torch.tensor([[0.6, 0.4]], dtype=torch.float64).log(), process.vocabulary
    )
    assert bool(
        process.decode_nll(
            prediction, torch.tensor([0]), torch.tensor([1]), times((1.0,))
        ).isfinite()
    )
