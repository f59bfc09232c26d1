"""Confidence intervals over documents: Student's quantile, unequal lengths, coverage."""

from __future__ import annotations

import math

import numpy as np
import pytest
from coverage import repeated, zipf
from ddiff_gidd.process import GeneralizedInterpolation
from ddiff_hdlm.process import HierarchicalDiffusion
from ddiff_hybrid.epsilon import EpsilonHybrid
from ddiff_hybrid.gamma import GammaHybrid
from ddiff_mdlm.process import MaskedDiffusion
from ddiff_sedd.process import ScoreEntropyDiffusion

from ddiff.core.components import MixtureProcess
from ddiff.core.dense import DenseProcess
from ddiff.core.process import ForwardProcess
from ddiff.core.tree import TreeProcess
from ddiff.evaluation.intervals import student95
from ddiff.evaluation.ratio import RatioEstimate

UNEQUAL = np.array([1.0, 2.0, 4.0, 60.0, 200.0])


@pytest.mark.parametrize(
    ("freedom", "quantile"),
    [(1, 12.7062), (2, 4.30265), (3, 3.18245), (10, 2.22814), (100, 1.98397), (1e9, 1.95996)],
)
def test_student_t_quantile_at_95_percent_matches_published_tables(
    freedom: float, quantile: float
) -> None:
    assert student95(freedom) == pytest.approx(quantile, rel=1e-5)


@pytest.mark.parametrize("tokens", [np.ones(2), np.ones(7), UNEQUAL])
def test_standard_error_is_unbiased_if_document_variances_are_proportional_to_lengths(
    tokens: np.ndarray,
) -> None:
    """The expectation of the variance estimate is computed exactly, without random draws.

    Residuals are linear in the errors of documents, so their expected squares are sums over
    documents.
    """
    whole = tokens.sum()
    expected = 0.0
    for document, own in enumerate(tokens):
        error = np.zeros_like(tokens)
        error[document] = math.sqrt(own)
        estimate = RatioEstimate.of(error[:, None], tokens)
        assert estimate.total is not None
        expected += estimate.total.standard**2
    assert expected == pytest.approx(1.0 / whole, rel=1e-12)


def test_n_documents_of_equal_length_have_n_minus_1_degrees_of_freedom() -> None:
    for count in (2, 3, 50):
        estimate = RatioEstimate.of(np.arange(float(count))[:, None], np.full(count, 5.0))
        assert estimate.total is not None
        assert estimate.total.freedom == pytest.approx(count - 1)


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize(
    ("tokens", "least", "most"),
    [
        (np.ones(2), 0.94, 0.96),
        (np.ones(3), 0.94, 0.96),
        (np.ones(24), 0.94, 0.96),
        (np.array([1.0, 2.0]), 0.94, 0.965),
        (np.arange(1.0, 25.0), 0.93, 0.965),
        (UNEQUAL, 0.92, 1.0),
    ],
)
def test_document_interval_has_95_percent_coverage_for_normally_distributed_nats(
    tokens: np.ndarray, least: float, most: float, power: float
) -> None:
    """The error of a document is proportional to (number of tokens)^power, for power 1/2 and 1.

    The tolerance for 10,000 texts is four standard errors, 0.9 %. For documents of 1 to 200 tokens
    and power 1/2, the interval is conservative, so that coverage may be higher.
    """
    generator = np.random.default_rng(0)
    covered = 0
    for _ in range(10_000):
        nats = 3.0 * tokens + generator.normal(size=len(tokens)) * tokens**power
        estimate = RatioEstimate.of(nats[:, None], tokens)
        assert estimate.total is not None
        covered += abs(estimate.mean - 3.0) <= estimate.total.half_width
    assert least < covered / 10_000 < most


@pytest.mark.parametrize("tokens", [np.ones(1), np.ones(12), UNEQUAL])
@pytest.mark.parametrize("readings", [2, 5])
def test_monte_carlo_interval_has_95_percent_coverage(tokens: np.ndarray, readings: int) -> None:
    """The interval of the noise draws covers although documents differ far more than draws.

    The tolerance for 10,000 repeats is five standard errors, 1.2 %. For documents of unequal
    length, up to 1.5 % is added, because their variances are pooled.
    """
    generator = np.random.default_rng(1)
    own = tokens * (3.0 + generator.normal(size=len(tokens)))
    truth = own.sum() / tokens.sum()
    covered = 0
    for _ in range(10_000):
        errors = generator.normal(size=(len(tokens), readings)) * np.sqrt(tokens)[:, None]
        estimate = RatioEstimate.of(own[:, None] + errors, tokens)
        assert estimate.monte_carlo is not None
        covered += abs(estimate.mean - truth) <= estimate.monte_carlo.half_width
    allowed = 0.012 if len(set(tokens)) == 1 else 0.027
    assert abs(covered / 10_000 - 0.95) < allowed


def test_monte_carlo_and_document_variances_sum_to_total_variance() -> None:
    """The true variance is 0.25 between documents and 1 between draws of a document.

    400 documents determine the two standard errors with an error of 10 % and 20 %.
    """
    generator = np.random.default_rng(2)
    documents = 0.5 * generator.normal(size=400)
    nats = documents[:, None] + generator.normal(size=(400, 4))
    estimate = RatioEstimate.of(nats, np.ones(400))
    assert estimate.total is not None
    assert estimate.monte_carlo is not None
    assert estimate.documents is not None
    assert estimate.monte_carlo.standard == pytest.approx(1.0 / math.sqrt(4 * 400), rel=0.1)
    assert estimate.documents == pytest.approx(0.5 / math.sqrt(400), rel=0.2)
    assert estimate.total.standard**2 == pytest.approx(
        estimate.monte_carlo.standard**2 + estimate.documents**2
    )


def test_standard_error_is_none_for_one_draw_or_one_document() -> None:
    once = RatioEstimate.of(np.ones((3, 1)), np.ones(3))
    assert once.monte_carlo is None
    assert once.documents is None
    alone = RatioEstimate.of(np.array([[1.0, 2.0], [0.0, 0.0]]), np.array([3.0, 0.0]))
    assert alone.total is None
    assert alone.monte_carlo is not None
    assert alone.mean == pytest.approx(0.5)


KINDS = (
    TreeProcess,
    MixtureProcess,
    DenseProcess,
    HierarchicalDiffusion,
    MaskedDiffusion,
    GeneralizedInterpolation,
    ScoreEntropyDiffusion,
    EpsilonHybrid,
    GammaHybrid,
)


def examples() -> dict[str, ForwardProcess]:
    return {
        f"{kind.__name__} {i}": process
        for kind in KINDS
        for i, process in enumerate(kind.examples())
    }


@pytest.mark.slow
@pytest.mark.parametrize("window", [(1e-3, 1.0 - 1e-3), (0.0, 1.0)])
def test_confidence_intervals_of_all_examples_have_95_percent_coverage(
    window: tuple[float, float],
) -> None:
    """Of 40 evaluations of each of 44 examples, 93 to 97 % of the intervals contain the true value.

    Five standard errors would be 2.5 %. For each example, at least 31 of 40 intervals must contain
    the true value; with a coverage of 95 %, fewer do with probability 5e-5. Seeds are fixed.
    """
    share = {}
    for number, (name, process) in enumerate(examples().items()):
        repeats = repeated(process, window, 40, zipf(process.vocabulary.num_tokens), seed=number)
        share[name] = float(repeats.covers.mean())
    assert 0.93 <= np.mean(list(share.values())) <= 0.97
    assert min(share.values()) >= 31 / 40, share
