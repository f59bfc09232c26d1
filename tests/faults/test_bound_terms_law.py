"""The conformance law of the bound terms: holds for `nelbo`, and fails for planted faults.

The law compares randomly drawn terms of the bound with their exact expectations.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor

from ddiff.core import elbo
from ddiff.core.clock import CdfClock, LogTimeClock
from ddiff.core.components import MixtureProcess, token_distribution
from ddiff.core.elbo import Network
from ddiff.core.process import ForwardProcess
from ddiff.core.rng import CounterRng
from ddiff.core.schedule import LinearSchedule, Schedule
from ddiff.core.times import Noisy, Times
from ddiff.core.tree import TreeProcess
from ddiff.core.vocabulary import FlatVocabulary, HierarchicalVocabulary
from ddiff.testing import bound, check_process
from ddiff.testing.bound_terms import (
    InformationPath,
    SobolRng,
    inner_information_window,
    terms_have_their_expectations,
)

UNMASKED = FlatVocabulary(3, mask=False)


class NoisyAtBothEnds(Schedule):
    """Schedule alpha = 0.9 - 0.6 t, with noise at t = 0 and clean tokens left at t = 1."""

    closes_at_clean = False
    closes_at_prior = False

    def alpha(self, t: Tensor) -> Tensor:
        return 0.9 - 0.6 * t


PROCESSES: dict[str, ForwardProcess] = {
    "masked": TreeProcess(FlatVocabulary(4), CdfClock([LinearSchedule()])),
    "tree": TreeProcess(HierarchicalVocabulary([[0, 1, 0]]), LogTimeClock((0.5, 1.0)), 0.9),
    "uniform": MixtureProcess(UNMASKED, LinearSchedule(), token_distribution(UNMASKED)),
    "uniform, tokens left at t = 1": MixtureProcess(
        UNMASKED, LinearSchedule(0.3), token_distribution(UNMASKED)
    ),
    "uniform, never closed": MixtureProcess(
        UNMASKED, NoisyAtBothEnds(), token_distribution(UNMASKED)
    ),
}
CORRUPT = elbo.corrupt
DIFFUSION = elbo.diffusion_term
DECODING = elbo.decoding_term


# ---------------------------------------------------------------------- planted faults


def closing_with(
    make_states: Callable[..., Tensor], query_t: float | None = 1.0
) -> Callable[..., Tensor]:
    """Build a faulty prior term of the bound (KL to the prior), to replace that of ddiff.

    make_states: function that draws the states at which the network is queried. query_t: time at
    which the network is queried; None is the end of the time window.
    """

    def closing(
        process: Any, network: Network, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng
    ) -> Tensor:
        charged = (times.speed > 0) & ~times.clean & scored
        reads = charged & (times.t < 1) if process.closes_at_prior else charged
        noisy = CORRUPT(process, x0, times, scored, rng, "closing")
        states = make_states(process, x0, times, scored, rng, noisy)
        shown = noisy._replace(zt=torch.where(charged, states, noisy.zt))
        if query_t is not None:
            shown = shown._replace(t=torch.where(charged, query_t, noisy.t))
        formula = partial(elbo._closing_kl, process)

        def whole(zt: Tensor) -> Tensor:
            return torch.full_like(zt, process.vocabulary.root)

        return times.speed * elbo.evaluate_at(network, shown, reads, whole, formula, x0, times.t)

    return closing


def draw_from_q_1(
    process: Any, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng, noisy: Noisy
) -> Tensor:
    return CORRUPT(process, x0, times._replace(t=torch.ones_like(times.t)), scored, rng, "prior").zt


def draw_from_prior(
    process: Any, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng, noisy: Noisy
) -> Tensor:
    return process.prior.draw(rng.uniform("prior"))


def states_at_end(
    process: Any, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng, noisy: Noisy
) -> Tensor:
    return noisy.zt


def corrupt_earlier(
    process: Any, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng, channel: str
) -> Noisy:
    early = CORRUPT(process, x0, times._replace(t=0.9 * times.t), scored, rng, channel)
    return early._replace(t=torch.where(early.clean, 0.0, times.t))


def report_earlier_time(
    process: Any, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng, channel: str
) -> Noisy:
    noisy = CORRUPT(process, x0, times, scored, rng, channel)
    return noisy._replace(t=0.8 * noisy.t)


def decode_noised_at_zero(
    process: Any, network: Network, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng
) -> Tensor:
    def corrupt_at_zero(process: Any, x0: Tensor, times: Times, *rest: Any) -> Noisy:
        noisy = CORRUPT(process, x0, times._replace(t=torch.zeros_like(times.t)), *rest)
        return noisy._replace(t=torch.where(noisy.clean, 0.0, times.t))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(elbo, "corrupt", corrupt_at_zero)
        return DECODING(process, network, x0, times, scored, rng)


def corrupt_by(name: str) -> Callable[..., Noisy]:
    """Fault: return a `corrupt` that always draws from the channel `name` of the generator."""

    def corrupt(
        process: Any, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng, channel: str
    ) -> Noisy:
        return CORRUPT(process, x0, times, scored, rng, name)

    return corrupt


def corrupt_with_shared_uniforms(
    process: Any, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng, channel: str
) -> Noisy:
    """Fault: `corrupt` that uses the uniforms of the first position for both positions."""

    class FirstPosition(CounterRng):
        def uniform(self, channel: str, count: int = 1) -> Tensor:
            u = rng.uniform(channel, count)
            return u[:, :1].expand_as(u)

    return CORRUPT(process, x0, times, scored, FirstPosition(0, 0, rng.index, rng.length), channel)


def corrupt_prompts(
    process: Any, x0: Tensor, times: Times, scored: Tensor, rng: CounterRng, channel: str
) -> Noisy:
    return CORRUPT(process, x0, times, torch.ones_like(scored), rng, channel)


def swap_speeds(process: Any, network: Network, x0: Tensor, noisy: Noisy, speed: Tensor) -> Tensor:
    return DIFFUSION(process, network, x0, noisy, speed.flip(-1))


def square_speed(process: Any, network: Network, x0: Tensor, noisy: Noisy, speed: Tensor) -> Tensor:
    return speed * DIFFUSION(process, network, x0, noisy, speed)


FAULTS: dict[str, tuple[str, Callable[..., Any], str]] = {
    "closing states drawn from q_1(.|x0)": (
        "closing_term",
        closing_with(draw_from_q_1),
        "closing",
    ),
    "closing states of the end of the window": (
        "closing_term",
        closing_with(states_at_end),
        "closing",
    ),
    "closing queried at the end of the window": (
        "closing_term",
        closing_with(draw_from_prior, None),
        "closing",
    ),
    "z is drawn at 0.9 t": ("corrupt", corrupt_earlier, "diffusion"),
    "0.8 t is reported": ("corrupt", report_earlier_time, "diffusion"),
    "decoding corrupted at 0": ("decoding_term", decode_noised_at_zero, "decoding"),
    "terms share a channel": ("corrupt", corrupt_by("diffusion"), "channel"),
    "times and states share a channel": ("corrupt", corrupt_by("time"), "channel"),
    "positions share their uniforms": ("corrupt", corrupt_with_shared_uniforms, "diffusion"),
    "unscored positions are corrupted": ("corrupt", corrupt_prompts, "diffusion"),
    "speeds of the other position": ("diffusion_term", swap_speeds, "diffusion"),
    "speed counts twice": ("diffusion_term", square_speed, "diffusion"),
}


@pytest.mark.parametrize("name", PROCESSES)
def test_mean_of_random_nelbo_terms_is_the_exact_expectation(name: str) -> None:
    report = terms_have_their_expectations(PROCESSES[name])
    assert report.passed, str(report)
    assert report.probes > 2 * 3 * 6


@pytest.mark.parametrize("fault_name", FAULTS)
@pytest.mark.parametrize("name", PROCESSES)
def test_conformance_check_of_bound_terms_detects_planted_faults(
    name: str, fault_name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    where, fault, term = FAULTS[fault_name]
    monkeypatch.setattr(elbo, where, fault)
    report = terms_have_their_expectations(PROCESSES[name])
    assert not report.passed, str(report)
    # The law must fail because of wrong values, not because the planted code raises.
    assert "raised" not in report.where
    if where != "corrupt":  # all three terms use `corrupt`
        assert term in report.where


@pytest.mark.parametrize(
    "fault", [corrupt_by("prior"), corrupt_by("decoding")], ids=["prior", "decoding"]
)
def test_entropy_check_detects_swapped_channels_of_the_random_generator(
    fault: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The exact sums of the entropy law assign states to channels of the random generator."""
    process = PROCESSES["uniform"]
    assert bound.entropy_equality(process).passed
    monkeypatch.setattr(elbo, "corrupt", fault)
    assert not bound.entropy_equality(process).passed


def test_check_process_includes_the_check_of_bound_terms(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(elbo, "closing_term", closing_with(draw_from_q_1))
    broken = {report.law for report in check_process(PROCESSES["masked"]) if not report.passed}
    assert terms_have_their_expectations.name in broken


def test_prior_term_is_too_low_if_states_are_drawn_from_q_1_not_the_prior(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """If clean tokens are left at t = 1, a state drawn from q_1(z | x0) gives information on x0.

    For the KL to the prior, the network must be queried in states drawn from the prior instead.
    """
    from ddiff.testing.bound_terms import Enumeration, draw_terms, sensitive_table

    process = PROCESSES["uniform, tokens left at t = 1"]
    x0 = torch.tensor([[0, 0], [2, 2]])
    scored = torch.ones_like(x0, dtype=torch.bool)
    table = sensitive_table(process)
    due = Enumeration(process, table, x0, scored, (0.0, 1.0)).closing().mean
    monkeypatch.setattr(elbo, "closing_term", closing_with(draw_from_q_1))
    leaking = draw_terms(process, table, x0, scored, (0.0, 1.0))[0].closing.mean(1)
    assert float((due - leaking).abs().max()) > 1e-3


# ---------------------------------------------------------------------- the parts of the law


def test_sobol_rng_uses_separate_dimensions_for_each_channel() -> None:
    rng = SobolRng(torch.arange(256), 256, 2)
    drawn = torch.cat([rng.uniform("a"), rng.uniform("b", 3).flatten(1), rng.uniform("c")], 1)
    assert torch.equal(rng.uniform("a"), drawn[:, :2])
    assert rng.queries == {"a": 2, "b": 1, "c": 1}
    assert float((drawn.mean(0) - 0.5).abs().max()) < 1e-9  # exact for Sobol points
    correlation = torch.corrcoef(drawn.T) - torch.eye(drawn.shape[1], dtype=torch.float64)
    assert float(correlation.abs().max()) < 0.2


@pytest.mark.parametrize("name", PROCESSES)
def test_time_along_information_path_is_the_integral_of_its_speed(name: str) -> None:
    process = PROCESSES[name]
    window = inner_information_window(process)
    v = (torch.arange(4096, dtype=torch.float64) + 0.5) / 4096
    t, speed = InformationPath(process, window)(v, 2)
    for power in (0, 1, 2):
        expected = (window[1] ** (power + 1) - window[0] ** (power + 1)) / (power + 1)
        assert (speed * t**power).mean(0).tolist() == pytest.approx([expected] * 2, rel=1e-4)
    assert bool((t.diff(dim=0) > 0).all())


def test_states_at_the_prior_ignore_x0_even_if_q_1_depends_on_x0() -> None:
    """Positions marked `at_prior` are drawn from the prior, which differs from q_1 here."""
    process = PROCESSES["uniform, tokens left at t = 1"]
    x0 = torch.arange(3).repeat(4096).reshape(-1, 2)
    rng = CounterRng(0, 0, torch.arange(len(x0)), 2)
    everywhere = torch.ones_like(x0, dtype=torch.bool)
    times = Times(
        torch.ones(x0.shape).double(),
        torch.zeros(x0.shape).double(),
        ~everywhere,
        at_prior=everywhere,
    )
    noisy = CORRUPT(process, x0, times, everywhere, rng, "diffusion")
    stays = float((noisy.zt == x0).double().mean())
    assert stays == pytest.approx(1 / 3, abs=0.02)  # 4 standard errors; 0.53 with q_1
    begun = CORRUPT(process, x0, times._replace(at_prior=~everywhere), everywhere, rng, "diffusion")
    assert float((begun.zt == x0).double().mean()) == pytest.approx(0.3 + 0.7 / 3, abs=0.02)
