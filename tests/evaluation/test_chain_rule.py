"""Exact likelihood of short sequences, and its distance from the bound."""

from __future__ import annotations

import itertools
import math

import numpy as np
import pytest
import torch
from tables import Known, full_rows, processes
from torch import Tensor

from ddiff.core.elbo import network_from_table
from ddiff.core.times import FlatTimes
from ddiff.errors import ArgumentError
from ddiff.evaluation.chain_rule import LONGEST, chain_rule_nll
from ddiff.evaluation.likelihood import evaluate

LENGTH = 4


def uneven(zt: Tensor, t: Tensor) -> Tensor:
    """Return predictions [B,L,4] that depend on the other tokens, but not on time.

    They are not the conditionals of one joint distribution, so each order has its own likelihood.
    """
    generator = torch.Generator().manual_seed(1)
    table = torch.randn(5, zt.shape[1], 4, generator=generator).double()
    places = torch.arange(zt.shape[1])
    seen = table[zt, places]  # [B,L,4]: the message of each position
    total = seen.sum(1, keepdim=True) - seen
    return (2.0 * total + table[4, places]).log_softmax(-1)


def rows(count: int) -> Tensor:
    return torch.randint(0, 4, (count, LENGTH), generator=torch.Generator().manual_seed(2))


def nats_in_order(row: Tensor, order: tuple[int, ...]) -> float:
    """Return -ln of the probability that the order gives the tokens of `row` [L]."""
    zt = torch.full_like(row, 4)
    nats = 0.0
    for place in order:
        log_p = uneven(zt[None], torch.zeros(1, LENGTH))[0]
        nats -= float(log_p[place, row[place]])
        zt[place] = row[place]
    return nats


def test_chain_rule_equals_the_sum_over_all_orders() -> None:
    """Up to rounding of float64 sums over 24 orders."""
    network = network_from_table(uneven, processes()["masked"].vocabulary)
    found = chain_rule_nll(network, processes()["masked"], rows(3))
    for row, nll, bound in zip(rows(3), found.nll, found.bound):
        nats = [nats_in_order(row, order) for order in itertools.permutations(range(LENGTH))]
        exact = -math.log(sum(math.exp(-value) for value in nats) / len(nats))
        assert float(nll) == pytest.approx(exact, rel=1e-12)
        assert float(bound) == pytest.approx(sum(nats) / len(nats), rel=1e-12)


def test_probabilities_of_all_sequences_sum_to_one() -> None:
    network = network_from_table(uneven, processes()["masked"].vocabulary)
    every = torch.tensor(list(itertools.product(range(4), repeat=LENGTH)))
    found = chain_rule_nll(network, processes()["masked"], every)
    assert float((-found.nll).exp().sum()) == pytest.approx(1.0, rel=1e-12)


def test_estimated_bound_agrees_with_its_expectation_and_exceeds_the_exact_likelihood() -> None:
    """The estimate is within four standard errors of its expectation.

    The decoding term and the prior term at the ends of the window take the positions as
    independent, and change the expectation by less than 2e-3 nats in this window.
    """
    process = processes()["masked"]
    ids = rows(8)
    found = chain_rule_nll(network_from_table(uneven, process.vocabulary), process, ids)
    evaluation = evaluate(
        Known(process, uneven),
        full_rows(ids),
        np.arange(len(ids)),
        length=LENGTH,
        times=FlatTimes(1e-3, 1 - 1e-3),
        draws=400,
        batch=512,
    )
    error = evaluation.standard_errors_nats_per_token["monte_carlo"]
    assert error is not None
    bound = float(found.bound.mean()) / LENGTH
    exact = float(found.nll.mean()) / LENGTH
    assert abs(evaluation.nelbo_nats_per_token - bound) < 4 * error + 2e-3
    assert bound - exact > 8 * error, "the gap is too small for this test"
    assert evaluation.nelbo_nats_per_token > exact - 4 * error
    assert bool((found.bound >= found.nll).all())


def test_chain_rule_refuses_networks_with_time_and_processes_without_order() -> None:
    masked = processes()["masked"]

    def timed(zt: Tensor, t: Tensor) -> Tensor:
        return (uneven(zt, t) * (1.0 + t.unsqueeze(-1))).log_softmax(-1)

    with pytest.raises(ArgumentError, match="must not depend on time"):
        chain_rule_nll(network_from_table(timed, masked.vocabulary), masked, rows(1))
    network = network_from_table(uneven, masked.vocabulary)
    for name in ("tree", "dense"):
        with pytest.raises(ArgumentError, match="expected a masked process"):
            chain_rule_nll(network, processes()[name], rows(1))
    with pytest.raises(ArgumentError, match=f"1 to {LONGEST} tokens"):
        chain_rule_nll(network, masked, torch.zeros(1, LONGEST + 1, dtype=torch.long))
