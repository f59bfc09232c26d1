"""Information time tau: the share of information on the token that is lost at noise time t.

Noise times are drawn so that estimates of the bound have little variance.
"""

from __future__ import annotations

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.components import MixtureProcess
from ddiff.core.dense import DenseProcess
from ddiff.core.information import IdentityTime, MonotoneMap
from ddiff.core.prediction import DenseDistribution
from ddiff.core.process import ForwardProcess
from ddiff.core.schedule import GeometricSchedule, LinearSchedule, PowerSchedule
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary

PAIR = HierarchicalVocabulary([[0, 1, 0, 1, 1]])
PROCESSES: dict[str, ForwardProcess] = {
    f"{kind.__name__} {number}": process
    for kind in (TreeProcess, MixtureProcess, DenseProcess)
    for number, process in enumerate(kind.examples())
}
PROCESSES["early masks"] = TreeProcess(FlatVocabulary(4), CdfClock([PowerSchedule(0.05)]))
PROCESSES["late tree"] = TreeProcess(PAIR, LogTimeClock((0.05, 1.0)))
TAU = torch.cat(
    [
        torch.logspace(-9, -2, 8, dtype=torch.float64),
        torch.linspace(0.05, 0.95, 19, dtype=torch.float64),
        1.0 - torch.logspace(-2, -6, 5, dtype=torch.float64),
    ]
)
SLOPES = {
    "rtol": 1e-8,
    "atol": 1e-9,
}  # autograd computes 1 - t from t with an error of 1e-16, and t is up to 1 - 1e-12


def enumerated_information(process: ForwardProcess, t: Tensor) -> Tensor:
    """Return the mutual information I(X; Z_t) of a uniform token X and its state Z_t.

    This is the mean over tokens x of KL(q_t(.|x) || mean of q_t over all tokens).
    """
    num_tokens = process.vocabulary.num_tokens
    certain = torch.eye(num_tokens, dtype=torch.float64).log()
    found = []
    for time in t:
        given_x = process.log_marginal(certain, time.expand(num_tokens)).exp()
        mean = given_x.mean(0, keepdim=True).expand_as(given_x)
        ratio = torch.where(given_x > 0, given_x / mean, 1.0)
        found.append((given_x * ratio.log()).sum(-1).mean())
    return torch.stack(found)


@pytest.mark.parametrize("name", PROCESSES)
def test_process_information_equals_mutual_information_of_x_and_z_t(name: str) -> None:
    process = PROCESSES[name]
    t = torch.tensor([0.0, 1e-6, 0.01, 0.3, 0.8, 0.999, 1.0], dtype=torch.float64)
    expected = enumerated_information(process, t)
    torch.testing.assert_close(process.information(t), expected, rtol=0, atol=1e-11)
    torch.testing.assert_close(
        process.information_lost(t), expected[0] - expected, rtol=0, atol=1e-11
    )


@pytest.mark.parametrize("name", PROCESSES)
def test_overridden_information_methods_equal_those_of_the_base_class(name: str) -> None:
    process = PROCESSES[name]
    t = torch.tensor([0.0, 1e-9, 0.01, 0.3, 0.8, 0.999, 1.0], dtype=torch.float64)
    for method in ("information", "change_probability"):
        derived = getattr(ForwardProcess, method)(process, t)
        torch.testing.assert_close(getattr(process, method)(t), derived, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_equal_steps_of_information_time_lose_equal_information(name: str) -> None:
    """The share of information that is lost at the time t(tau) is tau.

    t(tau) is interpolated in a table with 257 knots, with an error of 2e-4.
    """
    process = PROCESSES[name]
    clock = process.information_time
    t, _ = clock.at(TAU)
    ends = process.information(
        torch.tensor([clock.at(x)[0] for x in torch.tensor([0.0, 1.0]).double()]).double()
    )
    lost = (ends[0] - process.information(t)) / (ends[0] - ends[1])
    torch.testing.assert_close(lost, TAU, rtol=0, atol=2e-4)


@pytest.mark.parametrize("name", PROCESSES)
def test_information_time_speed_is_the_derivative_of_t_by_tau(name: str) -> None:
    """The speed is the derivative of the interpolated t(tau), so that the bound has no bias."""
    tau = TAU.clone().requires_grad_()
    t, speed = PROCESSES[name].information_time.at(tau)
    (slope,) = torch.autograd.grad(t.sum(), tau)
    torch.testing.assert_close(speed, slope, **SLOPES)
    assert bool((t.diff() > 0).all())


@pytest.mark.parametrize("length", [1, 64, 10_000])
@pytest.mark.parametrize("window", [(0.0, 1.0), (1e-3, 0.999), (0.2, 0.3)])
@pytest.mark.parametrize(
    "name", ["TreeProcess 1", "MixtureProcess 1", "DenseProcess 1", "late tree"]
)
def test_drawn_noise_time_has_the_returned_derivative_by_its_uniform(
    name: str, window: tuple[float, float], length: int
) -> None:
    clock = PROCESSES[name].information_time
    v = torch.linspace(0.001, 0.999, 99, dtype=torch.float64).requires_grad_()
    t, speed = clock.draw(v, *window, length)
    (slope,) = torch.autograd.grad(t.sum(), v)
    torch.testing.assert_close(speed, slope, **SLOPES)
    ends = clock.at(torch.tensor(window, dtype=torch.float64))[0]
    assert bool((t.diff() > 0).all())
    assert bool((ends[0] <= t[0]) & (t[-1] <= ends[1]))


def test_noise_times_have_the_distribution_that_minimizes_bound_variance() -> None:
    """For masked diffusion and sequences of length L, the density of tau is sqrt(1 + a/tau).

    Here a = 1/L, and the density is not normalized. Its integral is
    sqrt(tau (tau + a)) + a asinh(sqrt(tau / a)). The process integrates by trapezoids between 257
    knots, with an error of 1e-3.
    """
    clock = TreeProcess(FlatVocabulary(7), LogTimeClock((1.0,))).information_time
    v = torch.linspace(0.01, 0.99, 50, dtype=torch.float64)
    for length in (4, 64, 1024):
        tau, _ = clock.draw(v, 0.0, 1.0, length)
        a = 1.0 / length

        def integral(tau: Tensor, a: float = a) -> Tensor:
            return (tau * (tau + a)).sqrt() + a * torch.asinh((tau / a).sqrt())

        torch.testing.assert_close(
            integral(tau) / integral(torch.ones_like(tau)), v, rtol=0, atol=1e-3
        )


def test_information_time_of_linear_masking_is_t() -> None:
    for process in (
        TreeProcess(FlatVocabulary(50), LogTimeClock((1.0,))),
        TreeProcess(FlatVocabulary(50), CdfClock([LinearSchedule()])),
    ):
        t, speed = process.information_time.at(TAU)
        torch.testing.assert_close(t, TAU, rtol=1e-12, atol=0)
        torch.testing.assert_close(speed, torch.ones_like(TAU), rtol=1e-9, atol=0)


def test_tree_process_information_is_the_sum_over_its_levels() -> None:
    """Compare with a formula for two clusters, which have two and three tokens.

    At both rates equal to 1, the probability of the token level at time t is 1 - t, and that of the
    cluster level is -(1 - t) ln(1 - t).
    """
    t = torch.linspace(0.05, 0.95, 19, dtype=torch.float64)
    process = TreeProcess(PAIR, LogTimeClock((1.0, 1.0)))
    clusters = -(0.4 * math.log(0.4) + 0.6 * math.log(0.6))
    expected = (1.0 - t) * math.log(5) - (1.0 - t) * (1.0 - t).log() * clusters
    torch.testing.assert_close(process.information(t), expected, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", PROCESSES)
def test_bound_of_uniform_prediction_grows_linearly_in_information_time(name: str) -> None:
    """The mean integrand of the bound per unit of tau is constant, which defines tau.

    The mean is an explicit sum over tokens x and states z.
    """
    process = PROCESSES[name]
    clock = process.information_time
    states, tokens = process.vocabulary.num_states, process.vocabulary.num_tokens
    x0 = torch.arange(tokens).repeat_interleave(states)
    zt = torch.arange(states).repeat(tokens)
    dist = DenseDistribution(
        torch.full((len(x0), tokens), -math.log(tokens), dtype=torch.float64), process.vocabulary
    )
    charged = []
    for tau in (0.03, 0.2, 0.5, 0.8, 0.97):
        t, speed = clock.at(torch.tensor(tau, dtype=torch.float64))
        times = t.expand(len(x0))
        q = process.log_likelihood(zt, times).exp().gather(-1, x0.unsqueeze(-1)).squeeze(-1)
        density = torch.where(q > 0, process.density(dist, x0, zt, times), 0.0)
        charged.append(float(speed * (q * density).sum() / tokens))
    ends = process.information(
        torch.stack([clock.at(x)[0] for x in torch.tensor([0.0, 1.0]).double()])
    )
    expected = float(ends[0] - ends[1])
    assert charged == pytest.approx([expected] * 5, rel=5e-3)


def test_information_times_0_and_1_map_to_the_earliest_and_latest_noise_times() -> None:
    """The process "early masks" masks 25 % of the tokens, (1e-12)^0.05, before time 1e-12.

    Rates are evaluated only at times from 1e-12.
    """
    early = PROCESSES["early masks"].information_time
    assert early.first == pytest.approx(1e-12**0.05, rel=1e-6)
    assert float(early.at(torch.zeros(1).double())[0]) == 1e-12
    late = PROCESSES["late tree"].information_time
    assert late.last < 0.9
    assert float(late.at(torch.ones(1).double())[0]) == 1.0 - 1e-12
    plain = TreeProcess(FlatVocabulary(4), LogTimeClock((1.0,))).information_time
    assert plain.at(torch.tensor([0.0, 1.0]).double())[0].tolist() == [0.0, 1.0]


def test_information_time_spans_0_to_1_if_z_0_is_noisy_and_z_1_depends_on_the_token() -> None:
    process = MixtureProcess(
        FlatVocabulary(3), GeometricSchedule(0.05, 3.0), torch.tensor([0.2, 0.3, 0.5, 0.0])
    )
    assert process.information_time.at(torch.tensor([0.0, 1.0]).double())[0].tolist() == [0.0, 1.0]


@given(st.lists(st.floats(0.01, 1.0), min_size=3, max_size=12), st.integers(0, 2**31))
@settings(deadline=None, max_examples=40)
def test_monotone_interpolation_rises_and_passes_through_its_knots(
    steps: list[float], seed: int
) -> None:
    rises = torch.rand(len(steps), generator=torch.Generator().manual_seed(seed)).double() + 0.01
    x = torch.tensor(steps, dtype=torch.float64).cumsum(0) - sum(steps) / 2
    y = rises.cumsum(0) - float(rises.sum()) / 2
    mapped = MonotoneMap(x, y)
    # Tolerance: an error of 1e-16 in sigmoid(x), divided by 1 - sigmoid(x) >= 1e-9, times slopes
    # of up to 100.
    torch.testing.assert_close(torch.logit(mapped(torch.sigmoid(x))[0]), y, rtol=0, atol=1e-5)
    fine = torch.sigmoid(
        torch.linspace(float(x[0]) - 1.0, float(x[-1]) + 1.0, 300, dtype=torch.float64)
    )
    assert bool((mapped(fine)[0].diff() >= 0).all())
    assert bool((mapped(fine)[1] >= 0).all())


def test_identity_time_maps_tau_to_equal_t() -> None:
    assert IdentityTime().at(TAU)[0] is TAU
    assert torch.equal(IdentityTime().draw(TAU, 0.2, 0.6, 5)[0], 0.2 + (0.6 - 0.2) * TAU)
