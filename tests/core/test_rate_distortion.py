"""Rate plus distortion: exact values with exact predictions, planted faults, and refusals."""

from __future__ import annotations

import math

import pytest
import torch
from exact_fields import (
    LOG_SNR,
    MEAN,
    PROBABILITY,
    SPREAD,
    VOCABULARY,
    Terms,
    exact_network,
    expected_terms,
    make_fields,
    tau_nodes,
)

from ddiff.core.clock import LogTimeClock
from ddiff.core.field import Field, Fields
from ddiff.core.fields import joint_nelbo
from ddiff.core.path_coverage import require_trained
from ddiff.core.paths import HeldAt, Leg, LegPath, Path, given_path, shared_path
from ddiff.core.rate_distortion import rate_distortion_paths
from ddiff.core.rng import CounterRng
from ddiff.core.times import FlatTimes, WindowTimes
from ddiff.core.training_paths import IndependentTimes, MixedPaths
from ddiff.core.tree import TreeProcess
from ddiff.errors import ArgumentError

NAMES = ["text", "latent"]
ENTROPY_OF_TEXT = float(-(PROBABILITY * PROBABILITY.log()).sum())
# The schedule then ends with a signal, so the closing term is large.
EARLY_END = -1.0


def expected(path: Path, fields: Fields) -> Terms:
    """Return the exact terms for latents that are functions of the text, f(x) = MEAN[x]."""
    return expected_terms(path, *tau_nodes(24, 8), 24, fields, spread=0.0)


def rate_and_distortion(fields: Fields, deviation: float) -> tuple[Terms, Terms]:
    paths = rate_distortion_paths(fields, "text", "latent", deviation)
    return expected(paths.rate, fields), expected(paths.distortion, fields)


def divergence_from_prior(a: float, sigma: float) -> tuple[float, float]:
    """Return the means over x of KL( N(a f(x), sigma^2) || p(z_t) ) and of its normal prior.

    p(z_t) is the exact marginal of the number, a mixture of normals.
    """
    z = torch.linspace(-12.0, 12.0, 48001, dtype=torch.float64)
    step = float(z[1] - z[0])
    wide = math.sqrt(a**2 * SPREAD**2 + sigma**2)

    def normal(mean: float, deviation: float) -> torch.Tensor:
        scale = deviation * math.sqrt(2.0 * math.pi)
        return torch.exp(-0.5 * ((z - mean) / deviation) ** 2) / scale

    marginal = sum(p * normal(a * float(m), wide) for p, m in zip(PROBABILITY, MEAN))
    to_marginal = 0.0
    to_normal = 0.0
    for p, m in zip(PROBABILITY.tolist(), MEAN.tolist()):
        q = normal(a * m, sigma)
        log_q = q.clamp(min=1e-300).log()
        to_marginal += p * float((q * (log_q - marginal.clamp(min=1e-300).log())).sum()) * step
        to_normal += (
            p * float((q * (log_q - normal(0.0, 1.0).clamp(min=1e-300).log())).sum()) * step
        )
    return to_marginal, to_normal


def exact_value(deviation: float, process) -> float:
    """Return -ln p(x) + KL( q(z|x) || p(z|x) ), and the loss by the prior of sampling."""
    ratio = deviation**2 / (SPREAD**2 + deviation**2)
    gap = 0.5 * (ratio - 1.0 - math.log(ratio))
    end = torch.ones(1, dtype=torch.float64)
    to_marginal, to_normal = divergence_from_prior(
        float(process.signal(end)), float(process.deviation(end))
    )
    return ENTROPY_OF_TEXT + gap + to_normal - to_marginal


@pytest.mark.parametrize("deviation", [0.2, 1.0])
@pytest.mark.parametrize("smallest", [-LOG_SNR, EARLY_END])
def test_rate_plus_distortion_has_its_exact_value_with_exact_predictions(
    deviation: float, smallest: float
) -> None:
    fields = make_fields(smallest)
    rate, distortion = rate_and_distortion(fields, deviation)
    found = rate["latent"]["diffusion"] + rate["latent"]["closing"]
    found += sum(distortion["text"].values())
    assert found == pytest.approx(exact_value(deviation, fields["latent"].process), abs=1e-6)
    assert found > ENTROPY_OF_TEXT
    assert not any(distortion["latent"].values())
    assert not any(rate["text"].values())


def test_text_given_its_own_clean_latent_is_below_the_truth() -> None:
    """Planted fault: without a rate, the latent tells about the text for nothing."""
    given = given_path(shared_path(NAMES), {"latent": "clean"})
    faulty = sum(expected(given, make_fields())["text"].values())
    assert faulty < ENTROPY_OF_TEXT - 0.3


def test_rate_without_its_closing_term_is_below_the_truth() -> None:
    """Planted fault, with a schedule that ends with a signal and a latent with much noise."""
    rate, distortion = rate_and_distortion(make_fields(EARLY_END), 1.4)
    faulty = rate["latent"]["diffusion"] + sum(distortion["text"].values())
    assert faulty < ENTROPY_OF_TEXT - 0.01
    assert faulty + rate["latent"]["closing"] > ENTROPY_OF_TEXT


def test_latent_is_held_where_the_rate_starts() -> None:
    for rule in (FlatTimes(), FlatTimes(0.01, 0.9)):
        fields = dict(make_fields())
        fields["latent"] = Field(fields["latent"].process, rule, 1)
        paths = rate_distortion_paths(fields, "text", "latent", 0.5)
        tau = torch.zeros(1, dtype=torch.float64)
        # Both times are found by bisection, to about the resolution of float64.
        held = float(paths.distortion.at(fields, tau)["latent"].t)
        assert float(paths.rate.at(fields, tau)["latent"].t) == pytest.approx(held, abs=1e-14)
        assert paths.distortion.legs["latent"] == HeldAt(0.5)
        assert held == paths.time
        time = torch.tensor([paths.time], dtype=torch.float64)
        assert float(fields["latent"].process.snr(time)) == pytest.approx(0.5**-2, rel=1e-6)


def test_field_held_at_a_time_has_one_state_in_all_terms() -> None:
    number = make_fields()["latent"].process
    # A window of times has a decoding term, so the network is evaluated twice.
    rule = FlatTimes(0.1, 0.9)
    tokens = TreeProcess(VOCABULARY, LogTimeClock((1.0,)))
    fields = {"text": Field(tokens, rule, 2), "latent": Field(number, FlatTimes(), 1)}
    states = []

    def network(state):
        states.append(state["latent"].zt)
        assert not state["latent"].clean.any()
        assert (state["latent"].t == number.time_of_deviation(0.4)).all()
        return exact_network(fields)(state)

    path = LegPath({"text": Leg(0.0, 1.0), "latent": HeldAt(0.4)})
    slot = torch.arange(3)
    x0 = {"text": torch.zeros(3, 2).long(), "latent": torch.ones(3, 1, 1).double()}
    scored = {"text": torch.ones(3, 2).bool(), "latent": torch.ones(3, 1).bool()}
    joint_nelbo(fields, network, x0, scored, path, CounterRng(0, 0, slot, 1), slot, 3)
    assert len(states) > 1
    assert all(torch.equal(state, states[0]) for state in states)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("text", "image", 0.5), '"image" must be one of the fields text, latent'),
        (("latent", "text", 0.5), "latent must be another field than text, with a Gaussian"),
        (("latent", "latent", 0.5), "latent must be another field than text"),
        (("text", "latent", 0.0), "deviation must lie between"),
        (("text", "latent", math.nan), "deviation must lie between"),
    ],
)
def test_rate_distortion_refuses_impossible_arguments(arguments, message: str) -> None:
    with pytest.raises(ArgumentError, match=message):
        rate_distortion_paths(make_fields(), *arguments)


def test_rate_distortion_refuses_windows_of_vectors() -> None:
    fields = dict(make_fields())
    fields["latent"] = Field(fields["latent"].process, WindowTimes(1), 2)
    with pytest.raises(ArgumentError, match='the time rule of "latent" has windows'):
        rate_distortion_paths(fields, "text", "latent", 0.5)


def test_noisy_holds_are_refused_unless_training_has_them() -> None:
    paths = rate_distortion_paths(make_fields(), "text", "latent", 0.5)
    shared = shared_path(NAMES)
    mixed = MixedPaths([(shared, 0.5), (given_path(shared, {"latent": "clean"}), 0.5)])
    for trained in (shared, mixed):
        with pytest.raises(ArgumentError, match=r"latent has noise of deviation 0\.5.*independent"):
            require_trained(paths.distortion, trained, "evaluate")
    require_trained(paths.distortion, IndependentTimes(NAMES), "evaluate")
    require_trained(paths.distortion, MixedPaths([(paths.distortion, 1.0)]), "evaluate")
    require_trained(paths.rate, IndependentTimes(NAMES), "evaluate")
    other = rate_distortion_paths(make_fields(), "text", "latent", 0.4).distortion
    with pytest.raises(ArgumentError, match=r"noisy = \{latent = 0\.5\}"):
        require_trained(paths.distortion, other, "evaluate")


@pytest.mark.parametrize("deviation", [-0.1, 0.0, math.inf, math.nan])
def test_leg_path_refuses_a_hold_with_an_impossible_deviation(deviation: float) -> None:
    with pytest.raises(ArgumentError, match="must have a finite deviation above 0"):
        LegPath({"text": Leg(0.0, 1.0), "latent": HeldAt(deviation)})


@pytest.mark.parametrize(
    ("path", "message"),
    [
        ({"text": HeldAt(0.4), "latent": Leg(0.0, 1.0)}, '"text" has tokens'),
        ({"text": Leg(0.0, 1.0), "latent": HeldAt(1e-30)}, 'noise of "latent": deviation must lie'),
    ],
)
def test_leg_path_refuses_noise_that_a_field_cannot_have(path, message: str) -> None:
    tau = torch.zeros(1, dtype=torch.float64)
    with pytest.raises(ArgumentError, match=message):
        LegPath(path).at(make_fields(), tau)
