"""The generated source has the entropy that it says."""

from __future__ import annotations

import numpy as np
import pytest

from ddiff.data.markov import MarkovSource
from ddiff.errors import ArgumentError


@pytest.mark.parametrize("alphabet", [4, 9, 16])
def test_the_laws_are_laws_and_the_first_is_invariant(alphabet: int) -> None:
    source = MarkovSource(alphabet, seed=3)
    assert source.transition.sum(1) == pytest.approx(1.0, abs=1e-12)
    assert (source.stationary > 0).all()
    assert source.stationary @ source.transition == pytest.approx(source.stationary, abs=1e-12)


def test_without_peaks_every_symbol_is_as_likely() -> None:
    source = MarkovSource(8, peakedness=0.0)
    assert source.entropy_rate == pytest.approx(np.log(8), abs=1e-12)
    assert source.row_entropy(5) == pytest.approx(np.log(8), abs=1e-12)


def test_peaks_make_the_source_predictable() -> None:
    rates = [
        MarkovSource(8, peakedness=peakedness, seed=1).entropy_rate
        for peakedness in (0.0, 1.0, 3.0, 1000.0)
    ]
    assert rates == sorted(rates, reverse=True)
    assert rates[-1] == pytest.approx(0.0, abs=1e-6)


def test_the_entropy_of_a_row_is_that_of_its_enumerated_law() -> None:
    source = MarkovSource(4, seed=2)
    law = source.stationary
    for _ in range(3):  # rows of four symbols: 256 of them
        law = (law.reshape(-1, 4)[:, :, None] * source.transition[None]).reshape(-1)
    assert source.row_entropy(4) == pytest.approx(-(law * np.log(law)).sum() / 4, abs=1e-12)
    assert source.row_entropy(1) > source.row_entropy(4) > source.entropy_rate


def test_rows_follow_the_chain() -> None:
    source = MarkovSource(6, seed=5)
    ids = np.array([[source.symbols.index(c) for c in row] for row in source.rows(4000, 25)])
    log_prob = np.log(source.stationary[ids[:, 0]]) + np.log(
        source.transition[ids[:, :-1], ids[:, 1:]]
    ).sum(1)
    # By the law of large numbers -log P / length averages to the row's entropy; five standard errors, fixed seed.
    error = log_prob.std() / 25 / np.sqrt(len(ids))
    assert abs(-log_prob.mean() / 25 - source.row_entropy(25)) < 5 * error
    first = np.bincount(ids[:, 0], minlength=6) / len(ids)
    assert first == pytest.approx(source.stationary, abs=5 * np.sqrt(0.25 / len(ids)))


def test_the_corpus_is_a_function_of_the_seed() -> None:
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
def test_impossible_sources_are_refused(given: dict[str, float], named: str) -> None:
    with pytest.raises(ArgumentError, match=named):
        MarkovSource(**given)  # type: ignore[arg-type]
