"""Bound of several fields along paths: independence of the path, conditional bounds and draws."""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import pytest
import torch
from exact_fields import (
    BITS,
    ENTROPY,
    LOG_SNR,
    MEAN,
    PROBABILITY,
    SPREAD,
    VOCABULARY,
    Terms,
    exact_network,
    expected_bound,
    expected_terms_at_independent_times,
)
from torch import Tensor

from ddiff.core.clock import LogTimeClock
from ddiff.core.elbo import nelbo
from ddiff.core.field import Field, Fields
from ddiff.core.fields import JointNoisy, hold, joint_nelbo
from ddiff.core.gaussian import GaussianProcess
from ddiff.core.gaussian_schedule import CosineVP
from ddiff.core.paths import (
    Hold,
    Leg,
    LegPath,
    Path,
    first_path,
    given_path,
    lagged_path,
    shared_path,
)
from ddiff.core.prediction import DenseDistribution
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, Noisy, WindowTimes
from ddiff.core.tree import TreeProcess

NAMES = ["text", "latent"]
PATHS: dict[str, Path] = {
    "shared": shared_path(NAMES),
    "shared, latent bent": LegPath({name: Leg(0.0, 1.0) for name in NAMES}, {"latent": 2.0}),
    "text ahead": lagged_path("text", "latent"),
    "latent ahead": lagged_path("latent", "text"),
    "text first": first_path(["text", "latent"]),
    "latent first": first_path(["latent", "text"]),
}
ENTROPY_OF_TEXT = float(-(PROBABILITY * PROBABILITY.log()).sum())
# Expectation of the terms at independent times, for the constants of exact_fields.py.
AT_INDEPENDENT_TIMES = 2.138564


def sum_of(terms: Terms, *names: str) -> float:
    return sum(value for name in names for value in terms[name].values())


@pytest.fixture(scope="module")
def bounds() -> dict[str, Terms]:
    """Return the exact expectations of the terms along every path of `PATHS`."""
    return {name: expected_bound(path) for name, path in PATHS.items()}


@pytest.mark.parametrize("name", PATHS)
def test_exact_predictions_give_the_entropy_on_every_path(
    bounds: dict[str, Terms], name: str
) -> None:
    assert sum_of(bounds[name], *NAMES) == pytest.approx(ENTROPY, abs=1e-6)


def test_fields_share_the_entropy_differently_on_different_paths(bounds: dict[str, Terms]) -> None:
    """The text costs more nats if it is sampled before the latent."""
    of_text = {name: sum_of(terms, "text") for name, terms in bounds.items()}
    assert of_text["latent first"] < of_text["shared"] < of_text["text first"]
    assert of_text["text first"] - of_text["latent first"] > 0.5


def test_text_first_is_nelbo_of_text_plus_nelbo_of_latent_given_text(
    bounds: dict[str, Terms],
) -> None:
    of_number = 0.5 * math.log(2.0 * math.pi * math.e * SPREAD**2)
    assert sum_of(bounds["text first"], "text") == pytest.approx(ENTROPY_OF_TEXT, abs=1e-6)
    assert sum_of(bounds["text first"], "latent") == pytest.approx(of_number, abs=1e-6)


def test_latent_first_is_entropy_of_latent_plus_that_of_text_given_latent(
    bounds: dict[str, Terms],
) -> None:
    number = torch.linspace(-7.0, 7.0, 20001, dtype=torch.float64)
    distance = (number.unsqueeze(-1) - MEAN) / SPREAD
    density = torch.exp(-0.5 * distance**2) / (SPREAD * math.sqrt(2.0 * math.pi)) @ PROBABILITY
    of_number = float(-(density * density.log()).sum() * (number[1] - number[0]))
    assert sum_of(bounds["latent first"], "latent") == pytest.approx(of_number, abs=1e-6)
    assert sum_of(bounds["latent first"], "text") == pytest.approx(ENTROPY - of_number, abs=1e-6)


def test_terms_at_independent_times_are_below_the_entropy() -> None:
    total = sum_of(expected_terms_at_independent_times(), *NAMES)
    assert total == pytest.approx(AT_INDEPENDENT_TIMES, abs=1e-6)
    assert total < ENTROPY - 0.018


# ---------------------------------------------------------------------- random draws


def random_fields(latent_tokens: int = 16) -> Fields:
    """Return the fields of `exact_fields`, with random states and the rules of a recipe."""
    number = GaussianProcess(CosineVP(), 1, LOG_SNR / 3.0)
    tokens = TreeProcess(VOCABULARY, LogTimeClock((1.0,)))
    return {
        "text": Field(tokens, FlatTimes(tokens=2), 2),
        "latent": Field(number, FlatTimes(tokens=latent_tokens), 1),
    }


def draw_data(count: int) -> dict[str, Tensor]:
    """Draw samples of tokens and a number from their joint distribution."""
    generator = np.random.default_rng(5)
    kind = torch.from_numpy(generator.choice(4, count, p=PROBABILITY.numpy()))
    noise = torch.from_numpy(generator.standard_normal(count))
    return {"text": BITS[kind], "latent": (MEAN[kind] + SPREAD * noise).reshape(-1, 1, 1)}


def all_scored(x0: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return {
        "text": torch.ones_like(x0["text"], dtype=torch.bool),
        "latent": torch.ones(len(x0["latent"]), 1, dtype=torch.bool),
    }


def draw_terms(path: Path, count: int = 3000, **options):
    fields = random_fields()
    x0 = draw_data(count)
    slot = torch.arange(count)
    rng = CounterRng(3, 0, slot, 1)
    scored = options.pop("scored", all_scored(x0))
    network = exact_network(fields)
    return joint_nelbo(fields, network, x0, scored, path, rng, slot, count, **options)


@pytest.mark.parametrize("name", ["shared", "text ahead", "latent first"])
def test_random_draws_estimate_the_entropy(name: str) -> None:
    terms = draw_terms(PATHS[name], 6000)
    total = terms["text"].total + terms["latent"].total
    error = float(total.std()) / math.sqrt(len(total))
    assert error < 0.15
    assert float(total.mean()) == pytest.approx(ENTROPY, abs=4.0 * error)


def test_draws_of_part_of_a_batch_are_those_of_the_whole() -> None:
    fields = random_fields()
    x0 = draw_data(32)
    scored = all_scored(x0)
    network = exact_network(fields)

    def terms_of(slot: Tensor):
        part = {name: values[slot] for name, values in x0.items()}
        marks = {name: values[slot] for name, values in scored.items()}
        rng = CounterRng(3, 0, slot, 1)
        return joint_nelbo(fields, network, part, marks, PATHS["shared"], rng, slot, 32)

    whole = terms_of(torch.arange(32))
    part = terms_of(torch.arange(20, 32))
    for name in NAMES:
        torch.testing.assert_close(part[name].total, whole[name].total[20:], rtol=1e-12, atol=1e-12)


def test_absent_field_adds_nothing_and_is_marked_in_every_evaluation() -> None:
    missing = torch.arange(200) % 2 == 0
    terms = draw_terms(PATHS["shared"], 200, absent={"latent": missing})
    assert not terms["latent"].total[missing].any()
    assert (terms["latent"].decoding[~missing] != 0).all()
    assert terms["latent"].noisy.absent is not None
    assert torch.equal(terms["latent"].noisy.absent, missing)


def test_field_at_the_prior_is_never_absent() -> None:
    """A sample without the field has the same target as all others: the field at its prior."""
    path = given_path(PATHS["shared"], {"latent": "prior"})
    fields = random_fields()
    x0 = draw_data(200)
    slot = torch.arange(200)
    missing = slot % 2 == 0
    scored = all_scored(x0)
    scored["latent"] = scored["latent"] & ~missing.unsqueeze(-1)
    exact = exact_network(fields)
    seen = []

    def network(state: JointNoisy):
        seen.append(state["latent"])
        return exact(state)

    rng = CounterRng(3, 0, slot, 1)
    terms = joint_nelbo(fields, network, x0, scored, path, rng, slot, 200, {"latent": missing})
    assert seen
    for latent in seen:
        assert latent.absent is None
        assert not latent.clean.any()
        assert bool((latent.t == 1.0).all())
    assert not terms["latent"].total.any()
    # Values and presence of the latent change nothing.
    complete = draw_terms(path, 200)
    assert torch.equal(terms["text"].total, complete["text"].total)


def test_positions_that_are_not_scored_add_nothing_and_stay_clean() -> None:
    x0 = draw_data(200)
    scored = all_scored(x0)
    scored["text"][:, 0] = False
    terms = draw_terms(PATHS["shared"], 200, scored=scored)
    for term in (terms["text"].closing, terms["text"].diffusion, terms["text"].decoding):
        assert not term[:, 0].any()
    assert terms["text"].noisy.clean[:, 0].all()
    assert torch.equal(terms["text"].noisy.zt[:, 0], x0["text"][:, 0])


def test_text_given_latent_is_below_text_alone() -> None:
    """Their difference is the information of the latent about the text."""
    legs: dict[str, Leg | Hold] = {"text": Leg(0.0, 1.0), "latent": "clean"}
    given = draw_terms(LegPath(legs))
    alone = draw_terms(LegPath({**legs, "latent": "prior"}))
    assert not given["latent"].total.any()
    difference = alone["text"].total - given["text"].total
    assert float(difference.mean()) > 0.3


def test_conditional_bound_of_given_path_is_that_of_the_second_leg(
    bounds: dict[str, Terms],
) -> None:
    given = expected_bound(given_path(first_path(["latent", "text"]), {"latent": "clean"}))
    assert sum_of(given, "latent") == 0.0
    assert sum_of(given, "text") == pytest.approx(sum_of(bounds["latent first"], "text"), abs=1e-6)


# ---------------------------------------------------------------------- single fields


@pytest.mark.parametrize(
    "rule", [FlatTimes(tokens=2), WindowTimes(1), WindowTimes(2, "slide", paired=False)]
)
def test_single_field_has_the_bits_of_a_recipe_without_fields(rule) -> None:
    process = TreeProcess(VOCABULARY, LogTimeClock((1.0,)))
    fields: Fields = {"text": Field(process, rule, 4)}
    x0 = torch.arange(32).reshape(8, 4) % 2
    scored = torch.ones_like(x0, dtype=torch.bool)
    slot = torch.arange(8)
    rng = CounterRng(7, 2, slot, 4)

    def text(noisy: Noisy):
        def query(rows, node, fn, *per_row):
            even = torch.full((len(rows), 2), -math.log(2.0), dtype=torch.float64)
            return fn(DenseDistribution(even, VOCABULARY), *per_row)

        return query

    plain = nelbo(process, text, x0, scored, rule, rng, slot, 8)
    joint = joint_nelbo(
        fields,
        lambda state: {"text": text(state["text"])},
        {"text": x0},
        {"text": scored},
        LegPath({"text": Leg(0.0, 1.0)}),
        rng,
        slot,
        8,
    )["text"]
    for term in ("closing", "diffusion", "decoding"):
        assert torch.equal(getattr(joint, term), getattr(plain, term))


def test_hold_keeps_the_other_fields_fixed() -> None:
    fields = random_fields()
    seen = []

    def network(state):
        seen.append(state)
        return {"text": "query of text", "latent": "query of latent"}

    zeros = torch.zeros(2, 1, dtype=torch.float64)
    nowhere = torch.zeros(2, 1, dtype=torch.bool)
    state = {name: Noisy(zeros, zeros, nowhere) for name in fields}
    moved = Noisy(zeros + 1.0, zeros, nowhere)
    assert hold(network, state, "text")(moved) == "query of text"
    assert seen[0]["text"] is moved
    assert seen[0]["latent"] is state["latent"]
