"""Evaluation of several fields: intervals cover the truth, and impossible targets are refused."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from exact_fields import BITS, MEAN, PROBABILITY, SPREAD
from exact_objective import ExactObjective
from torch import Tensor

from ddiff.core.paths import LegPath, first_path, given_path, shared_path
from ddiff.core.training_paths import IndependentTimes, MixedPaths
from ddiff.data.fields_batch import FieldsBatch, token_field, vector_field
from ddiff.errors import ArgumentError
from ddiff.evaluation.fields import (
    evaluate_fields,
    evaluate_rate_distortion,
)
from ddiff.evaluation.ratio import error_of_partners

SAMPLES = 200
SHARED = shared_path(["text", "latent"])


def draw_samples() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    chosen = torch.multinomial(PROBABILITY, SAMPLES, True, generator=generator)
    noise = torch.randn(SAMPLES, generator=generator, dtype=torch.float64)
    return chosen, MEAN[chosen] + SPREAD * noise


def batch_of(numbers: np.ndarray) -> FieldsBatch:
    chosen, number = draw_samples()
    fields = {
        "text": token_field(BITS[chosen[numbers]]),
        "latent": vector_field(number[numbers].reshape(-1, 1, 1)),
    }
    return FieldsBatch(fields, torch.from_numpy(numbers))


def true_nats() -> tuple[float, float]:
    """Return the means over the samples of -ln p(x, z) and of -ln p(z | x)."""
    chosen, number = draw_samples()
    deviation = (number - MEAN[chosen]) / SPREAD
    given = 0.5 * deviation**2 + math.log(SPREAD) + 0.5 * math.log(2.0 * math.pi)
    return float((given - PROBABILITY[chosen].log()).mean()), float(given.mean())


@pytest.mark.parametrize("name", ["shared", "latent first"])
def test_monte_carlo_interval_covers_the_likelihood_of_the_samples(name: str) -> None:
    """One interval of 95 % per path and a fixed seed; both cover."""
    path = SHARED if name == "shared" else first_path(["latent", "text"])
    found = evaluate_fields(ExactObjective(), batch_of, SAMPLES, path, draws=8)
    joint, _ = true_nats()
    low, high = found.monte_carlo_interval
    assert low < joint < high
    assert high - low < 0.8
    total = sum(field.nats_per_item * field.items for field in found.fields.values())
    assert total / SAMPLES == pytest.approx(found.nats_per_sample, rel=1e-12)


def test_evaluation_of_a_conditional_reports_the_moving_field_only() -> None:
    path = given_path(SHARED, {"text": "clean"})
    found = evaluate_fields(ExactObjective(), batch_of, SAMPLES, path, draws=8)
    assert set(found.fields) == {"latent"}
    _, given = true_nats()
    low, high = found.monte_carlo_interval
    assert low < given < high
    assert found.fields["latent"].items == SAMPLES


def test_evaluation_in_data_units_adds_the_volume_per_vector() -> None:
    path = given_path(SHARED, {"text": "clean"})
    plain = evaluate_fields(ExactObjective(), batch_of, 20, path, draws=1)
    scaled = evaluate_fields(
        ExactObjective(), batch_of, 20, path, draws=1, volumes={"latent": math.log(3.0)}
    )
    assert scaled.nats_per_sample == pytest.approx(plain.nats_per_sample + math.log(3.0))


def test_evaluation_does_not_depend_on_the_batch_size() -> None:
    one = evaluate_fields(ExactObjective(), batch_of, 20, SHARED, draws=2, batch=20)
    other = evaluate_fields(ExactObjective(), batch_of, 20, SHARED, draws=2, batch=3)
    assert other.nats_per_sample == pytest.approx(one.nats_per_sample, rel=1e-12)


@pytest.mark.parametrize(
    ("path", "message"),
    [
        (IndependentTimes(["text", "latent"]), "independent times of the fields"),
        (MixedPaths([(SHARED, 1.0)]), "mixture of paths is for training only"),
    ],
)
def test_evaluation_refuses_rules_that_have_no_bound(path: Any, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        evaluate_fields(ExactObjective(), batch_of, 2, path)


def test_evaluation_refuses_no_samples_and_no_draws() -> None:
    with pytest.raises(ArgumentError, match="got 0 samples"):
        evaluate_fields(ExactObjective(), batch_of, 0, SHARED)
    with pytest.raises(ArgumentError, match="0 draws"):
        evaluate_fields(ExactObjective(), batch_of, 2, LegPath(SHARED.legs), draws=0)


# ---------------------------------------------------------------------- rate plus distortion


def batch_with_computed_latents(numbers: np.ndarray) -> FieldsBatch:
    """Return texts whose latent is a function of the text, f(x) = MEAN[x]."""
    chosen, _ = draw_samples()
    latent = MEAN[chosen[numbers]].reshape(-1, 1, 1)
    fields = {"text": token_field(BITS[chosen[numbers]]), "latent": vector_field(latent)}
    return FieldsBatch(fields, torch.from_numpy(numbers))


@pytest.mark.parametrize("deviation", [0.3, 1.0])
def test_rate_plus_distortion_covers_its_exact_value_above_the_truth(deviation: float) -> None:
    """With exact predictions the bound is -ln p(x) + KL( N(f, s^2) || N(f, SPREAD^2 + s^2) )."""
    found = evaluate_rate_distortion(
        ExactObjective(), batch_with_computed_latents, 100, "text", "latent", deviation, draws=16
    )
    chosen = draw_samples()[0][:100]
    truth = float(-PROBABILITY[chosen].log().mean())
    ratio = deviation**2 / (SPREAD**2 + deviation**2)
    exact = truth + 0.5 * (ratio - 1.0 - math.log(ratio))
    low, high = found.monte_carlo_interval
    assert low < exact < high
    assert high - low < 1.2
    assert found.rate + found.distortion == pytest.approx(found.nats_per_sample, rel=1e-12)
    assert found.tokens == 200
    assert found.nats_per_token == pytest.approx(found.nats_per_sample / 2.0, rel=1e-12)
    assert found.rate > 0.0


def test_rate_plus_distortion_is_refused_if_noisy_latents_were_not_trained() -> None:
    objective = ExactObjective()
    objective.path = given_path(SHARED, {"latent": "clean"})
    with pytest.raises(ArgumentError, match="evaluate_rate_distortion, rate: the path needs"):
        evaluate_rate_distortion(objective, batch_of, 2, "text", "latent", 0.5)
    prior = given_path(SHARED, {"text": "prior"})
    objective.path = MixedPaths([(SHARED, 0.5), (prior, 0.5)])
    with pytest.raises(ArgumentError, match="evaluate_rate_distortion, distortion: the path"):
        evaluate_rate_distortion(objective, batch_of, 2, "text", "latent", 0.5)


def test_rate_plus_distortion_refuses_samples_without_one_of_the_fields() -> None:
    def lacking(numbers: np.ndarray) -> FieldsBatch:
        batch = batch_of(numbers)
        latent = batch.fields["latent"]._replace(absent=torch.ones(len(numbers)).bool())
        return FieldsBatch({**batch.fields, "latent": latent}, batch.index)

    with pytest.raises(ArgumentError, match='every sample must have the field "latent"'):
        evaluate_rate_distortion(ExactObjective(), lacking, 2, "text", "latent", 0.5)


# ---------------------------------------------------------------------- fields of other samples


def test_error_of_partners_is_not_below_that_of_independent_differences() -> None:
    rng = np.random.default_rng(0)
    for count in (2, 3, 4, 20):
        values = rng.normal(size=count)
        found = error_of_partners(values, np.roll(np.arange(count), 1))
        assert found is not None
        assert found.standard >= values.std(ddof=1) / math.sqrt(count) * (1.0 - 1e-12)
        assert found.freedom >= 1.0
    assert error_of_partners(np.ones(1), np.zeros(1, np.int64)) is None
