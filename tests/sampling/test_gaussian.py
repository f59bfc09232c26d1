"""Samplers of vectors: orders of convergence, exact cases, variances, independence of the batch."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from gaussian_mixture import BatchRng, mixture_mean, network_of_means, sample_from, transport
from joint import processes
from torch import Tensor

from ddiff.core.gaussian import GaussianProcess, GridDecoder, PredictedMean
from ddiff.core.gaussian_schedule import CosineVP, Flow, LinearBetaVP, SigmoidVP, ZeroTerminal
from ddiff.core.information import InformationTime
from ddiff.core.rng import CounterRng
from ddiff.core.times import WindowTimes
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.blockwise import BlockwiseSampler
from ddiff.sampling.gaussian import (
    DdimSampler,
    EulerMaruyamaSampler,
    EulerSampler,
    GaussianSampler,
    HeunSampler,
)
from ddiff.sampling.grid import Grid, InformationGrid, LogSnrGrid, Steps
from ddiff.sampling.hyperschedule import HyperscheduleSampler
from ddiff.sampling.loop import Canvas, Sampler, generate, step_rows
from ddiff.sampling.tau_leaping import TauLeapingSampler

SCHEDULES = [CosineVP(), Flow(), LinearBetaVP(), SigmoidVP(), ZeroTerminal(LinearBetaVP())]
COUNT = 64
# Middles of equal shares of the standard normal distribution.
START = torch.special.ndtri((torch.arange(COUNT, dtype=torch.float64) + 0.5) / COUNT)

BUILD: dict[str, Callable[..., GaussianSampler]] = {
    "ddim": lambda grid, last="mean": DdimSampler(grid, 0.0, last),
    "euler": lambda grid, last="mean": EulerSampler(grid, last),
    "heun": lambda grid, last="mean": HeunSampler(grid, last),
    "ddpm": lambda grid, last="mean": DdimSampler(grid, 1.0, last),
    "eta": lambda grid, last="mean": DdimSampler(grid, 0.4, last),
    "sde": lambda grid, last="mean": EulerMaruyamaSampler(grid, last),
}


def flow_error(name: str, grid: Any, process: GaussianProcess) -> float:
    """Return the mean distance of samples from the exact transport of their starts."""
    network = network_of_means(process, mixture_mean)
    drawn = sample_from(BUILD[name](grid), process, network, START.unsqueeze(-1))[:, 0]
    return float((drawn - transport(process, START)).abs().mean())


def orders(name: str, grid: Callable[[int], Any], process: GaussianProcess) -> list[float]:
    errors = [flow_error(name, grid(steps), process) for steps in (10, 20, 40, 80, 160, 320)]
    return [math.log2(one / other) for one, other in itertools.pairwise(errors)]


# ---------------------------------------------------------------------- probability flow


@pytest.mark.parametrize("schedule", [CosineVP(), Flow()], ids=str)
def test_orders_on_the_flow_of_a_mixture_are_those_of_the_theory(schedule: Any) -> None:
    """The theory page states .97 to 1.00 for DDIM, 1.00 for Euler and 2.0 for Heun."""
    process = GaussianProcess(schedule, 1)
    found = {name: orders(name, lambda n: n, process) for name in ("ddim", "euler", "heun")}
    assert all(0.965 <= order <= 1.005 for order in found["ddim"])
    assert all(0.975 <= order <= 1.32 for order in found["euler"])
    assert found["euler"][-1] == pytest.approx(1.0, abs=0.01)
    assert all(1.88 <= order <= 2.02 for order in found["heun"])
    assert found["heun"][-1] == pytest.approx(2.0, abs=0.02)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_flow_samplers_converge_on_every_schedule_and_grid(schedule: Any) -> None:
    process = GaussianProcess(schedule, 1)
    # The grid in log SNR begins later with more steps, which costs a factor log(steps).
    for grid in (lambda n: n, LogSnrGrid):
        for name, least in (("ddim", 0.85), ("euler", 0.85), ("heun", 1.7)):
            coarse, fine = (flow_error(name, grid(steps), process) for steps in (20, 80))
            assert math.log(coarse / fine) / math.log(4.0) > least, (name, grid)
    # Equal shares of the information leave few steps at high noise, so the limit is reached later.
    assert flow_error("ddim", InformationGrid(80), process) < 0.06
    assert flow_error("heun", InformationGrid(80), process) < 0.01


class SharedLegSteps(Steps):
    """Times of a vector at equal steps of tau on a shared leg with a power."""

    def __init__(self, steps: int, power: float) -> None:
        self.steps = steps
        self.power = power

    def times_of(self, process: Any) -> list[float]:
        tau = torch.tensor(Grid("uniform", self.steps).times(), dtype=torch.float64)
        times = process.information_time.at(tau**self.power)[0].tolist()
        return [1.0, *times[1:-1], 0.0]


def test_power_of_a_shared_leg_lowers_the_error_of_vectors() -> None:
    """The table in docs/fields.md: 0.2 is better than 1 and 0.1, equal steps of t are best."""
    process = GaussianProcess(CosineVP(), 1)
    error = {
        power: flow_error("ddim", SharedLegSteps(32, power), process) for power in (1, 0.2, 0.1)
    }
    assert error[0.2] < error[1] / 2.5
    assert error[0.2] < error[0.1]
    assert flow_error("ddim", 32, process) < error[0.2] / 1.3
    heun = {power: flow_error("heun", SharedLegSteps(32, power), process) for power in (1, 0.2)}
    assert heun[0.2] < heun[1] / 15.0


def test_flow_velocity_equals_ddim_on_straight_paths() -> None:
    """With a = 1 - t and sigma = t the flow is linear in t for a fixed x_hat."""
    process = GaussianProcess(Flow(), 1)
    network = network_of_means(process, mixture_mean)
    start = START.unsqueeze(-1)
    ddim = sample_from(BUILD["ddim"](9), process, network, start)
    euler = sample_from(BUILD["euler"](9), process, network, start)
    assert torch.allclose(ddim, euler, atol=1e-12)


# ---------------------------------------------------------------------- exact cases


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
@pytest.mark.parametrize("eta", [0.0, 0.3, 1.0])
def test_ddim_of_one_point_is_exact_in_one_step(schedule: Any, eta: float) -> None:
    """Data of a single point x: the true noise is known, and z_s = a_s x + sigma_s eps."""
    process = GaussianProcess(schedule, 3)
    x = torch.tensor([0.7, -1.3, 0.2], dtype=torch.float64)
    network = network_of_means(process, lambda z, a, sigma: x.expand_as(z))
    t = torch.tensor([0.9, 0.4], dtype=torch.float64)
    s = torch.tensor([0.15, 0.4], dtype=torch.float64)
    noise = torch.tensor([[0.3, -0.8, 1.1]] * 2, dtype=torch.float64)
    zt = process.signal(t).unsqueeze(-1) * x + process.deviation(t).unsqueeze(-1) * noise
    free = torch.ones(2, 1, dtype=torch.bool)
    canvas = Canvas(zt.unsqueeze(1), t.unsqueeze(-1), ~free, free)
    rng = CounterRng(0, 0, torch.arange(2), 1)
    moved = DdimSampler(1, eta).move(process, network, canvas, s.unsqueeze(-1), rng)
    assert torch.equal(moved.t, s.unsqueeze(-1))
    assert torch.equal(moved.zt[1], canvas.zt[1])
    if eta == 0.0:
        exact = process.signal(s).unsqueeze(-1) * x + process.deviation(s).unsqueeze(-1) * noise
        assert torch.allclose(moved.zt[:, 0], exact, rtol=0.0, atol=1e-14)


@pytest.mark.parametrize("name", BUILD)
def test_one_step_of_every_sampler_has_its_mean_and_variance(name: str) -> None:
    """One step from a fixed state with a fixed prediction, on 40 000 draws, within 5 deviations."""
    process = GaussianProcess(CosineVP(), 1)
    t, s, clean, start, count = 0.6, 0.45, 0.5, -0.4, 40_000
    network = network_of_means(process, lambda z, a, sigma: torch.full_like(z, clean))
    a, a_s = (float(process.signal(torch.tensor(at, dtype=torch.float64))) for at in (t, s))
    at_t = torch.tensor([t], dtype=torch.float64)
    sigma = float(process.deviation(at_t))
    sigma_s = float(process.deviation(torch.tensor([s], dtype=torch.float64)))
    noise = (start - a * clean) / sigma
    share = 1.0 - (a / sigma) ** 2 / (a_s / sigma_s) ** 2
    width = float(process.schedule_time(torch.tensor(1.0, dtype=torch.float64)))
    width -= float(process.schedule_time(torch.tensor(0.0, dtype=torch.float64)))
    # Cosine: a' = -sigma pi/2 and sigma' = a pi/2, in the time of the schedule.
    slope = width * math.pi / 2.0
    velocity = slope * (-sigma * clean + a * noise)
    rate = 2.0 * slope * sigma**2 * (a / sigma + sigma / a)
    expected = {
        "ddim": (a_s * clean + sigma_s * noise, 0.0),
        "ddpm": (
            a_s * clean + sigma_s * math.sqrt(1.0 - share) * noise,
            sigma_s * math.sqrt(share),
        ),
        "eta": (
            a_s * clean + sigma_s * math.sqrt(1.0 - 0.16 * share) * noise,
            0.4 * sigma_s * math.sqrt(share),
        ),
        "euler": (start + (s - t) * velocity, 0.0),
        "sde": (
            start + (s - t) * (velocity + rate * noise / (2.0 * sigma)),
            math.sqrt(rate * (t - s)),
        ),
    }
    predicted = expected["euler"][0]
    noise_s = (predicted - a_s * clean) / sigma_s
    end = slope * (-sigma_s * clean + a_s * noise_s)
    expected["heun"] = (start + (s - t) * (velocity + end) / 2.0, 0.0)
    free = torch.ones(count, 1, dtype=torch.bool)
    canvas = Canvas(
        torch.full((count, 1, 1), start, dtype=torch.float64), free.double() * t, ~free, free
    )
    rng = BatchRng(0, 0, torch.arange(count), 1)
    moved = BUILD[name](4).move(process, network, canvas, torch.full_like(canvas.t, s), rng)
    mean, deviation = expected[name]
    tolerance = 1e-12 + 5.0 * deviation / math.sqrt(count)
    assert float(moved.zt.mean()) == pytest.approx(mean, abs=tolerance)
    assert float(moved.zt.std()) == pytest.approx(deviation, abs=tolerance)


# ---------------------------------------------------------------------- Gaussian data


def final_variance(name: str, steps: int, process: GaussianProcess, spread: float) -> float:
    """Return the variance of samples of N(0, spread^2), from the linear recursion of one step.

    Every step is linear in the state and in its noise, so two runs give both factors.
    """

    def mean(z: Tensor, a: Tensor, sigma: Tensor) -> Tensor:
        return a * spread**2 / (a**2 * spread**2 + sigma**2) * z

    network = network_of_means(process, mean)
    sampler = BUILD[name](steps)
    variance = 1.0
    times = torch.tensor(sampler.times(process), dtype=torch.float64)
    count = 4000
    # Quantiles of the normal distribution in place of random normals.
    normals = torch.special.ndtri((torch.arange(count, dtype=torch.float64) + 0.5) / count)
    uniforms = torch.special.ndtr(normals).reshape(count, 1)

    class Quantiles(CounterRng):
        def uniform(self, channel: str, count: int = 1) -> Tensor:
            return uniforms

    free = torch.ones(count, 1, dtype=torch.bool)
    rng = Quantiles(0, 0, torch.arange(count), 1)
    size = float(normals.var())
    for t, s in itertools.pairwise(times):
        later = torch.full_like(free.double(), float(s))
        at = free.double() * t
        ones = Canvas(torch.ones(count, 1, 1, dtype=torch.float64), at, ~free, free)
        zeros = Canvas(torch.zeros(count, 1, 1, dtype=torch.float64), at, ~free, free)
        factor = float(sampler.move(process, network, ones, later, rng).zt.mean())
        added = float(sampler.move(process, network, zeros, later, rng).zt.var()) / size
        variance = factor**2 * variance + added
    return variance


@pytest.mark.parametrize("name", BUILD)
def test_variance_of_gaussian_data_is_kept_as_steps_grow(name: str) -> None:
    """The variance of z_0 approaches a_0^2 S^2 + sigma_0^2 with the order of the sampler."""
    process = GaussianProcess(CosineVP(), 1, largest_log_snr=6.0)
    spread = 0.6
    start = torch.zeros(1, dtype=torch.float64)
    exact = float(process.signal(start) ** 2 * spread**2 + process.deviation(start) ** 2)
    coarse, fine = (abs(final_variance(name, n, process, spread) - exact) for n in (20, 80))
    assert fine < 0.1 * exact
    assert math.log(coarse / fine) / math.log(4.0) > BUILD[name](2).order - 0.25


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_every_eta_keeps_the_marginal_of_the_process_given_x(schedule: Any) -> None:
    """With the true x, a step from a_t x + sigma_t eps has mean a_s x and variance sigma_s^2."""
    process = GaussianProcess(schedule, 1)
    t = torch.tensor([1.0, 0.9, 0.5, 0.1], dtype=torch.float64)
    s = torch.tensor([0.7, 0.89, 0.0, 0.0], dtype=torch.float64)
    x = torch.full((4, 1), 0.8, dtype=torch.float64)
    start = process.signal(t).unsqueeze(-1) * x
    for eta in (0.0, 0.3, 0.7, 1.0):
        center, deviation = process.posterior(x, start, t, s, eta)
        moved, _ = process.posterior(x, start + process.deviation(t).unsqueeze(-1), t, s, eta)
        variance = (moved - center).squeeze(-1) ** 2 + deviation**2
        assert torch.allclose(center.squeeze(-1), process.signal(s) * 0.8, rtol=0.0, atol=1e-14)
        assert torch.allclose(variance, process.deviation(s) ** 2, rtol=0.0, atol=1e-14)


# ---------------------------------------------------------------------- the loop


@pytest.mark.parametrize("name", BUILD)
def test_vectors_do_not_depend_on_the_batch(name: str) -> None:
    process = GaussianProcess(CosineVP(), 2)
    network = network_of_means(process, lambda z, a, sigma: z.tanh())
    whole = generate(
        BUILD[name](6, "draw"), process, network, index=torch.arange(5), length=5, seed=3
    )
    part = generate(
        BUILD[name](6, "draw"), process, network, index=torch.tensor([3]), length=5, seed=3
    )
    assert whole.ids.shape == (5, 5, 2)
    assert torch.equal(whole.ids[3:4], part.ids)
    evaluations = 12 if name == "heun" else 6
    assert whole.nfe == evaluations
    assert whole.runs.tolist() == [evaluations] * 5
    assert "vectors of 2 numbers" in repr(whole)


@pytest.mark.parametrize("name", BUILD)
def test_given_vectors_are_kept_bit_for_bit(name: str) -> None:
    process = GaussianProcess(Flow(), 2)
    network = network_of_means(process, lambda z, a, sigma: z.tanh())
    given = torch.linspace(-2.0, 2.0, 24, dtype=torch.float64).reshape(3, 4, 2) / 3.0
    mask = torch.tensor([[True, False, False, True]] * 3)
    drawn = generate(
        BUILD[name](5),
        process,
        network,
        index=torch.arange(3),
        length=4,
        seed=1,
        prompt=given,
        prompt_mask=mask,
    )
    assert torch.equal(drawn.ids[mask], given[mask])
    assert not bool((drawn.ids[~mask] == given[~mask]).any())


def test_decoding_draws_from_the_decoder_or_takes_its_mean() -> None:
    values = torch.tensor([-1.0, 0.0, 1.0], dtype=torch.float64)
    process = GaussianProcess(CosineVP(), 1, 2.0, decoder=GridDecoder(values))
    network = network_of_means(process, lambda z, a, sigma: torch.full_like(z, 0.4))
    request = {"index": torch.arange(400), "length": 1, "seed": 0}
    mean = generate(DdimSampler(4, last="mean"), process, network, **request).ids  # type: ignore[arg-type]
    drawn = generate(DdimSampler(4), process, network, **request).ids  # type: ignore[arg-type]
    assert set(mean.unique().tolist()) <= {-1.0, 0.0, 1.0}
    assert set(drawn.unique().tolist()) == {-1.0, 0.0, 1.0}
    assert not torch.equal(mean, drawn)
    continuous = GaussianProcess(CosineVP(), 1, 2.0)
    request["length"] = 1
    mean = generate(DdimSampler(4, last="mean"), continuous, network, **request).ids  # type: ignore[arg-type]
    drawn = generate(DdimSampler(4), continuous, network, **request).ids  # type: ignore[arg-type]
    noise = continuous.deviation(torch.zeros(1).double()) / continuous.signal(
        torch.zeros(1).double()
    )
    assert float((drawn - mean).std()) == pytest.approx(float(noise), rel=0.15)


@pytest.mark.parametrize("schedule", SCHEDULES, ids=str)
def test_grids_of_a_gaussian_process_fall_evenly_in_their_unit(schedule: Any) -> None:
    process = GaussianProcess(schedule, 1)
    by_snr = torch.tensor(LogSnrGrid(12).times_of(process), dtype=torch.float64)
    by_information = torch.tensor(InformationGrid(12).times_of(process), dtype=torch.float64)
    for times in (by_snr, by_information):
        assert times[0] == 1.0
        assert times[-1] == 0.0
        assert len(times) == 13
        assert bool((times.diff() < 0).all())
    log_snr = process.snr(by_snr).log()
    assert float(log_snr[1:].diff().std()) < 1e-6
    information = process.information(by_information)
    assert float(information.diff().std()) < 2e-3
    assert LogSnrGrid(1).times_of(process) == [1.0, 0.0]
    assert isinstance(process.information_time, InformationTime)


def test_windows_of_vectors_are_drawn_from_left_to_right() -> None:
    """Positions of a later window stay at the prior, and blocks reach the network."""
    process = GaussianProcess(CosineVP(), 1)
    network = network_of_means(process, lambda z, a, sigma: z.tanh())
    seen: list[Canvas] = []
    for sampler in (
        BlockwiseSampler(DdimSampler(3), 2),
        HyperscheduleSampler(HeunSampler(8), WindowTimes(2, "slide", paired=False)),
    ):
        drawn = generate(
            sampler,
            process,
            network,
            index=torch.arange(3),
            length=4,
            seed=0,
            on_step=lambda step, canvas: seen.append(canvas),
        )
        assert bool(drawn.ids.isfinite().all())
    waiting = seen[0].t[:, 2:]
    assert bool((waiting == 1.0).all())


# ---------------------------------------------------------------------- refusals


def test_samplers_refuse_states_that_they_do_not_move() -> None:
    process = GaussianProcess(CosineVP(), 2)
    network = network_of_means(process, lambda z, a, sigma: z)
    request: dict[str, Any] = {"index": torch.arange(2), "length": 2, "seed": 0}
    tokens = processes()["masked"]
    token_samplers: list[Sampler] = [
        AncestralSampler(2),
        TauLeapingSampler(2),
        BlockwiseSampler(AncestralSampler(2), 1),
        HyperscheduleSampler(AncestralSampler(2), WindowTimes(1, paired=False)),
    ]
    for sampler in token_samplers:
        with pytest.raises(ArgumentError, match="moves tokens, but GaussianProcess"):
            sampler.check_supported(process, "mean")
        with pytest.raises(ArgumentError, match="moves tokens, but GaussianProcess"):
            generate(sampler, process, network, **request)
        with pytest.raises(ArgumentError, match="predicts the mean of a vector"):
            sampler.check_supported(tokens, "mean")
    for build in BUILD.values():
        with pytest.raises(ArgumentError, match="moves vectors, but TreeProcess"):
            build(2).check_supported(tokens, "distribution")
        with pytest.raises(ArgumentError, match="predicts a distribution of tokens"):
            build(2).check_supported(process, "distribution")
        with pytest.raises(ArgumentError, match="this run has none"):
            build(2).check_supported(None, "mean")


class Careless(Sampler):
    """Sampler of tokens that checks nothing itself."""

    def check_supported(self, process: Any, predicts: Any) -> None:
        pass

    def run(self, process: Any, network: Any, canvas: Canvas, rng_at: Any) -> Any:
        yield canvas


def test_generate_refuses_vectors_for_samplers_that_check_nothing() -> None:
    process = GaussianProcess(CosineVP(), 1)
    network = network_of_means(process, lambda z, a, sigma: z)
    with pytest.raises(ArgumentError, match="Careless: this sampler moves tokens"):
        generate(Careless(), process, network, index=torch.arange(2), length=2, seed=0)


def test_masks_of_a_sample_are_never_broadcast_over_positions() -> None:
    """B = n = d = 3: torch would broadcast a mask [B] silently."""
    zt = torch.zeros(3, 3, 3, dtype=torch.float64)
    times = torch.ones(3, 3, dtype=torch.float64)
    free = torch.ones(3, 3, dtype=torch.bool)
    one = torch.tensor([True, False, False])
    canvas = Canvas(zt, times, ~free, free)
    for wrong in ({"free": one}, {"clean": one}, {"t": times[0]}):
        settings: dict[str, Any] = {"t": times, "clean": ~free, "free": free, **wrong}
        with pytest.raises(ArgumentError, match="one entry per position"):
            Canvas(zt, **settings)
    with pytest.raises(ArgumentError, match=r"Canvas\.advance: s"):
        canvas.advance(zt, times[0])
    with pytest.raises(ArgumentError, match="step_rows: among"):
        step_rows(lambda noisy: None, canvas, lambda *a: zt, one)  # type: ignore[arg-type, return-value]
    process = GaussianProcess(CosineVP(), 3)
    network = network_of_means(process, lambda z, a, sigma: z)
    with pytest.raises(ArgumentError, match="prompt_mask"):
        generate(
            DdimSampler(2),
            process,
            network,
            index=torch.arange(3),
            length=3,
            seed=0,
            prompt=zt,
            prompt_mask=one,
        )
    with pytest.raises(ArgumentError, match="finite"):
        generate(
            DdimSampler(2),
            process,
            network,
            index=torch.arange(3),
            length=3,
            seed=0,
            prompt=zt * torch.nan,
            prompt_mask=free,
        )


def test_settings_out_of_range_are_refused() -> None:
    with pytest.raises(ArgumentError, match="eta"):
        DdimSampler(2, eta=1.5)
    with pytest.raises(ArgumentError, match="last"):
        EulerSampler(2, last="mode")  # type: ignore[arg-type]
    with pytest.raises(ArgumentError, match="only Gaussian processes"):
        LogSnrGrid(2).times_of(processes()["masked"])
    assert Grid("uniform", 3).times() == DdimSampler(3).times(GaussianProcess(CosineVP(), 1))
    assert PredictedMean(torch.zeros(1, 1)).mean.shape == (1, 1)
