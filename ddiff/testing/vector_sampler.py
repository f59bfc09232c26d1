"""Conformance checks of a sampler of vectors, by the distribution of its samples.

A sample is two positions with one number each. The data are a mixture of two normals, in which the
numbers depend on each other, and the network predicts the exact mean. The error of a sampler is the
largest Wasserstein-1 distance between samples and data over four projections to one dimension,
where the distribution of the data is known.

Shapes: B samples of 2 positions, k components of the mixture.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from ddiff.core.elbo import Network
from ddiff.core.gaussian import GaussianProcess, PredictedMean
from ddiff.core.gaussian_schedule import CosineVP, Flow, LinearBetaVP
from ddiff.core.network import count_evaluations
from ddiff.core.process import Query, RowFunction
from ddiff.core.times import Noisy
from ddiff.errors import ArgumentError
from ddiff.sampling.loop import Canvas, Sampler, generate, initial_canvas, require_states
from ddiff.testing.report import Gap, LawReport, compare, evaluate_laws, law
from ddiff.testing.sampler import canvases_are_counted, declarations_are_consistent
from ddiff.testing.sampler_distribution import FastRng

WEIGHT = torch.tensor([0.35, 0.65], dtype=torch.float64)
MEAN = torch.tensor([[-1.1, 0.9], [0.6, -0.4]], dtype=torch.float64)  # component, position
SPREAD = torch.tensor([0.3, 0.5], dtype=torch.float64)
LENGTH = 2
# Directions of the projections: both numbers, their sum and their difference.
HALF = math.sqrt(0.5)
DIRECTIONS = torch.tensor([[1.0, 0.0], [0.0, 1.0], [HALF, HALF], [HALF, -HALF]]).double()

POINTS = 2**12  # samples; the random noise of a sampler adds about 0.02 to a distance
SAMPLING = 0.02
MEASURABLE = 0.1  # smallest distance from which an order is measured
FEW = 2  # fewest steps from which an order is measured
MANY = 16  # most steps from which an order is measured
SLACK = 0.6  # of an order, which is reached as the number of steps grows
ENOUGH = 128  # steps with which a distance must be small
SMALL = 0.2
BISECTIONS = 50  # of the interval of quantiles, [-8, 8]


class VectorSamplerCase(NamedTuple):
    """Vector sampler under test, and the process that it reverses.

    Attributes:
        build: function that makes the sampler for a number of steps.
        process: Gaussian process of vectors with one number.
    """

    build: Callable[[int], Sampler]
    process: GaussianProcess

    def generate(self, steps: int, index: Tensor, seed: int, **options: Any) -> Tensor:
        """Generate the samples with the indices `index` [B] and return their vectors [B,2,1].

        `options` are further arguments of `ddiff.sampling.loop.generate`.
        """
        network = mixture_network(self.process)
        samples = generate(
            self.build(steps),
            self.process,
            network,
            index=index,
            length=LENGTH,
            seed=seed,
            **options,
        )
        return samples.ids


def small_vector_processes() -> dict[str, GaussianProcess]:
    """Return the processes on which samplers of vectors are checked, by name."""
    return {
        "cosine": GaussianProcess(CosineVP(), 1),
        "flow": GaussianProcess(Flow(), 1),
        # The only one with SNR(1) > 0.
        "linear": GaussianProcess(LinearBetaVP(), 1),
    }


def check_vector_sampler(
    build: Callable[[int], Sampler], process: GaussianProcess
) -> list[LawReport]:
    """Apply every conformance check of samplers of vectors to a sampler.

    Args:
        build: function that makes the sampler for a number of steps.
        process: process of vectors of one number, as in `small_vector_processes`.

    Raises ArgumentError if the sampler does not support the process, or if its width is not 1.
    """
    if process.width != 1:
        raise ArgumentError(
            "check_vector_sampler: process must have vectors of one number, because distances are "
            f"measured in one dimension; got width {process.width}."
        )
    _require_supported(build(FEW), process)
    return evaluate_laws(VectorSamplerCase(build, process), VECTOR_SAMPLER_LAWS)


def find_accepted_vector_processes(
    build: Callable[[int], Sampler],
) -> tuple[dict[str, VectorSamplerCase], list[str]]:
    """Find the processes of `small_vector_processes()` that a sampler accepts.

    Returns the accepted processes as cases to check, by name, and the messages of rejections.
    """
    cases: dict[str, VectorSamplerCase] = {}
    rejected = []
    for name, process in small_vector_processes().items():
        try:
            _require_supported(build(FEW), process)
        except ArgumentError as error:
            rejected.append(f"{name}, mean: {error}")
        else:
            cases[f"{name}, mean"] = VectorSamplerCase(build, process)
    return cases, rejected


def _require_supported(sampler: Sampler, process: GaussianProcess) -> None:
    # A sampler of tokens may accept every process.
    require_states(sampler, process, "mean")
    sampler.check_supported(process, "mean")


# ------------------------------------------------------------------ data and measurement


def mixture_network(process: GaussianProcess) -> Network:
    """Return the network that predicts E[x_i | z_1, z_2], the mean of a number of the data."""

    def network(noisy: Noisy) -> Query:
        def query(rows: Tensor, node: Tensor, fn: RowFunction, *per_row: Tensor) -> Any:
            z = noisy.zt.squeeze(-1).unsqueeze(1)
            t = noisy.t.reshape(-1)
            a = process.signal(t).reshape(-1, 1, LENGTH)
            sigma = process.deviation(t).reshape(-1, 1, LENGTH)
            # [B,k,2]: components before positions
            own_spread = SPREAD.unsqueeze(-1)
            variance = a**2 * own_spread**2 + sigma**2
            distance = z - a * MEAN
            log_normal = -0.5 * (distance**2 / variance + variance.log())
            share = (WEIGHT.log() + log_normal.sum(-1)).softmax(-1)
            mean = MEAN + a * own_spread**2 / variance * distance
            predicted = (share.unsqueeze(-1) * mean).sum(1)
            return fn(PredictedMean(predicted.reshape(-1, 1)[rows]), *per_row)

        return query

    return count_evaluations(network, "mean")


def measure_wasserstein(case: VectorSamplerCase, steps: int) -> float:
    """Measure the largest Wasserstein-1 distance of a projection of the samples from the data."""
    rng = QuasiRandomStart(POINTS, seed=7)
    canvas = initial_canvas(case.process, rng)
    sampler = case.build(steps)
    network = mixture_network(case.process)
    for moved in sampler.run(case.process, network, canvas, lambda step: rng):
        canvas = moved
    samples = canvas.zt.squeeze(-1)
    distances = []
    for direction in DIRECTIONS:
        projected = (samples @ direction).sort().values
        distances.append(float((projected - _quantiles(direction)).abs().mean()))
    return max(distances)


@final
class QuasiRandomStart(FastRng):
    """Random generator that draws the initial states of samples from Sobol points.

    Distances between distributions are then measured with less noise.
    """

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        drawn = super().uniform(channel, count)
        if channel != "start":
            return drawn
        points = torch.quasirandom.SobolEngine(LENGTH, scramble=True, seed=1)
        return points.draw(self.count, dtype=torch.float64).reshape(drawn.shape)


def _quantiles(direction: Tensor) -> Tensor:
    """Return the quantiles of the projected data at the middles of POINTS equal shares."""
    mean = MEAN @ direction
    share = (torch.arange(POINTS, dtype=torch.float64) + 0.5) / POINTS
    low = torch.full_like(share, -8.0)
    high = torch.full_like(share, 8.0)
    for _ in range(BISECTIONS):
        middle = (low + high) / 2.0
        below = torch.special.ndtr((middle.unsqueeze(-1) - mean) / SPREAD) @ WEIGHT
        low = torch.where(below < share, middle, low)
        high = torch.where(below < share, high, middle)
    return (low + high) / 2.0


# ------------------------------------------------------------------ laws


@law("vector sampler: returns finite vectors at t = 0 and keeps given ones", tolerance=0.0)
def ends_in_vectors(case: VectorSamplerCase) -> Iterator[Gap]:
    """Check that samples are finite, and that given vectors keep their numbers.

    All positions must end at t = 0. Tolerance 0: given numbers are copied.
    """
    index = torch.arange(32)
    given = torch.linspace(-1.9, 2.3, 64, dtype=torch.float64).reshape(32, LENGTH, 1)
    for positions in ([False, False], [True, False], [True, True]):
        mask = torch.tensor(positions).expand(32, LENGTH)
        times: dict[int, Tensor] = {}

        def keep(step: int, canvas: Canvas, times: dict[int, Tensor] = times) -> None:
            times[step] = canvas.t

        drawn = case.generate(3, index, seed=5, prompt=given, prompt_mask=mask, on_step=keep)
        yield compare(drawn.isfinite().double(), 1.0, {"finite, given at": positions})
        yield compare(drawn[mask], given[mask], {"given at": positions})
        if times:
            yield compare(times[max(times)], 0.0, {"last time, given at": positions})


@law("vector sampler: a sample does not depend on its batch", tolerance=1e-9)
def vectors_are_independent_of_batch(case: VectorSamplerCase) -> Iterator[Gap]:
    """Check that a sample depends only on the seed and the index of the sample.

    The same samples are drawn a second time, in a smaller batch, and in reverse order. Tolerance
    1e-9: vectorized functions round differently in tensors of another size.
    """
    index = torch.arange(24)
    expected = case.generate(3, index, seed=11)
    others = {"again": index, "in a smaller batch": index[5:9], "in another order": index.flip(0)}
    for how, rows in others.items():
        yield compare(case.generate(3, rows, seed=11), expected[rows], {"drawn": how})


@law("vector sampler: exact if declared exact", tolerance=2 * SAMPLING)
def exact_vector_samplers_are_exact(case: VectorSamplerCase) -> Iterator[Gap]:
    """Check that a sampler that declares the quality "exact" draws from the data distribution.

    Tolerance 0.04: the randomness of the samples adds 0.02 to the Wasserstein distance.
    """
    if case.build(FEW).quality == "exact":
        for steps in (1, FEW):
            yield compare(torch.tensor(measure_wasserstein(case, steps)), 0.0, {"steps": steps})


@law("vector sampler: converges to the data distribution", tolerance=SMALL)
def vector_samplers_converge(case: VectorSamplerCase) -> Iterator[Gap]:
    """Check the Wasserstein distance between samples and data with 128 steps.

    The check does not apply to samplers of the quality "heuristic". Tolerance 0.2: a sampler of
    order 1 has an error of 0.03 with equal steps, and of up to 0.16 on a grid with few steps at
    high noise. The two components of the data are 2 apart.
    """
    if case.build(FEW).quality != "heuristic":
        distance = torch.tensor(measure_wasserstein(case, ENOUGH))
        yield compare(distance, 0.0, {"Wasserstein distance at steps": ENOUGH})


@law("vector sampler: reaches its declared order", tolerance=SLACK)
def vector_orders_are_reached(case: VectorSamplerCase) -> Iterator[Gap]:
    """Check that a sampler reaches its declared order of convergence.

    With order p, four times as many steps must divide the Wasserstein distance between samples and
    data by 4^p, for at least one number of steps. The number of steps is doubled until the distance
    is too small to measure. The error is the declared order minus the largest measured order.
    Tolerance 0.6: the order is reached as the number of steps grows, where the distance is small.
    """
    sampler = case.build(FEW)
    if sampler.quality != "of an order":
        return
    steps = FEW
    distance = measure_wasserstein(case, steps)
    is_measured = False
    best = -math.inf
    while distance >= MEASURABLE and best < sampler.order - SLACK and steps <= MANY:
        is_measured = True
        # Independent errors add in squares.
        finer = math.sqrt(max(measure_wasserstein(case, 4 * steps) ** 2 - SAMPLING**2, 1e-12))
        best = max(best, math.log(distance / finer) / math.log(4.0))
        steps *= 2
        distance = measure_wasserstein(case, steps)
    missing = max(0.0, sampler.order - best) if is_measured else 0.0
    labels = {"order": sampler.order, "best measured": f"{best:.2f}"}
    yield compare(torch.tensor(missing), 0.0, labels)


VECTOR_SAMPLER_LAWS = (
    declarations_are_consistent,
    canvases_are_counted,
    ends_in_vectors,
    vectors_are_independent_of_batch,
    exact_vector_samplers_are_exact,
    vector_samplers_converge,
    vector_orders_are_reached,
)
