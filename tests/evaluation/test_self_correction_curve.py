"""Self-correction accuracy and curve of finished samples, for a known predicted distribution."""

from __future__ import annotations

import pytest
import torch

from ddiff.core.components import MixtureProcess, token_distribution
from ddiff.core.elbo import network_from_noisy
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import Noisy
from ddiff.core.vocabulary import FlatVocabulary
from ddiff.evaluation.self_correction import CorrectionCurve, measure_correction
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.self_correction import SelfCorrectingSampler

BARE = FlatVocabulary(3, mask=False)
UNIFORM = MixtureProcess(BARE, LinearSchedule(), token_distribution(BARE))
PEAKS = ((0.8, 0.1, 0.1), (0.05, 0.9, 0.05), (0.01, 0.01, 0.98))  # best tokens 0, 1, 2


def correct(rows: list[list[int]], rounds: int, commit: int = 1) -> CorrectionCurve:
    """Correct rows at a late time, at which the own token is hardly evidence.

    With temperature 0.2, a proposal is the most likely token with a probability above 0.9999.
    """
    log_p = torch.tensor(PEAKS, dtype=torch.float64).log()

    def predict(noisy: Noisy) -> torch.Tensor:
        return log_p.expand(len(noisy.zt), -1, -1)

    sampler = SelfCorrectingSampler(
        AncestralSampler(1), rounds=rounds, commit=commit, temperature=0.2, at=0.99
    )
    network = network_from_noisy(predict, BARE)
    index = torch.arange(len(rows))
    ids = torch.tensor(rows)
    return measure_correction(
        sampler, UNIFORM, network, ids, lambda k: CounterRng(0, k, index, 3, "test")
    )


def test_accuracy_is_the_share_of_most_likely_tokens_before_and_after_each_round() -> None:
    found = correct([[2, 0, 1], [0, 1, 0], [0, 1, 2]], rounds=4)
    third = 1 / 3
    expected = [
        [0.0, third, 2 * third, 1.0, 1.0],
        [2 * third, 1.0, 1.0, 1.0, 1.0],
        [1.0, 1.0, 1.0, 1.0, 1.0],
    ]
    assert found.accuracy.tolist() == [pytest.approx(row) for row in expected]
    assert found.ids.tolist() == [[0, 1, 2]] * 3


def test_samples_are_corrected_in_no_more_than_the_given_rounds() -> None:
    found = correct([[2, 0, 1]], rounds=1)
    assert found.accuracy.tolist() == [pytest.approx([0.0, 1 / 3])]
    # the most likely of the three changes comes first
    assert found.ids.tolist() == [[2, 0, 2]]


def test_commit_is_the_number_of_changes_of_a_round() -> None:
    assert correct([[2, 0, 1]], rounds=1, commit=3).accuracy.tolist() == [[0.0, 1.0]]


def test_samples_do_not_depend_on_the_other_samples_of_a_batch() -> None:
    rows = [[0, 1, 2], [2, 0, 1]]
    both = correct(rows, rounds=2)
    single = correct(rows[:1], rounds=2)
    assert both.accuracy[:1].equal(single.accuracy)
