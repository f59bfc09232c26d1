"""Bins of time: parts of the diffusion term of the bound by information time."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch
from tables import Table, constant, full_rows, processes
from torch import Tensor

from ddiff.core.elbo import Likelihood, nelbo, network_from_table
from ddiff.core.information import TIME_BINS, find_time_bins
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, TimeRule
from ddiff.data.batch import Batch
from ddiff.evaluation.likelihood import Evaluation, Scored, evaluate

DIST = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
WINDOW = (0.05, 0.95)


class Binned(Scored):
    """Objective with a table of predictions, whose scores have bins of time."""

    def __init__(self, process: ForwardProcess, table: Table) -> None:
        self.process = process
        self.network = network_from_table(table, process.vocabulary)

    def nll(
        self, batch: Batch, rng: CounterRng, slot: Tensor, slots: Tensor, times: TimeRule
    ) -> Likelihood:
        terms = nelbo(self.process, self.network, batch.ids, batch.scored, times, rng, slot, slots)
        bins = find_time_bins(self.process.information_time, terms.noisy.t)
        return Likelihood(terms.by_name(), {}, bins)


def score(name: str, ids: Tensor, seed: int = 0, draws: int = 2) -> Evaluation:
    return evaluate(
        Binned(processes()[name], constant(DIST)),
        full_rows(ids),
        np.arange(len(ids)),
        length=ids.shape[1],
        times=FlatTimes(*WINDOW),
        draws=draws,
        seed=seed,
        batch=5,
    )


def draw_ids(rows: int, length: int) -> Tensor:
    return torch.randint(4, (rows, length), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("name", ["masked", "tree", "dense"])
def test_time_bins_add_up_to_the_diffusion_term(name: str) -> None:
    """Only the order of float64 sums differs."""
    found = score(name, draw_ids(12, 5))
    assert [each.start for each in found.time_bins] == [k / TIME_BINS for k in range(TIME_BINS)]
    assert [each.stop for each in found.time_bins] == [(k + 1) / TIME_BINS for k in range(8)]
    total = found.terms_nats_per_token["diffusion"]
    assert sum(each.nats for each in found.time_bins) == pytest.approx(total, rel=1e-12)
    assert sum(each.share for each in found.time_bins) == pytest.approx(1.0, rel=1e-12)
    for each in found.time_bins:
        assert each.share == pytest.approx(each.nats / total, rel=1e-12)


def test_time_bins_of_a_constant_prediction_have_the_exact_nats() -> None:
    """For masks and a constant prediction, the nats of a bin are its width times -mean ln p.

    At time t, a token is masked with probability t and then adds -ln p(x) / t. The first and the
    last bin are narrower, because of the window. 16 seeds give the standard error; |t| > 5.2 with
    15 degrees of freedom has probability 1e-4 for one bin, 1e-3 for the eight bins.
    """
    ids = draw_ids(24, 6)
    cross_entropy = -float(DIST.log()[ids].mean())
    found = [[each.nats for each in score("masked", ids, seed).time_bins] for seed in range(16)]
    ends = np.clip(np.arange(TIME_BINS + 1) / TIME_BINS, *WINDOW)
    off = np.array(found) - cross_entropy * np.diff(ends)
    assert (off.std(0) > 0).all()
    assert (np.abs(off.mean(0)) < 5.2 * off.std(0, ddof=1) / 4).all()


@pytest.mark.parametrize("name", ["masked", "tree", "dense"])
def test_times_fall_into_the_bin_of_their_information_time(name: str) -> None:
    clock = processes()[name].information_time
    # the middle of many cells, so that no time is at an edge
    tau = (torch.arange(400, dtype=torch.float64) + 0.5) / 400
    t, _ = clock.at(tau)
    assert find_time_bins(clock, t).tolist() == (tau * TIME_BINS).long().tolist()
    ends, _ = clock.at(torch.tensor([0.0, 1.0], dtype=torch.float64))
    assert find_time_bins(clock, ends).tolist() == [0, TIME_BINS - 1]


def test_evaluations_of_older_files_have_no_time_bins() -> None:
    found = score("masked", draw_ids(6, 3))
    written = json.loads(json.dumps(found.to_dict()))
    assert Evaluation.from_dict(written) == found
    del written["time_bins"]
    del written["num_bytes"]
    assert Evaluation.from_dict(written).time_bins == ()
