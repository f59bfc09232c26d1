"""Confusions of networks whose predictions are known, on processes with and without clusters."""

from __future__ import annotations

import pytest
import torch
from tables import processes
from torch import Tensor

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.components import MixtureProcess
from ddiff.core.elbo import network_from_table
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import LinearSchedule
from ddiff.core.times import Noisy
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.evaluation.confusion import Confusion, count_confusions

CLUSTERS = HierarchicalVocabulary(
    [[0, 1, 1, 0]]
)  # tokens 0 and 3 are below node 4, 1 and 2 below 5
MASK = 6


def make_noisy(zt: list[list[int]]) -> Noisy:
    states = torch.tensor(zt)
    times = torch.full(states.shape, 0.5, dtype=torch.float64)
    return Noisy(states, times, torch.zeros_like(states, dtype=torch.bool))


def count(
    process: ForwardProcess, dist: Tensor, x0: list[list[int]], zt: list[list[int]]
) -> list[Confusion]:
    """Count confusions of a network that predicts the distribution `dist` [V] everywhere."""
    network = network_from_table(
        lambda states, t: dist.log().expand(*states.shape, -1), process.vocabulary
    )
    return count_confusions(process, [(network, torch.tensor(x0), make_noisy(zt))])


def as_dict(found: Confusion) -> dict[tuple[int, int], int]:
    pairs = zip(found.true.tolist(), found.predicted.tolist())
    return dict(zip(pairs, found.count.tolist()))


def test_masks_are_scored_by_cluster_and_clusters_by_token() -> None:
    process = TreeProcess(CLUSTERS, LogTimeClock((1.0, 1.0)))
    # cluster 5 has the probability 0.6, although token 0 is the most likely token
    dist = torch.tensor([0.4, 0.35, 0.25, 0.0]).double()
    x0 = [[0, 1, 2, 3, 1, 0]]
    zt = [[MASK, MASK, 5, 4, 1, MASK]]
    tokens, clusters = count(process, dist, x0, zt)
    assert clusters.level == 1
    assert as_dict(clusters) == {(4, 5): 2, (5, 5): 1}
    assert tokens.level == 0
    # the best token below node 5 is 1, below node 4 it is 0; position 4 is clean and not counted
    assert as_dict(tokens) == {(2, 1): 1, (3, 0): 1}


def test_confusion_of_a_flat_vocabulary_counts_masks_only() -> None:
    process = TreeProcess(FlatVocabulary(4), CdfClock([LinearSchedule()]))
    dist = torch.tensor([0.1, 0.2, 0.6, 0.1]).double()
    (found,) = count(process, dist, [[0, 2, 2, 1]], [[4, 4, 2, 4]])
    assert as_dict(found) == {(0, 2): 1, (1, 2): 1, (2, 2): 1}


def test_confusion_at_wrong_tokens_uses_the_evidence_of_the_token() -> None:
    vocabulary = FlatVocabulary(4, mask=False)
    process = MixtureProcess(vocabulary, LinearSchedule(), torch.full((4,), 0.25).double())
    dist = torch.tensor([0.3, 0.25, 0.25, 0.2]).double()
    # q(z|x) = (1 - t) [z = x] + t/4 with t = 1/2: 0.625 if x = z, else 0.125
    (found,) = count(process, dist, [[0, 1, 3]], [[2, 2, 3]])
    # 0.25 * 0.625 > 0.3 * 0.125, so the network keeps the wrong token 2
    assert as_dict(found) == {(0, 2): 1, (1, 2): 1}


def test_confusion_sums_the_posterior_of_the_tokens_of_a_cluster() -> None:
    # three levels and wrong parents: a state of level 2 is evidence for every node of level 1
    vocabulary = HierarchicalVocabulary([[0, 1, 2, 3], [0, 0, 1, 1]])
    process = TreeProcess(vocabulary, LogTimeClock((1.0, 1.0, 1.0)), xi=0.8)
    dist = torch.tensor([0.1, 0.2, 0.3, 0.4]).double()
    first = vocabulary.offsets[2]  # node of tokens 0 and 1
    (found,) = count(process, dist, [[0]], [[first]])
    evidence = process.log_likelihood(torch.tensor([first]), torch.tensor([0.5]).double())[0].exp()
    best = int((dist * evidence).argmax())
    assert found.level == 1
    assert as_dict(found) == {(vocabulary.offsets[1], vocabulary.offsets[1] + best): 1}


@pytest.mark.parametrize("name", ["masked", "tree", "dense"])
def test_confusion_is_empty_for_a_perfect_network(name: str) -> None:
    process = processes()[name]
    x0 = torch.randint(4, (8, 6), generator=torch.Generator().manual_seed(0))
    u = torch.rand(48, process.uniforms_per_sample, generator=torch.Generator().manual_seed(1))
    times = torch.full((8, 6), 0.5).double()
    zt = process.sample(x0.reshape(-1), times.reshape(-1), u.double()).reshape(8, 6)
    truth = torch.nn.functional.one_hot(x0, 4).double().clamp_min(1e-30)
    network = network_from_table(lambda states, t: truth.log(), process.vocabulary)
    noisy = Noisy(zt, times, torch.zeros_like(zt, dtype=torch.bool))
    found = count_confusions(process, [(network, x0, noisy)])
    counted = sum(int(each.count.sum()) for each in found)
    assert counted == int(((zt != x0) & process.active(zt.reshape(-1)).reshape(8, 6)).sum())
    for each in found:
        assert torch.equal(each.true, each.predicted)
