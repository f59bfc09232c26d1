"""First-hitting sampler: exact even if much noise is added close to t = 0.

The sampler ends when the expected number of noisy positions is `until`, not at a fixed time.
"""

from __future__ import annotations

import pytest
import torch
from ddiff_gidd.process import Form, GeneralizedInterpolation
from ddiff_hybrid.gamma import GammaHybrid
from ddiff_mdlm.process import MaskedDiffusion

from ddiff import (
    ArgumentError,
    FirstHittingSampler,
    FlatVocabulary,
    ForwardProcess,
    GeometricSchedule,
    HierarchicalVocabulary,
    LinearSchedule,
    LogTimeClock,
    MixtureProcess,
    TreeProcess,
    token_distribution,
)
from ddiff.core.numerics import EARLIEST, LATEST
from ddiff.sampling.first_hitting import MAX_DRAWN_AT_ONCE, find_event_interval
from ddiff.testing.sampler_distribution import measure_sampler

JOINT = torch.tensor(
    [[0.30, 0.02, 0.08], [0.02, 0.20, 0.03], [0.05, 0.05, 0.25]], dtype=torch.float64
)
POINTS = 2**13
NOISE = 0.02  # total variation of 2^13 samples: 0.012 on average, standard deviation 0.003


def gidd(
    p_uniform: float, gamma: float, form: Form = "current", num_tokens: int = 3
) -> GeneralizedInterpolation:
    config = GeneralizedInterpolation.Config(p_uniform=p_uniform, gamma=gamma, form=form)
    return GeneralizedInterpolation.build(config, vocabulary=FlatVocabulary(num_tokens))


def stay_probability(process: ForwardProcess, t: float) -> float:
    """Return q_t(x | x), the probability that token 0 is unchanged at time t."""
    return float(
        process.stay_probability(torch.tensor([0]), torch.tensor([t], dtype=torch.float64))
    )


@pytest.mark.parametrize(
    ("p_uniform", "gamma", "form"),
    [
        (0.9, 0.5, "current"),
        (0.5, 0.5, "current"),
        (0.5, 0.3, "current"),
        (0.5, 0.5, "original"),
        (0.2, 1.0, "current"),
    ],
)
def test_first_hitting_sampler_is_exact_on_gidd(p_uniform: float, gamma: float, form: Form) -> None:
    """At p_uniform 0.9 and gamma 0.5, a sampler that ends at a fixed time has the error 0.274."""
    result = measure_sampler(
        FirstHittingSampler(), gidd(p_uniform, gamma, form), JOINT, points=POINTS
    )
    assert result.distance(JOINT) < NOISE


@pytest.mark.parametrize("length", [2, 128, 512])
@pytest.mark.parametrize(("p_uniform", "gamma"), [(0.1, 1.0), (0.2, 1.0), (0.1, 2.0)])
def test_first_hitting_until_is_the_expected_number_of_noisy_positions(
    p_uniform: float, gamma: float, length: int
) -> None:
    """The parameter `until` sets the range of simulated times.

    At the last simulated time, the expected number of noisy positions is `until`. At the first
    simulated time, the expected number of clean positions is `until`.
    """
    until = 1e-3
    process = gidd(p_uniform, gamma)
    begin, finish = find_event_interval(process, until, length)
    assert EARLIEST <= finish < begin <= LATEST
    assert length * (1.0 - stay_probability(process, finish)) == pytest.approx(until, rel=1e-3)
    alpha = float(process.alpha(torch.tensor([begin], dtype=torch.float64)))
    assert length * alpha == pytest.approx(until, rel=1e-3)


def test_first_hitting_time_interval_grows_with_sequence_length() -> None:
    process = gidd(0.2, 1.0)
    begins, finishes = zip(*(find_event_interval(process, 1e-3, length) for length in (2, 16, 128)))
    assert begins[0] < begins[1] < begins[2]
    assert finishes[0] > finishes[1] > finishes[2]


def test_first_hitting_time_interval_depends_on_the_fastest_decaying_token() -> None:
    """The noise is not uniform over tokens, so that tokens are replaced at different rates."""
    vocabulary = FlatVocabulary(3, mask=False)
    process = MixtureProcess(vocabulary, LinearSchedule(), torch.tensor([0.98, 0.01, 0.01]))
    _, finish = find_event_interval(process, 1e-3, 10)
    t = torch.full((3,), finish, dtype=torch.float64)
    lost = 1.0 - process.stay_probability(torch.arange(3), t)
    assert 10 * float(lost.max()) == pytest.approx(1e-3, rel=1e-3)
    assert float(lost[0]) < 0.05 * float(lost.max())


def test_first_hitting_rejects_processes_with_too_much_noise_near_time_0() -> None:
    """For p_uniform 0.9 and gamma 0.5, 1.3 % of the tokens are noisy at time 1e-12.

    Rates are not evaluated at earlier times.
    """
    process = gidd(0.9, 0.5)
    with pytest.raises(
        ArgumentError,
        match=r"1\.\d+ of 128 positions are noise.*error of up to 0\.\d+.*gamma",
    ):
        find_event_interval(process, 1e-3, 128)
    assert find_event_interval(process, 1e-3, 2)[1] == pytest.approx(EARLIEST)
    assert 2 * (1.0 - stay_probability(process, EARLIEST)) < MAX_DRAWN_AT_ONCE


def test_first_hitting_time_interval_does_not_depend_on_the_noise_at_time_0() -> None:
    """5 % of the tokens are noisy at t = 0; the final decoding step removes this noise."""
    vocabulary = FlatVocabulary(3, mask=False)
    process = MixtureProcess(
        vocabulary, GeometricSchedule(0.05, 20.0), token_distribution(vocabulary)
    )
    _, finish = find_event_interval(process, 0.1, 10)
    now = torch.tensor([finish], dtype=torch.float64)
    moved = 1.0 - float(process.transition(torch.zeros_like(now), now).row(torch.tensor([0]))[0, 0])
    assert 10 * moved == pytest.approx(0.1, rel=1e-3)


@pytest.mark.parametrize(
    "process",
    [
        pytest.param(
            MaskedDiffusion.build(MaskedDiffusion.Config(), vocabulary=FlatVocabulary(3)),
            id="masks",
        ),
        pytest.param(
            TreeProcess(HierarchicalVocabulary([[0, 1, 0]]), LogTimeClock((1.0, 1.0)), xi=0.8),
            id="tree",
        ),
        pytest.param(GammaHybrid(FlatVocabulary(3), 0.0), id="hybrid without noise"),
    ],
)
def test_first_hitting_time_interval_is_0_to_1_without_uniform_noise(
    process: ForwardProcess,
) -> None:
    assert find_event_interval(process, 0.3, 64) == (LATEST, EARLIEST)


@pytest.mark.parametrize("until", [0.0, -1.0, 0.5, float("nan")])
def test_first_hitting_rejects_a_parameter_until_out_of_range(until: float) -> None:
    with pytest.raises(ArgumentError, match=r"until must be in \(0, 1/2\).*number of positions"):
        FirstHittingSampler(until)
