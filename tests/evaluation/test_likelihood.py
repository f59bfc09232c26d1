"""`evaluate`: scores every token once; bounds and intervals are correct for any time window."""

from __future__ import annotations

import json
import math
from collections import Counter
from typing import Any

import numpy as np
import pytest
import torch
from tables import Known, constant, exact_conditionals, full_rows, processes, scored_rows, symbols
from torch import Tensor, nn

from ddiff import Backbone
from ddiff.core.elbo import Likelihood
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes
from ddiff.data.markov import MarkovSource
from ddiff.errors import ArgumentError, NonFiniteError
from ddiff.evaluation.likelihood import MOST_DRAWS, Evaluation, Scored, evaluate
from ddiff.evaluation.likelihood_sums import BatchSums, TermMeans
from ddiff.nn.denoiser import Context, Denoiser
from ddiff.nn.heads import TokenHead
from ddiff.training.losses import ClippedLoss, ElboLoss
from ddiff.training.objective import DiffusionObjective

LAW = torch.tensor([0.4, 0.3, 0.2, 0.1]).double()
NAMES = list(processes())
WINDOW = FlatTimes(0.05, 0.95)


def words(rows: int, length: int, seed: int = 0) -> Tensor:
    """Return ids [rows, length] of independent tokens with the distribution LAW."""
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(LAW, rows * length, replacement=True, generator=generator).reshape(
        rows, length
    )


def score(
    objective: Any, ids: Tensor, document: list[int] | None = None, **settings: Any
) -> Evaluation:
    """Evaluate an objective on rows of ids; by default, each row is a separate document."""
    numbers = np.arange(len(ids)) if document is None else np.array(document)
    settings = {"batch_of": full_rows(ids), "length": ids.shape[1], "times": WINDOW} | settings
    return evaluate(objective, document=numbers, **settings)


@pytest.mark.parametrize("draws", [1, 3])
@pytest.mark.parametrize("batch", [1, 3, 7, 64])
def test_evaluate_scores_every_token_once_per_draw(draws: int, batch: int) -> None:
    num_valid = torch.tensor([5, 5, 2, 5, 1, 5, 3])
    objective = Known(processes()["masked"], constant(LAW))
    settings = {"batch_of": scored_rows(words(7, 5), num_valid), "draws": draws, "batch": batch}
    evaluation = score(objective, words(7, 5), [0, 0, 0, 1, 1, 2, 3], **settings)
    assert Counter(row for row, _, _ in objective.asked) == dict.fromkeys(range(7), draws)
    assert evaluation.tokens == 26
    assert evaluation.documents == 4


def test_each_time_stratum_of_a_document_is_used_once_per_draw() -> None:
    objective, document = Known(processes()["masked"], constant(LAW)), [0, 0, 0, 1, 1, 2]
    score(objective, words(6, 4), document, draws=4, batch=6)
    for draw in range(4):
        asked = objective.asked[6 * draw : 6 * draw + 6]
        for name, count in Counter(document).items():
            assert sorted(slot for row, slot, _ in asked if document[row] == name) == list(
                range(count)
            )
    assert {(document[row], slots) for row, _, slots in objective.asked} == {(0, 3), (1, 2), (2, 1)}


def test_each_row_is_assigned_each_time_stratum_equally_often() -> None:
    """Count the time strata of a row over 120 seeds.

    The tolerance 26 is five standard deviations.
    """
    found: Counter[int] = Counter()
    for seed in range(120):
        objective = Known(processes()["masked"], constant(LAW))
        score(objective, words(3, 1), [0, 0, 0], seed=seed)
        found.update(slot for row, slot, _ in objective.asked if row == 1)
    assert all(abs(found[slot] - 40) < 26 for slot in range(3))


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_nelbo_is_the_sum_of_its_reported_terms(name: str) -> None:
    evaluation = score(network(processes()[name]), words(9, 5), draws=2, batch=4)
    terms = evaluation.terms_nats_per_token
    assert list(terms) == ["closing", "diffusion", "decoding"]
    assert sum(terms.values()) == pytest.approx(evaluation.nelbo_nats_per_token, abs=1e-12)
    assert sum(evaluation.parts_nats_per_token.values()) == pytest.approx(
        terms["diffusion"], abs=1e-12
    )
    assert evaluation.ppl == pytest.approx(math.exp(evaluation.nelbo_nats_per_token))


@pytest.mark.parametrize("window", [(1e-3, 0.999), (0.02, 1.0), (0.3, 0.6)])
@pytest.mark.parametrize("name", NAMES)
def test_bound_of_constant_prediction_is_cross_entropy_in_any_window(
    name: str, window: tuple[float, float]
) -> None:
    """For independent tokens, E[NELBO] = -mean ln p(x) in any time window.

    The same rows are evaluated with sixteen seeds of times and noise. The tolerance is five
    standard errors: Student's |t| > 5 with 15 degrees of freedom has probability 2e-4, or 1.4e-3 in
    any of nine cases. Seeds are fixed.
    """
    ids = words(24, 6)
    exact = -float(LAW.log()[ids].mean())
    objective = Known(processes()[name], constant(LAW))
    off = [
        score(objective, ids, times=FlatTimes(*window), seed=s).nelbo_nats_per_token - exact
        for s in range(16)
    ]
    assert np.std(off) > 0
    assert abs(np.mean(off)) < 5 * np.std(off, ddof=1) / 4


@pytest.mark.parametrize("name", NAMES)
def test_bound_of_exact_prediction_equals_markov_entropy(name: str) -> None:
    """The entropy of the Markov source is within four standard errors of the bound.

    With random seeds, any of the three cases would fail by chance with probability 2e-4; the seeds
    are fixed. The decoding term treats the symbols at t = 0.02 as independent, which adds less than
    1e-3 nats.
    """
    source, process = MarkovSource(4, peakedness=2.0), processes()[name]
    known = Known(process, exact_conditionals(process, source))
    evaluation = score(
        known, symbols(source, 512, 16), times=FlatTimes(0.02, 0.999), draws=4, batch=256
    )
    half = half_width(evaluation)
    entropy = source.row_entropy(16)
    assert half < 0.08 * entropy, "the interval is too wide for this test"
    assert abs(evaluation.nelbo_nats_per_token - entropy) < 4 / 1.96 * half


def test_confidence_interval_of_the_bound_covers_the_entropy_at_95_percent() -> None:
    """Of 200 intervals, 178 to 198 contain the entropy of LAW, and the mean bound is the entropy.

    Each interval is that of a corpus of 40 documents, with 1 to 3 padded rows each. For exact 95 %
    intervals, other counts have probability 1e-3 (binomial). Seeds are fixed.
    """
    entropy = -float((LAW * LAW.log()).sum())
    objective, covered = Known(processes()["masked"], constant(LAW)), 0
    document = np.repeat(np.arange(40), np.arange(40) % 3 + 1)
    num_valid = torch.arange(len(document)) % 4 + 1
    for seed in range(200):
        ids = words(len(document), 4, seed=1000 + seed)
        settings = {"batch_of": scored_rows(ids, num_valid), "seed": seed, "batch": 128}
        low, high = score(objective, ids, document.tolist(), **settings).interval or (0.0, 0.0)
        covered += low <= entropy <= high
    assert 178 <= covered <= 198


def test_confidence_interval_of_a_single_document_is_none() -> None:
    assert (
        score(Known(processes()["masked"], constant(LAW)), words(4, 3), [5, 5, 5, 5]).interval
        is None
    )


def test_bits_per_byte_divides_by_all_bytes_of_the_text() -> None:
    objective = Known(processes()["masked"], constant(LAW))
    evaluation = score(objective, words(6, 5), num_bytes=90, draws=2)
    assert evaluation.bits_per_byte == pytest.approx(
        evaluation.nelbo_nats_per_token * 30 / math.log(2) / 90
    )
    assert score(objective, words(6, 5)).bits_per_byte is None


class Unigram(Scored):
    """Exact likelihood of independent tokens with the distribution `dist` [V]."""

    bound = "NLL"

    def __init__(self, dist: Tensor) -> None:
        self.dist = dist

    def nll(self, batch: Any, *_: Any) -> Likelihood:
        return Likelihood({"nll": -self.dist.log()[batch.ids] * batch.scored}, {})


def in_rows(stream: Tensor, length: int) -> dict[str, Any]:
    """Return the arguments of `score` for a stream of tokens [n] in rows of `length`."""
    count = -(-len(stream) // length)
    ids = torch.zeros(count * length, dtype=torch.long)
    ids[: len(stream)] = stream
    num_valid = (len(stream) - length * torch.arange(count)).clamp(max=length)
    ids = ids.reshape(count, length)
    return {"ids": ids, "batch_of": scored_rows(ids, num_valid)}


def test_bits_per_byte_do_not_depend_on_tokens_and_rows_for_a_known_likelihood() -> None:
    """The same 60 bytes as tokens of 1, 2 and 3 bytes, in rows of 4, 7 and 60 tokens.

    `test_refutations` has the values of an assumed number of bytes per token.
    """
    stream = words(1, 60)[0]
    found = []
    for size in (1, 2, 3):
        dist = LAW
        tokens = stream.reshape(-1, size)
        ids = tokens[:, 0]
        for place in range(1, size):
            dist = (dist[:, None] * LAW).reshape(-1)
            ids = ids * 4 + tokens[:, place]
        for length in (4, 7, 60):
            evaluation = score(Unigram(dist), num_bytes=60, **in_rows(ids, length))
            assert evaluation.bits_per_byte is not None
            found.append(evaluation.bits_per_byte)
    exact = -float(LAW.log2()[stream].mean())
    assert found == pytest.approx([exact] * 9, rel=1e-12)


def test_until_stops_at_the_first_draw_with_a_narrow_interval() -> None:
    """The result is that of the same number of draws without `until`."""
    objective = Known(processes()["masked"], constant(LAW))
    found = score(objective, words(64, 6), until=0.05)
    draws = found.protocol["draws"]
    assert 4 < draws < MOST_DRAWS
    for count, is_narrow in ((draws, True), (draws - 1, False)):
        same = score(objective, words(64, 6), draws=count)
        low, high = same.monte_carlo_interval or (0.0, 9.0)
        assert ((high - low) / 2 <= 0.05) == is_narrow
        if is_narrow:
            assert same.nelbo_nats_per_token == found.nelbo_nats_per_token
            assert same.interval == found.interval


def test_until_covers_the_expected_bound_at_95_percent() -> None:
    """Of 200 intervals that were narrow enough, 178 to 198 contain the expected bound.

    For exact 95 % intervals, other counts have probability 1e-3 (binomial). Seeds are fixed.
    """
    ids = words(48, 4)
    exact = -float(LAW.log()[ids].mean())
    objective = Known(processes()["masked"], constant(LAW))
    covered = 0
    for seed in range(200):
        found = score(objective, ids, until=0.2, seed=seed)
        low, high = found.monte_carlo_interval or (0.0, 0.0)
        covered += low <= exact <= high
    assert 178 <= covered <= 198


class Exponential(Scored):
    """Objective whose nats of a row are random and skewed, with the mean 1."""

    def nll(self, batch: Any, rng: CounterRng, *_: Any) -> Likelihood:
        value = torch.zeros(batch.ids.shape).double()
        value[:, 0] = -rng.uniform("nats")[:, 0].double().log()
        return Likelihood({"diffusion": value}, {})


@pytest.mark.parametrize(("documents", "draws"), [(1, 21), (2, 11), (7, 4), (40, 4)])
def test_until_needs_20_degrees_of_freedom(documents: int, draws: int) -> None:
    """D documents of equal length have (draws - 1) D degrees of freedom; at least 4 draws."""
    found = score(Exponential(), words(documents, 1), until=100.0)
    assert found.protocol["draws"] == draws


def test_until_of_one_document_does_not_select_draws_that_are_too_low() -> None:
    """Of 300 intervals of skewed nats, at least 88 % contain the mean, and the bias is small.

    Evaluation stops at about 21 draws. If it could stop at 4 draws, 82 % would contain the
    mean, and the mean bound would be 0.20 half widths too low. 21 draws without a stopping rule
    have 92 %. The standard deviations are 1.9 % and 0.03 half widths.
    """
    until = 0.57
    values = []
    covered = 0
    for seed in range(300):
        found = score(Exponential(), words(1, 1), until=until, seed=seed)
        low, high = found.monte_carlo_interval or (0.0, 0.0)
        covered += low <= 1.0 <= high
        values.append(found.nelbo_nats_per_token)
    assert covered >= 264
    assert (np.mean(values) - 1.0) / until > -0.12


def test_until_of_an_exact_likelihood_needs_one_draw() -> None:
    found = score(Unigram(LAW), words(6, 5), until=1e-9)
    assert found.protocol["draws"] == 1


@pytest.mark.parametrize("until", [0.0, -1.0, math.inf, math.nan])
def test_evaluate_refuses_a_half_width_that_is_not_positive(until: float) -> None:
    with pytest.raises(ArgumentError, match="until, half the width of the Monte-Carlo interval"):
        score(Unigram(LAW), words(6, 5), until=until)


def test_evaluate_refuses_zero_rows_and_zero_draws() -> None:
    objective = Known(processes()["masked"], constant(LAW))
    with pytest.raises(ArgumentError, match="0 rows"):
        score(objective, words(1, 3)[:0])
    with pytest.raises(ArgumentError, match="0 draws"):
        score(objective, words(2, 3), draws=0)


# ---------------------------------------------------------------------- with a network


class Mean(Backbone):
    """Backbone in which every valid position attends to all valid positions."""

    width = 8

    def __init__(self, num_states: int) -> None:
        super().__init__()
        self.table = nn.Embedding(num_states, self.width)

    def forward(self, ids: Tensor, t: Tensor, context: Context) -> Tensor:
        valid = torch.ones_like(ids, dtype=torch.bool) if context.valid is None else context.valid
        seen = self.table(ids) * valid.unsqueeze(-1)
        return torch.tanh(
            self.table(ids)
            + seen.sum(1, keepdim=True) / valid.sum(1)[:, None, None]
            + t.unsqueeze(-1)
        )


def network(process: ForwardProcess, loss: Any = None) -> DiffusionObjective:
    torch.manual_seed(0)
    backbone, head = Mean(process.vocabulary.num_states), TokenHead(process.vocabulary, Mean.width)
    denoiser = Denoiser(backbone, head).double().eval()
    for parameter in denoiser.parameters():
        nn.init.normal_(parameter)
    return DiffusionObjective(process, denoiser, loss or ElboLoss(), FlatTimes())


@pytest.mark.parametrize("name", NAMES)
def test_evaluation_batch_size_does_not_change_the_bound(name: str) -> None:
    """Results differ only by the order of float64 sums, within 1e-12."""
    scores = [
        score(network(processes()[name]), words(11, 5), batch=batch, draws=2)
        for batch in (1, 4, 64)
    ]
    for one in scores[1:]:
        assert one.nelbo_nats_per_token == pytest.approx(scores[0].nelbo_nats_per_token, abs=1e-12)
        assert one.interval == pytest.approx(scores[0].interval, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_padding_of_rows_does_not_change_the_evaluated_bound(name: str) -> None:
    """Noise does not depend on the length of the row, so longer padding changes nothing."""
    ids, num_valid, bounds = words(8, 9), torch.tensor([4, 2, 1, 4, 3, 4, 4, 2]), []
    for length, filler in ((4, 0), (4, 3), (9, 0), (9, 2)):
        padded = torch.where(torch.arange(length) < num_valid[:, None], ids[:, :length], filler)
        settings = {"batch_of": scored_rows(padded, num_valid), "length": length}
        bounds.append(score(network(processes()[name]), padded, **settings).nelbo_nats_per_token)
    assert bounds == pytest.approx([bounds[0]] * 4, abs=1e-12)


@pytest.mark.parametrize("name", NAMES)
def test_evaluated_bound_does_not_depend_on_the_training_loss(name: str) -> None:
    process, ids = processes()[name], words(8, 5)
    plain, clipped = network(process), network(process, ClippedLoss(largest=0.5))
    assert score(plain, ids) == score(clipped, ids)
    batch = full_rows(ids)(np.arange(8))
    rng, tokens = noise_of(batch.index), {"tokens": batch.scored.sum()}
    honest, steadier = (objective(batch, rng, tokens, 8) for objective in (plain, clipped))
    assert honest.loss.item() != steadier.loss.item()
    key = "nelbo_diffusion_nats_per_token"
    assert float(honest.metrics[key][0]) == pytest.approx(
        float(steadier.metrics[key][0]), abs=1e-12
    )
    assert honest.loss.item() == pytest.approx(
        float(honest.metrics[key][0] / honest.metrics[key][1]), abs=1e-12
    )


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("poison", [torch.nan, torch.inf])
def test_evaluate_raises_for_non_finite_network_output(name: str, poison: float) -> None:
    objective = network(processes()[name])
    with torch.no_grad():
        objective.denoiser.head.bias[1] = poison
    with pytest.raises(NonFiniteError, match="finite"):
        score(objective, words(8, 5))


def half_width(evaluation: Evaluation) -> float:
    assert evaluation.interval is not None
    return (evaluation.interval[1] - evaluation.interval[0]) / 2


def noise_of(index: Tensor) -> CounterRng:
    return CounterRng(0, 0, index, 5)


@pytest.mark.parametrize(("unit", "bound"), [("token", "NELBO"), ("symbol", "NLL")])
def test_evaluation_round_trips_through_to_dict_and_from_dict(unit: str, bound: str) -> None:
    objective = Known(processes()["masked"], constant(LAW))
    objective.bound = bound  # type: ignore[attr-defined]
    evaluation = score(objective, words(6, 5), unit=unit)
    written = json.loads(json.dumps(evaluation.to_dict()))
    assert written[f"{bound.lower()}_nats_per_{unit}"] == evaluation.nelbo_nats_per_token
    assert written[f"{unit}s"] == 30
    assert not [
        key
        for key in written
        if key != "unit" and ("token" if unit == "symbol" else "symbol") in key
    ]
    assert Evaluation.from_dict(written) == evaluation


def test_batch_without_scored_tokens_adds_nothing_to_the_means() -> None:
    means = TermMeans()
    means.add(BatchSums(np.array([6.0]), np.array([3]), {("term", "diffusion"): 6.0}))
    means.add(BatchSums(np.array([0.0]), np.array([0]), {("term", "diffusion"): 0.0}))
    assert means.compute("term") == {"diffusion": 2.0}
