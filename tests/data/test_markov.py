"""The Markov source has the entropy that it reports."""

from __future__ import annotations

import numpy as np
import pytest

from ddiff.data.markov import MarkovSource
from ddiff.errors import ArgumentError


@pytest.mark.parametrize("alphabet", [4, 9, 16])
def test_markov_stationary_distribution_is_invariant(alphabet: int) -> None:
    source = MarkovSource(alphabet, seed=3)
    assert source.transition.sum(1) == pytest.approx(1.0, abs=1e-12)
    assert (source.stationary > 0).all()
    assert source.stationary @ source.transition == pytest.approx(source.stationary, abs=1e-12)


def test_markov_source_with_peakedness_zero_has_entropy_log_k() -> None:
    source = MarkovSource(8, peakedness=0.0)
    assert source.entropy_rate == pytest.approx(np.log(8), abs=1e-12)
    assert source.row_entropy(5) == pytest.approx(np.log(8), abs=1e-12)


def test_markov_entropy_rate_falls_with_peakedness() -> None:
    rates = [
        MarkovSource(8, peakedness=peakedness, seed=1).entropy_rate
        for peakedness in (0.0, 1.0, 3.0, 1000.0)
    ]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)


def test_markov_row_entropy_equals_the_entropy_of_enumerated_rows() -> None:
    source = MarkovSource(4, seed=2)
    joint = source.stationary
    for _ in range(3):  # all 256 rows of four symbols
        joint = (joint.reshape(-1, 4)[:, :, None] * source.transition[None]).reshape(-1)
    entropy = -(joint * np.log(joint)).sum()
    assert source.row_entropy(4) == pytest.approx(entropy / 4, abs=1e-12)
    assert source.row_entropy(1) > source.row_entropy(4) > source.entropy_rate


def test_markov_mean_negative_log_likelihood_equals_the_row_entropy() -> None:
    source = MarkovSource(6, seed=5)
    ids = np.array([[source.symbols.index(c) for c in row] for row in source.rows(4000, 25)])
    log_prob = np.log(source.stationary[ids[:, 0]]) + np.log(
        source.transition[ids[:, :-1], ids[:, 1:]]
    ).sum(1)
    # The mean of -log P / length is the row entropy. Tolerance: five standard errors, fixed seed.
    error = log_prob.std() / 25 / np.sqrt(len(ids))
    assert abs(-log_prob.mean() / 25 - source.row_entropy(25)) < 5 * error
    first = np.bincount(ids[:, 0], minlength=6) / len(ids)
    assert first == pytest.approx(source.stationary, abs=5 * np.sqrt(0.25 / len(ids)))


def test_markov_documents_depend_only_on_the_seed() -> None:
    made = [
        MarkovSource(4, seed=seed).documents(rows=5, validation=5, length=20) for seed in (0, 0, 1)
    ]
    assert made[0].fingerprint == made[1].fingerprint != made[2].fingerprint
    assert made[0].train["text"] != made[0].validation["text"]
    assert made[0].entropy_rate == MarkovSource(4, seed=0).row_entropy(20)


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ({"alphabet": 3}, "alphabet"),
        ({"alphabet": 17}, "alphabet"),
        ({"peakedness": float("nan")}, "peakedness"),
    ],
)
def test_markov_source_refuses_impossible_arguments(given: dict[str, float], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        MarkovSource(**given)  # type: ignore[arg-type]
