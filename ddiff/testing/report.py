"""What a law says about an object: how far it is broken, where, and how much is allowed."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddiff.errors import ArgumentError

FINER = 4  # times the nodes, where a law of an integral seems to be broken


class LawReport(NamedTuple):
    """One law on one object: the largest `error`, the `tolerance`, `where` it was found and what the law says.

    `probes` counts the numbers that were compared; a law with none does not apply to the object.
    """

    law: str
    error: float
    tolerance: float
    where: str
    explanation: str
    probes: int = 1

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    def __str__(self) -> str:
        verdict = "holds" if self.passed else "is broken"
        return (
            f'"{self.law}" {verdict}: error {self.error:.3g}, allowed {self.tolerance:.3g}, largest at {self.where}. '
            f"{self.explanation}"
        )


class Gap(NamedTuple):
    """The largest difference among `probes` numbers and where it is."""

    error: float
    where: str
    probes: int


def compare(
    got: Tensor,
    expected: Tensor | float,
    where: Mapping[str, Any] | None = None,
    relative_to: Tensor | float = 1.0,
) -> Gap:
    """The largest |got - expected| / relative_to; NaN, and infinity on one side only, count as infinite.

    Labels in `where` are shown as they are; a tensor label is read at the worst place (its dimensions are the first
    ones of `got`).
    """
    due = torch.as_tensor(expected, dtype=torch.float64).detach()
    got, due = torch.broadcast_tensors(got.detach().double(), due)
    difference = torch.where(got == due, 0.0, (got - due).abs()) / relative_to
    difference = difference.nan_to_num(nan=math.inf, posinf=math.inf)
    if difference.numel() == 0:
        return Gap(0.0, "nothing", 0)
    worst = int(difference.argmax())
    place = torch.unravel_index(torch.tensor(worst), difference.shape)
    labels = [f"{name} = {_at(label, place)}" for name, label in (where or {}).items()]
    values = f"got {float(got.reshape(-1)[worst]):.6g} for {float(due.reshape(-1)[worst]):.6g}"
    entry = tuple(int(index) for index in place)
    found = ", ".join([*labels, f"entry {entry}"] if entry else labels) or "its value"
    return Gap(float(difference.reshape(-1)[worst]), f"{found}: {values}", difference.numel())


def _at(label: Any, place: tuple[Tensor, ...]) -> str:
    if not isinstance(label, Tensor):
        return str(label)
    value = label[tuple(place[: label.dim()])]
    return f"{float(value):.9g}" if value.is_floating_point() else str(int(value))


Measure = Callable[..., Iterator[Gap]]


class Law:
    """A named law: called with an object (and options) it gives a `LawReport`.

    `measure` yields gaps; its docstring says what must hold and why the tolerance is what it is. An object that raises
    breaks the law, since whoever relies on the law would meet the same exception. A measure that integrates takes
    `finer`, how many times more nodes, and is asked again with more before the law counts as broken: a steep integrand
    is no fault.
    """

    def __init__(self, name: str, tolerance: float, measure: Measure) -> None:
        self.name, self.tolerance, self.measure = name, tolerance, measure
        self.__doc__ = measure.__doc__
        self.explanation = " ".join((measure.__doc__ or "").split())

    def __call__(self, subject: Any, **options: Any) -> LawReport:
        report = self._report(subject, options)
        if report.passed or "finer" not in signature(self.measure).parameters:
            return report
        return self._report(subject, {"finer": FINER, **options})

    def _report(self, subject: Any, options: Mapping[str, Any]) -> LawReport:
        try:
            gaps = list(self.measure(subject, **options))
        except Exception as error:
            where = f"a call that raised {type(error).__name__}: {error}"
            return LawReport(self.name, math.inf, self.tolerance, where, self.explanation)
        worst = max(gaps, key=lambda found: found.error, default=Gap(0.0, "nothing", 0))
        probes = sum(found.probes for found in gaps)
        return LawReport(
            self.name, worst.error, self.tolerance, worst.where, self.explanation, probes
        )


def law(name: str, tolerance: float) -> Callable[[Measure], Law]:
    """Make a law of a generator of gaps."""
    return lambda measure: Law(name, tolerance, measure)


def evaluate_laws(subject: Any, laws: Iterable[Law], **options: Any) -> list[LawReport]:
    """The reports of all laws that apply to the object."""
    reports = [one(subject, **options) for one in laws]
    return [report for report in reports if report.probes > 0]


def assert_laws(reports: Iterable[LawReport]) -> None:
    """Raise AssertionError with every broken law; ArgumentError when there is no report at all."""
    reports = list(reports)
    if not reports:
        raise ArgumentError(
            "assert_laws: reports must hold at least one report; got none, so nothing was proven."
        )
    broken = [str(report) for report in reports if not report.passed]
    if broken:
        raise AssertionError("\n".join(broken))
