"""Bound of the likelihood of tokens given the tokens before them, and its Monte-Carlo error."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from tables import Known, Table, constant, exact_conditionals, processes, symbols
from torch import Tensor

from ddiff.core.elbo import Likelihood, network_from_table
from ddiff.core.times import FlatTimes, TimeRule
from ddiff.data.batch import Batch
from ddiff.data.markov import MarkovSource
from ddiff.errors import ArgumentError
from ddiff.evaluation.chain_rule import chain_rule_nll
from ddiff.evaluation.conditional import (
    ConditionalScorer,
    Continuation,
    error_of_draws,
    error_of_sum,
    find_shapes,
    is_undecided,
)
from ddiff.evaluation.intervals import student95
from ddiff.progress import show_progress

WINDOW = (1e-3, 1 - 1e-3)
UNIGRAM = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()


def times_for(tokens: int) -> TimeRule:
    return FlatTimes(*WINDOW, tokens)


def score(
    objective: Known, continuations: list[Continuation], draws: int = 16, **settings: object
) -> np.ndarray:
    scorer = ConditionalScorer(objective, times_for, longest=32, draws=draws, **settings)
    with show_progress(None, "scoring") as bar:
        return scorer.score(continuations, bar)


def uneven(zt: Tensor, t: Tensor) -> Tensor:
    """Return predictions [B,L,4] that depend on all other tokens and not on time.

    Padding (after position 5) has no effect.
    """
    table = torch.randn(5, 6, 4, generator=torch.Generator().manual_seed(1)).double()
    shown = table[zt[:, :6], torch.arange(6)]
    total = shown.sum(1, keepdim=True) - shown
    found = torch.zeros(*zt.shape, 4).double()
    found[:, :6] = 1.5 * total + table[4]
    return found.log_softmax(-1)


# ---------------------------------------------------------------------- expectation


@pytest.mark.parametrize("name", ["masked", "tree", "dense"])
def test_conditional_bound_of_exact_predictions_is_the_exact_likelihood(name: str) -> None:
    """With exact predictions, the bound of each sequence is its -ln p, up to the end cost.

    For a Markov source, -ln p(y | c) is a sum of logarithms of transition probabilities. The end
    terms take positions as independent, which changes the mean by less than 5e-3 nats per token.
    """
    source = MarkovSource(4, peakedness=1.0, seed=4)
    process = processes()[name]
    rows = symbols(source, 4, 7)
    move = torch.from_numpy(source.transition).log()
    start = torch.from_numpy(source.stationary).log()
    # the symbol after the context whose probability depends most on the context
    gain = move - start
    rows[:, 2] = int(gain.abs().argmax()) // 4
    rows[:, 3] = int(gain.abs().argmax()) % 4
    continuations = [
        Continuation(tuple(row[:3]), tuple(row[3:]), str(number))
        for number, row in enumerate(rows.tolist())
    ]
    table = _on_valid(exact_conditionals(process, source), 7)
    nats = score(Known(process, table), continuations, draws=2000, batch=4096)
    exact = -move[rows[:, 2:-1], rows[:, 3:]].sum(-1).numpy()
    error = float(error_of_draws(nats).max())
    assert np.abs(nats.mean(-1) - exact).max() < 4 * error + 4 * 5e-3
    assert float(gain.abs().max()) > 6 * error, "the context matters too little for this test"


def test_conditional_bound_agrees_with_the_chain_rule_within_its_error() -> None:
    """The chain rule sums over all orders of the continuation, with the context in every set."""
    process = processes()["masked"]
    context = (3, 0)
    rows = torch.tensor([[0, 1, 2, 3], [2, 2, 1, 0], [3, 3, 3, 3]])
    continuations = [
        Continuation(context, tuple(row), str(n)) for n, row in enumerate(rows.tolist())
    ]
    nats = score(Known(process, uneven), continuations, draws=2000, batch=4096)

    def given_context(zt: Tensor, t: Tensor) -> Tensor:
        before = torch.tensor(context).expand(len(zt), -1)
        return uneven(torch.cat([before, zt], 1), t)[:, len(context) :]

    found = chain_rule_nll(network_from_table(given_context, process.vocabulary), process, rows)
    error = error_of_draws(nats)
    # the end terms change the mean by less than 2e-3 nats, as in the tests of the chain rule
    assert np.all(np.abs(nats.mean(-1) - found.bound.numpy()) < 4 * error + 2e-3)
    assert np.all(nats.mean(-1) > found.nll.numpy() - 4 * error)
    assert float((found.bound - found.nll).max()) > 8 * float(error.max()), "the gap is too small"


def test_context_stays_clean_and_only_the_continuation_is_scored() -> None:
    seen: list[Batch] = []

    class Watched(Known):
        def nll(self, batch: Batch, *arguments: object) -> Likelihood:  # type: ignore[override]
            seen.append(batch)
            return super().nll(batch, *arguments)  # type: ignore[arg-type]

    score(Watched(processes()["masked"], constant(UNIGRAM)), [Continuation((1, 2), (3,), "a")])
    assert seen[0].scored[0].nonzero().flatten().tolist() == [2]
    assert seen[0].valid[0].sum() == 3
    assert seen[0].ids[0, :3].tolist() == [1, 2, 3]


# ---------------------------------------------------------------------- error


def test_error_of_draws_is_that_of_two_draws_per_stratum() -> None:
    """By hand: draws 1, 3 and 10, 14 have the differences -2 and -4."""
    nats = np.array([[1.0, 3.0, 10.0, 14.0]])
    assert error_of_draws(nats) == pytest.approx([math.sqrt(4 + 16) / 4])
    assert np.isnan(error_of_draws(nats[:, :1])).all()
    # the sum has the variance of both, and 4 strata with the squared differences 16, 1, 1, 0
    total = error_of_sum(np.array([[0.0, 4.0, 0.0, 1.0], [5.0, 6.0, 7.0, 7.0]]))
    assert total is not None
    assert total.standard == pytest.approx(math.sqrt(16 + 1 + 1) / 4)
    assert total.freedom == pytest.approx(3 * 18**2 / (16**2 + 1 + 1) - 2)
    equal = error_of_sum(np.array([[0.0, 1.0] * 4]))
    assert equal is not None
    assert equal.freedom == 4.0  # not more than the strata
    assert error_of_sum(nats[:, :1]) is None


def test_monte_carlo_interval_covers_the_expected_bound() -> None:
    """With 128 draws, 93 % to 97 % of 500 intervals contain the expected bound.

    The standard deviation of the share is 1 %. The bound of a unigram prediction is exact. Few
    draws are skewed: with 16 draws, about 92 % of the intervals contain it.
    """
    generator = torch.Generator().manual_seed(0)
    ids = torch.multinomial(UNIGRAM, 500 * 8, replacement=True, generator=generator)
    rows = ids.reshape(500, 8)
    continuations = [Continuation((0,), tuple(row), str(n)) for n, row in enumerate(rows.tolist())]
    objective = Known(processes()["masked"], constant(UNIGRAM))
    nats = score(objective, continuations, draws=128, batch=8192)
    exact = -UNIGRAM.log()[rows].sum(-1).numpy()
    assert 0.93 <= share_covered(nats, exact) <= 0.97


def share_covered(nats: np.ndarray, exact: np.ndarray) -> float:
    """Return the share of the rows of `nats` whose interval contains the value of `exact`."""
    covered = []
    for draws, value in zip(nats, exact):
        error = error_of_sum(draws[np.newaxis])
        assert error is not None
        covered.append(abs(draws.mean() - value) <= error.half_width)
    return float(np.mean(covered))


def test_strata_reduce_the_error() -> None:
    """Two draws in each of 32 strata, against 64 draws that are spread over all times."""
    generator = torch.Generator().manual_seed(0)
    rows = torch.multinomial(UNIGRAM, 200 * 16, replacement=True, generator=generator)
    continuations = [
        Continuation((), tuple(row), str(n)) for n, row in enumerate(rows.reshape(200, 16).tolist())
    ]
    table = _harder_at_noise()
    objective = Known(processes()["masked"], table)
    nats = score(objective, continuations, draws=64, batch=8192)
    stratified = (error_of_draws(nats) ** 2).mean()
    independent = (nats.var(-1, ddof=1) / 64).mean()
    assert stratified < 0.9 * independent


def test_answers_of_a_question_share_their_random_numbers() -> None:
    """The difference of two answers that differ in one token has a tenth of the variance."""
    objective = Known(processes()["masked"], constant(UNIGRAM))
    tokens = (0, 1, 2, 3, 0, 1, 2, 3)
    others = (*tokens[:-1], 2)
    paired = [Continuation((), tokens, "q"), Continuation((), others, "q")]
    apart = [Continuation((), tokens, "q"), Continuation((), others, "r")]
    variance = []
    for continuations in (paired, apart):
        nats = score(objective, continuations, draws=1000)
        variance.append(float((nats[0] - nats[1]).var()))
    assert variance[0] < 0.1 * variance[1]


def test_scores_do_not_depend_on_batch_or_other_questions() -> None:
    """Sums of float64 in another order differ by rounding only."""
    continuations = [
        Continuation((0,) * (n % 3), (1, 2, 3)[: 1 + n % 3], str(n // 2)) for n in range(9)
    ]
    objective = Known(processes()["tree"], constant(UNIGRAM))
    every = score(objective, continuations)
    assert np.allclose(score(objective, continuations, batch=5), every, rtol=1e-12)
    assert np.allclose(score(objective, continuations[4:6]), every[4:6], rtol=1e-12)
    assert not np.allclose(score(objective, continuations, seed=1), every)


def test_shapes_are_equal_within_a_question_and_fit_into_a_row() -> None:
    shapes = find_shapes(
        [
            Continuation((0,) * 20, (1,) * 2, "long"),
            Continuation((0,), (1,) * 6, "long"),
            Continuation((), (1,), "short"),
        ],
        longest=24,
    )
    assert (shapes["long"].positions, shapes["long"].tokens) == (24, 4)
    assert (shapes["short"].positions, shapes["short"].tokens) == (16, 1)


# ---------------------------------------------------------------------- answers


def test_exact_likelihood_takes_one_draw() -> None:
    class Exact(Known):
        bound = "NLL"

    scorer = ConditionalScorer(
        Exact(processes()["masked"], constant(UNIGRAM)), times_for, longest=8, draws=64
    )
    assert scorer.draws == 1


def test_undecided_questions_are_those_whose_difference_may_be_zero() -> None:
    """The first difference is 2 without error; the second has the mean 1 and a large error."""
    sure = np.array([[1.0, 2.0, 1.0, 2.0], [3.0, 4.0, 3.0, 4.0]])
    unsure = np.array([[1.0, 2.0, 1.0, 2.0], [0.0, 5.0, 0.0, 5.0]])
    assert not is_undecided(sure)
    assert is_undecided(unsure)
    # the differences -1, 3, -1, 3 have the mean 1; 3 * 32^2 / (2 * 16^2) - 2 = 4 is more than 2
    assert student95(2) * math.sqrt(32) / 4 > 1.0
    assert not is_undecided(sure[:, :1])


@pytest.mark.parametrize("draws", [0, 3, -2])
def test_odd_numbers_of_draws_are_refused(draws: int) -> None:
    with pytest.raises(ArgumentError, match="1, or an even number"):
        score(Known(processes()["masked"], constant(UNIGRAM)), [], draws=draws)


def _on_valid(table: Table, length: int) -> Table:
    """Return a table that sees only the first `length` positions; the others are padding."""

    def padded(zt: Tensor, t: Tensor) -> Tensor:
        found = torch.full((*zt.shape, 4), math.log(0.25)).double()
        found[:, :length] = table(zt[:, :length], t[:, :length])
        return found

    return padded


def _harder_at_noise() -> Table:
    """Return a table that predicts well at little noise and badly at much noise."""

    def table(zt: Tensor, t: Tensor) -> Tensor:
        share = t.unsqueeze(-1)
        flat = torch.tensor([0.02, 0.02, 0.02, 0.94]).double()
        return ((1 - share) * UNIGRAM + share * flat).log().expand(*zt.shape, -1)

    return table
