"""Laws of samplers of vectors detect planted faults, and `ddiff check` applies them."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from declared import DeclaredVectorSampler
from torch import Tensor

from ddiff.core.gaussian import GaussianProcess
from ddiff.core.gaussian_schedule import CosineVP
from ddiff.core.rng import CounterRng
from ddiff.errors import ArgumentError
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.gaussian import (
    DdimSampler,
    EulerMaruyamaSampler,
    EulerSampler,
    GaussianSampler,
    HeunSampler,
)
from ddiff.sampling.grid import Grid, InformationGrid
from ddiff.sampling.loop import Canvas
from ddiff.testing import check_vector_sampler
from ddiff.testing import vector_sampler as laws
from ddiff.testing.check_command import check_component
from ddiff.testing.vector_sampler import VectorSamplerCase, small_vector_processes

PROCESSES = small_vector_processes()


class StopsEarly(DeclaredVectorSampler):
    """Fault: the state after the last step is left out."""

    def run(self, *arguments: Any) -> Iterator[Canvas]:
        yield from list(self.inner.run(*arguments))[:-1]


class ForgetsGiven(DeclaredVectorSampler):
    """Fault: given vectors are overwritten at the end."""

    def run(self, *arguments: Any) -> Iterator[Canvas]:
        for canvas in self.inner.run(*arguments):
            yield canvas._replace(zt=torch.where(canvas.t.unsqueeze(-1) == 0, 0.5, canvas.zt))


class SharesRandomness(DeclaredVectorSampler):
    """Fault: a sample depends on the other samples of its batch."""

    def run(self, *arguments: Any) -> Iterator[Canvas]:
        for canvas in self.inner.run(*arguments):
            yield canvas._replace(zt=canvas.zt - 1e-3 * canvas.zt.mean(0))


class VarianceAsDeviation(GaussianSampler):
    """Fault: the noise of a step of DDPM has the variance in place of the deviation."""

    def move(
        self, process: Any, network: Any, canvas: Canvas, s: Tensor, rng: CounterRng
    ) -> Canvas:
        mean = DdimSampler(self.grid, 1.0).move(process, network, canvas, s, _Middle(rng))
        drawn = DdimSampler(self.grid, 1.0).move(process, network, canvas, s, rng)
        noise = drawn.zt - mean.zt
        # noise = deviation * n; its size follows from the state and does not need the formula.
        size = noise.abs().mean().clamp(min=1e-9)
        return drawn._replace(zt=mean.zt + noise * size * math.sqrt(math.pi / 2.0))


class _Middle(CounterRng):
    """Generator of uniforms 1/2, so that normal numbers are 0."""

    def __init__(self, rng: CounterRng) -> None:
        super().__init__(rng.seed, rng.step, rng.index, rng.length)

    def uniform(self, channel: str, count: int = 1) -> Tensor:
        shape = (len(self.index), self.length, count)
        return torch.full(shape[: 2 if count == 1 else 3], 0.5, dtype=torch.float64)


def broken(build: Callable[[int], Any], process: GaussianProcess) -> set[str]:
    case = VectorSamplerCase(build, process)
    reports = [one(case) for one in laws.VECTOR_SAMPLER_LAWS]
    return {report.law.partition(": ")[2] for report in reports if not report.passed}


FAULTS: dict[str, tuple[Callable[[int], Any], str]] = {
    "quality": (
        lambda n: DeclaredVectorSampler(EulerSampler(n), "of an order", 0),
        "declarations are consistent",
    ),
    "steps": (lambda n: StopsEarly(EulerSampler(n)), "yields as many canvases as steps"),
    "given": (
        lambda n: ForgetsGiven(EulerSampler(n)),
        "returns finite vectors at t = 0 and keeps given ones",
    ),
    "batch": (
        lambda n: SharesRandomness(EulerSampler(n)),
        "a sample does not depend on its batch",
    ),
    "exact": (
        lambda n: DeclaredVectorSampler(EulerSampler(n), "exact", 0),
        "exact if declared exact",
    ),
    "order": (
        lambda n: DeclaredVectorSampler(DdimSampler(n), "of an order", 2),
        "reaches its declared order",
    ),
    "noise": (VarianceAsDeviation, "converges to the data distribution"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_laws_of_samplers_of_vectors_detect_planted_faults(name: str) -> None:
    build, law = FAULTS[name]
    assert law in broken(build, PROCESSES["flow"])


def test_every_law_of_samplers_of_vectors_has_a_planted_fault() -> None:
    names = {law.name.partition(": ")[2] for law in laws.VECTOR_SAMPLER_LAWS}
    assert names == {law for _, law in FAULTS.values()}


def test_correct_sampler_with_declarations_breaks_no_law() -> None:
    assert broken(lambda n: DeclaredVectorSampler(EulerSampler(n)), PROCESSES["flow"]) == set()


def test_check_vector_sampler_refuses_samplers_of_tokens_and_wide_vectors() -> None:
    with pytest.raises(ArgumentError, match="this sampler moves tokens"):
        check_vector_sampler(AncestralSampler, PROCESSES["flow"])
    with pytest.raises(ArgumentError, match=r"vectors of one number.*got width 2"):
        check_vector_sampler(DdimSampler, GaussianProcess(CosineVP(), 2))


@pytest.mark.parametrize("name", ["ddpm", "heun"])
def test_check_command_checks_samplers_of_vectors(
    name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert check_component(name, ["last=mean"]) == 0
    out = capsys.readouterr().out
    assert "vector sampler: reaches its declared order" in out
    assert "on 3 instance(s), 0 broken" in out


def test_heun_declares_order_1_on_equal_steps_of_information_time() -> None:
    """Where SNR is small, these are long steps of t, and twice as many halve the error only."""
    assert HeunSampler(InformationGrid(8)).order == 1
    assert HeunSampler(Grid("uniform", 8)).order == 2


def test_measured_orders_tell_heun_from_the_samplers_of_order_1() -> None:
    """On straight paths Euler has order 1, and Heun has order 2."""
    flow = PROCESSES["flow"]

    def declare_second(build: Callable[[int], Any]) -> VectorSamplerCase:
        return VectorSamplerCase(lambda n: DeclaredVectorSampler(build(n), "of an order", 2), flow)

    assert laws.vector_orders_are_reached(declare_second(HeunSampler)).passed
    assert not laws.vector_orders_are_reached(declare_second(EulerSampler)).passed
    assert laws.vector_samplers_converge(VectorSamplerCase(EulerMaruyamaSampler, flow)).passed
