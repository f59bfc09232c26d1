"""Conformance checks of samplers detect a wrong `quality` or order; `ddiff check` covers all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from declared import DeclaredSampler

from ddiff.errors import ArgumentError, PluginError
from ddiff.sampling.ancestral import AncestralSampler
from ddiff.sampling.first_hitting import FirstHittingSampler
from ddiff.sampling.loop import Canvas
from ddiff.sampling.trapezoidal import TrapezoidalSampler
from ddiff.sampling.unmasking import UnmaskingSampler
from ddiff.testing import assert_laws, check_sampler
from ddiff.testing import sampler as laws
from ddiff.testing.check_command import check_component
from ddiff.testing.sampler import SamplerCase, find_accepted_processes, small_processes

MASKS = small_processes()["masks"]


def declare(
    build: Callable[[int], Any], quality: str, order: int, predicts: Any = "distribution"
) -> SamplerCase:
    return SamplerCase(lambda steps: DeclaredSampler(build(steps), quality, order), MASKS, predicts)


@pytest.mark.parametrize(
    ("build", "order", "holds"),
    [
        (AncestralSampler, 1, True),
        (AncestralSampler, 2, False),
        (TrapezoidalSampler, 2, True),
        (TrapezoidalSampler, 3, False),
        (UnmaskingSampler, 1, False),  # most confident first: does not converge to the joint
    ],
)
def test_conformance_check_detects_samplers_that_declare_a_wrong_order(
    build: Any, order: int, holds: bool
) -> None:
    assert laws.orders_are_reached(declare(build, "of an order", order)).passed is holds


def test_conformance_check_detects_inexact_sampler_declared_exact() -> None:
    assert laws.exact_samplers_are_exact(
        declare(lambda n: FirstHittingSampler(), "exact", 0)
    ).passed
    report = laws.exact_samplers_are_exact(declare(AncestralSampler, "exact", 0))
    assert not report.passed
    assert report.error == pytest.approx(0.408, abs=0.02), (
        "one step draws both tokens from their marginals"
    )


@pytest.mark.parametrize(
    ("quality", "order"),
    [("of an order", 0), ("exact", 1), ("heuristic", 2), ("perfect", 0), ("of an order", -1)],
)
def test_conformance_check_detects_a_sampler_whose_order_contradicts_its_quality(
    quality: str, order: int
) -> None:
    assert not laws.declarations_are_consistent(declare(AncestralSampler, quality, order)).passed


class StopsEarly(DeclaredSampler):
    """Fault: the sampler leaves out the final state (canvas) of the batch."""

    def run(self, process: Any, network: Any, canvas: Canvas, rng_at: Any) -> Iterator[Canvas]:
        yield from list(self.inner.run(process, network, canvas, rng_at))[:-1]


class ForgetsGiven(DeclaredSampler):
    """Fault: the sampler overwrites the prompt."""

    def run(self, process: Any, network: Any, canvas: Canvas, rng_at: Any) -> Iterator[Canvas]:
        for canvas in self.inner.run(process, network, canvas, rng_at):  # noqa: B020
            yield canvas
        yield canvas.advance(torch.zeros_like(canvas.zt), canvas.t)


class SharesRandomness(DeclaredSampler):
    """Fault: a sample depends on the other samples of its batch."""

    def run(self, process: Any, network: Any, canvas: Canvas, rng_at: Any) -> Iterator[Canvas]:
        for canvas in self.inner.run(process, network, canvas, rng_at):  # noqa: B020
            yield canvas.advance(canvas.zt.roll(1, 0), canvas.t)


def test_conformance_checks_detect_samplers_with_planted_faults() -> None:
    def broken(fault: type[DeclaredSampler]) -> set[str]:
        case = SamplerCase(lambda steps: fault(AncestralSampler(steps), "heuristic", 0), MASKS)
        reports = [one(case) for one in laws.SAMPLER_LAWS]
        return {report.law.partition(": ")[2] for report in reports if not report.passed}

    assert broken(DeclaredSampler) == set()
    assert broken(StopsEarly) == {
        "yields as many canvases as steps",
        "returns tokens and keeps the prompt",
    }
    assert "returns tokens and keeps the prompt" in broken(ForgetsGiven)
    assert "a sample does not depend on its batch" in broken(SharesRandomness)


def test_check_sampler_raises_for_unsupported_process() -> None:
    assert_laws(check_sampler(lambda steps: FirstHittingSampler(), MASKS))
    with pytest.raises(ArgumentError, match="UnmaskingSampler"):
        check_sampler(UnmaskingSampler, small_processes()["uniform noise"])


def test_find_accepted_processes_reraises_type_errors() -> None:
    cases, rejected = find_accepted_processes(lambda vocabulary, steps: UnmaskingSampler(steps))
    assert sorted(cases) == ["a tree, distribution", "masks, distribution"]
    assert len(rejected) == 5

    def broken(vocabulary: Any, steps: int) -> Any:
        raise TypeError("no sampler")

    with pytest.raises(TypeError):
        find_accepted_processes(broken)


PLUGIN = """
from ddiff import hookimpl

@hookimpl
def ddiff_register(registry):
    registry.add("sampler", "honest", "odd.samplers:Honest")
    registry.add("sampler", "boasting", "odd.samplers:Boasting")
    registry.add("sampler", "choosy", "odd.samplers:Choosy")
"""

SAMPLERS = """
from ddiff import AncestralSampler, ArgumentError, ComponentConfig, FirstHittingSampler, PositiveInt

class Honest:
    class Config(ComponentConfig):
        extra: PositiveInt = 1

    @staticmethod
    def build(config, *, steps):
        return FirstHittingSampler()

class Boasting:
    @staticmethod
    def build(config, *, steps):
        sampler = AncestralSampler(steps)
        sampler.quality, sampler.order = "exact", 0
        return sampler

class Nowhere(AncestralSampler):
    def check_supported(self, process, predicts):
        raise ArgumentError("Nowhere: nothing suits it.")

class Choosy:
    @staticmethod
    def build(config, *, steps):
        return Nowhere(steps)
"""


@pytest.fixture
def odd_plugin(distribution: Callable[..., Path]) -> None:
    modules = {"odd_plugin": PLUGIN, "odd.__init__": "", "odd.samplers": SAMPLERS}
    distribution("odd-samplers", "1.0", {"odd": "odd_plugin"}, modules)


@pytest.mark.usefixtures("odd_plugin")
def test_check_command_finds_samplers_by_name_and_plugin(
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert check_component("honest", ["extra=3"]) == 0
    assert "on 3 instance(s), 0 broken" in capsys.readouterr().out
    assert check_component("boasting", []) == 1
    assert '"sampler: exact if declared exact" is broken: error 0.4' in capsys.readouterr().out
    with pytest.raises(
        ArgumentError, match=r"rejects every small process.*Nowhere: nothing suits it"
    ):
        check_component("choosy", [])
    # the name of a plugin selects all of its components
    assert check_component("odd", []) == 1
    out = capsys.readouterr().out
    assert "sampler choosy: ddiff check: the sampler" in out
    assert "1 broken. 1 component(s) not checked." in out


def test_check_command_lists_components_that_have_conformance_checks() -> None:
    with pytest.raises(PluginError, match=r"has no laws to check.*sampler ancestral"):
        check_component("wandb", [])


@pytest.mark.usefixtures("odd_plugin")
def test_find_components_returns_the_components_of_the_named_plugin(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    from ddiff.testing.check_command import find_components

    assert [part.name for part in find_components("odd", None, configured=False)] == [
        "boasting",
        "choosy",
        "honest",
    ]
    assert [part.name for part in find_components("hdlm", None, configured=True)] == ["hdlm"]
    core = {(part.kind, part.name) for part in find_components("core", None, configured=False)}
    assert ("sampler", "trapezoidal") in core
