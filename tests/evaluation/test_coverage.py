"""Coverage of every printed interval, on repeated toy data with a known truth.

Each experiment has 2,000 repeats. Four standard errors of a coverage of 95 % are 0.0195, so every
measured coverage must be between 0.93 and 0.97. `docs/evaluation.md` has the measured values, and
the smallest size of each. Experiments in other files: the bound of processes (`test_intervals`,
`test_interval_coverage`), draws until a width (`test_likelihood`), shares of several draws
(`test_judges`), and single runs of fields (`test_fields`).
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import pytest
from coverage import share_that_covers

from ddiff.evaluation.fields import JointEvaluation
from ddiff.evaluation.generation import GenerativePerplexity, MeanFigure, SampleFigures
from ddiff.evaluation.intervals import mean95, skewed95, student95
from ddiff.evaluation.judges import mean_value, share_right
from ddiff.evaluation.ngrams import repetition, sample_entropies
from ddiff.evaluation.ratio import RatioEstimate

Rng = np.random.Generator
Interval = tuple[float, float] | None
LEAST, MOST = 0.93, 0.97


def check(make_interval: Callable[[Rng], Interval], truth: float, repeats: int = 2000) -> None:
    found = share_that_covers(make_interval, truth, repeats)
    assert LEAST <= found <= MOST, found


# ---------------------------------------------------------------------- likelihood


def lognormal_documents(rng: Rng, count: int, draws: int) -> RatioEstimate:
    """Documents of very different lengths, which cost about 3 nats per token."""
    tokens = np.ceil(rng.lognormal(4.0, 1.0, count))
    nats = tokens * rng.normal(3.0, 0.3, count)
    noise = rng.gamma(4.0, 1.0, (count, draws)) - 4.0  # skewed, like few noise times
    return RatioEstimate.of(nats[:, None] + np.sqrt(tokens)[:, None] * noise, tokens)


@pytest.mark.parametrize("count", [2, 8, 30])
def test_bound_over_documents_of_unequal_lengths(count: int) -> None:
    def interval(rng: Rng) -> Interval:
        estimate = lognormal_documents(rng, count, draws=1)
        assert estimate.total is not None
        return estimate.total.around(estimate.mean)

    check(interval, 3.0)


@pytest.mark.parametrize(("count", "draws"), [(8, 2), (8, 16), (50, 2)])
def test_monte_carlo_interval_of_skewed_draws(count: int, draws: int) -> None:
    """The documents are the same in all repeats; only the draws differ."""
    tokens = np.ceil(np.random.default_rng(0).lognormal(4.0, 0.5, count))
    nats = 3.0 * tokens

    def interval(rng: Rng) -> Interval:
        noise = np.sqrt(tokens)[:, None] * (rng.gamma(4.0, 1.0, (count, draws)) - 4.0)
        estimate = RatioEstimate.of(nats[:, None] + noise, tokens)
        assert estimate.monte_carlo is not None
        return estimate.monte_carlo.around(estimate.mean)

    check(interval, 3.0)


@pytest.mark.parametrize("seeds", [2, 3, 5])
def test_mean_over_seeds(seeds: int) -> None:
    """`ddiff compare --seeds` uses Student's interval, which is that of `skewed95` without skew."""

    def interval(rng: Rng) -> Interval:
        nats = rng.normal(3.0, 0.02, seeds)
        error = float(nats.std(ddof=1)) / math.sqrt(seeds)
        return skewed95(float(nats.mean()), error, seeds - 1, 0.0)

    check(interval, 3.0)


# ---------------------------------------------------------------------- generated samples

WORDS = 64
ZIPF = 1.0 / np.arange(1, 201)


def draw_sample(rng: Rng) -> list[int]:
    """Tokens of one sample, whose concentration differs from that of other samples."""
    weights = ZIPF ** rng.uniform(0.8, 1.2)
    ids: list[int] = rng.choice(200, WORDS, p=weights / weights.sum()).tolist()
    return ids


@pytest.fixture(scope="module")
def pool() -> list[list[int]]:
    """Many samples, whose mean is the truth of samples that are drawn from them."""
    rng = np.random.default_rng(0)
    return [draw_sample(rng) for _ in range(4000)]


def measure_entropy(rows: list[list[int]]) -> np.ndarray:
    return sample_entropies(rows)


def measure_repeated_words(rows: list[list[int]]) -> np.ndarray:
    return repetition(rows, 1)


def measure_repeated_pairs(rows: list[list[int]]) -> np.ndarray:
    return repetition(rows, 2)


@pytest.mark.parametrize("count", [16, 64])
@pytest.mark.parametrize(
    "measure", [measure_entropy, measure_repeated_words, measure_repeated_pairs]
)
def test_entropy_and_repetition_of_samples(
    measure: Callable[[list[list[int]]], np.ndarray], count: int, pool: list[list[int]]
) -> None:
    values = measure(pool)

    def interval(rng: Rng) -> Interval:
        figure = MeanFigure.of(rng.choice(values, count))
        assert figure is not None
        return figure.interval

    check(interval, float(values.mean()))


@pytest.mark.parametrize("count", [16, 64])
@pytest.mark.parametrize(("trials", "mean"), [(64, 0.9), (64, 0.97), (40, 0.95)])
def test_self_correction_accuracy_and_known_words(count: int, trials: int, mean: float) -> None:
    """Shares of `trials` positions or words, whose probability differs from sample to sample."""

    def interval(rng: Rng) -> Interval:
        chances = rng.beta(30.0 * mean, 30.0 * (1.0 - mean), count)
        figure = MeanFigure.of(rng.binomial(trials, chances) / trials)
        assert figure is not None
        return figure.interval

    check(interval, mean)


@pytest.mark.parametrize("count", [4, 16, 64])
def test_corpus_perplexity_of_samples_of_unequal_lengths(count: int) -> None:
    entropy = MeanFigure(1.0, None, count)

    def interval(rng: Rng) -> Interval:
        tokens = rng.integers(20, 200, count)
        nats = tokens * rng.normal(4.0, 0.4, count)
        return GenerativePerplexity.of(nats, tokens, entropy).corpus_interval

    check(interval, math.exp(4.0))


@pytest.mark.parametrize(("count", "deviation"), [(16, 0.3), (64, 0.6)])
def test_mean_perplexity_of_samples(count: int, deviation: float) -> None:
    """Perplexities of samples are lognormal; the larger their deviation, the more are needed."""

    def interval(rng: Rng) -> Interval:
        return mean95(np.exp(4.0 + deviation * rng.normal(size=count)))

    check(interval, math.exp(4.0 + deviation**2 / 2.0))


def test_self_bleu_has_no_interval_because_samples_are_references_of_each_other() -> None:
    rng = np.random.default_rng(0)
    ids = [draw_sample(rng) for _ in range(8)]
    found = SampleFigures.of([" "] * 8, ids, unit="symbol")
    assert found.self_bleu is not None
    assert found.self_bleu.interval is None


# ---------------------------------------------------------------------- judged samples


@pytest.mark.parametrize("count", [5, 20, 100])
def test_share_of_right_samples_for_random_probabilities(count: int) -> None:
    """The coverage of a single probability moves around 95 %, as that of every interval of shares.

    The probability is therefore uniform, and the interval of the difference must contain 0.
    """

    def interval(rng: Rng) -> Interval:
        chance = rng.random()
        found = share_right("right", rng.random(count) < chance).interval
        assert found is not None
        return found[0] - chance, found[1] - chance

    check(interval, 0.0)


@pytest.mark.parametrize(("count", "width"), [(16, 1), (16, 8), (100, 1)])
def test_mean_squared_error_of_judged_vectors(count: int, width: int) -> None:
    """Squared errors of normal vectors with `width` numbers are the most skewed of all figures."""

    def interval(rng: Rng) -> Interval:
        return mean_value("error", rng.chisquare(width, count)).interval

    check(interval, float(width))


# ---------------------------------------------------------------------- several fields


@pytest.mark.parametrize(("count", "width"), [(16, 1), (16, 8), (100, 8)])
def test_bound_of_samples_of_several_fields(count: int, width: int) -> None:
    """Nats of a vector of `width` numbers and of a text. Each sample counts once."""

    def interval(rng: Rng) -> Interval:
        nats = 0.5 * rng.chisquare(width, count) + rng.gamma(4.0, 0.5, count)
        estimate = RatioEstimate.of(nats[:, None], np.ones(count))
        assert estimate.total is not None
        return estimate.total.around(estimate.mean)

    check(interval, 0.5 * width + 2.0)


@pytest.mark.parametrize("count", [16, 100])
def test_bound_per_token_of_texts_of_unequal_lengths_through_a_latent(count: int) -> None:
    """Rate plus distortion per token: the rate does not grow with the length of the text."""

    def interval(rng: Rng) -> Interval:
        tokens = rng.integers(8, 33, count).astype(np.float64)
        nats = 0.5 * rng.chisquare(8.0, count) + rng.normal(2.0, 0.3, count) * tokens
        estimate = RatioEstimate.of(nats[:, None], tokens)
        assert estimate.total is not None
        return estimate.total.around(estimate.mean)

    check(interval, 4.0 / 20.0 + 2.0)


def evaluation_of(scores: np.ndarray, partners: np.ndarray | None = None) -> JointEvaluation:
    mean = float(scores.mean())
    table = scores[:, None]
    return JointEvaluation("path", mean, None, None, len(scores), {}, table, partners)


@pytest.mark.parametrize("count", [16, 100])
def test_paired_difference_to_noisy_given_fields(count: int) -> None:
    """Both bounds of a sample share most of their differences between samples."""

    def interval(rng: Rng) -> Interval:
        shared = rng.gamma(2.0, 5.0, count)
        bound = evaluation_of(shared)
        noisy = evaluation_of(shared + 0.5 * rng.chisquare(2.0, count))
        return bound.subtract_from(noisy)[1]

    check(interval, 1.0)


@pytest.mark.parametrize(("count", "width"), [(50, 1), (200, 1), (16, 8), (100, 8)])
def test_paired_difference_to_shuffled_given_fields(count: int, width: int) -> None:
    """A vector is scored by its squared distance to a given vector, its own or that of another.

    Two differences share each given vector. For vectors of one number, 50 samples are needed.
    """
    partners = np.roll(np.arange(count), 1)

    def interval(rng: Rng) -> Interval:
        given = rng.standard_normal((count, width))
        values = given + 0.5 * rng.standard_normal((count, width))
        own = 2.0 * ((values - given) ** 2).sum(-1)
        others = 2.0 * ((values - given[partners]) ** 2).sum(-1)
        return evaluation_of(own).subtract_from(evaluation_of(others, partners))[1]

    check(interval, 4.0 * width)


def test_paired_difference_to_shuffled_words() -> None:
    """A digit has the probability 0.9 given its word, and 0.1 without a word, for half of them.

    With differences that count as independent, the coverage would be 0.85.
    """
    count = 50
    partners = np.roll(np.arange(count), 1)
    right, wrong, without = -math.log(0.9), -math.log(0.1 / 9.0), math.log(10.0)

    def score(digits: np.ndarray, words: np.ndarray) -> np.ndarray:
        return np.where(words < 0, without, np.where(digits == words, right, wrong))

    def interval(rng: Rng) -> Interval:
        digits = rng.integers(0, 10, count)
        words = np.where(rng.random(count) < 0.5, digits, -1)
        shuffled = evaluation_of(score(digits, words[partners]), partners)
        return evaluation_of(score(digits, words)).subtract_from(shuffled)[1]

    check(interval, 0.5 * 0.9 * (wrong - right))


# ---------------------------------------------------------------------- skewness


def test_interval_without_skewness_is_that_of_student() -> None:
    for skewness in (0.0, 1e-12, -1e-12):
        low, high = skewed95(2.0, 0.5, 7.0, skewness)
        assert low == pytest.approx(2.0 - 0.5 * student95(7.0), rel=1e-9)
        assert high == pytest.approx(2.0 + 0.5 * student95(7.0), rel=1e-9)


@pytest.mark.parametrize("skewness", [-1.5, -0.2, 1e-6, 0.4, 2.0])
def test_limits_of_a_skewed_interval_solve_their_equation(skewness: float) -> None:
    """At the limits, g(T) is the positive and the negative quantile, up to rounding."""
    low, high = skewed95(2.0, 0.5, 7.0, skewness)
    assert low < high
    for limit, quantile in ((low, student95(7.0)), (high, -student95(7.0))):
        t = (2.0 - limit) / 0.5
        value = t + skewness * (t**2 / 3.0 + 1.0 / 6.0) + skewness**2 * t**3 / 27.0
        assert value == pytest.approx(quantile, rel=1e-6)


def test_interval_of_a_mean_reaches_further_to_the_side_of_the_tail() -> None:
    values = np.array([1.0, 1.1, 0.9, 1.2, 9.0])
    low, high = mean95(values) or (0.0, 0.0)
    mean = float(values.mean())
    assert high - mean > mean - low
    mirrored = mean95(-values)
    assert mirrored == pytest.approx((-high, -low))
