"""Conformance checks (laws) as callable objects, and reports of their results.

A law is a property that the conformance kit tests.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from inspect import signature
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ddiff.errors import ArgumentError

FINER = 4  # factor on the quadrature nodes when a failed law is evaluated again


class LawReport(NamedTuple):
    """Result of one law on one object.

    Attributes:
        law: name of the law.
        error: largest error.
        tolerance: largest allowed error.
        where: place of the largest error.
        explanation: docstring of the law.
        probes: number of compared values; 0 if the law does not apply to the object.
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
            f'"{self.law}" {verdict}: error {self.error:.3g}, allowed {self.tolerance:.3g}, '
            f"largest at {self.where}. {self.explanation}"
        )


class Gap(NamedTuple):
    """Largest difference between computed and expected numbers.

    Attributes:
        error: the difference.
        where: place of the difference, as text.
        probes: number of compared numbers.
    """

    error: float
    where: str
    probes: int


def compare(
    got: Tensor,
    expected: Tensor | float,
    where: Mapping[str, Any] | None = None,
    relative_to: Tensor | float = 1.0,
) -> Gap:
    """Find the largest value of |got - expected| / relative_to, and where it occurs.

    If one of the two numbers is NaN, or only one is infinite, their difference counts as infinite.

    Args:
        got: computed numbers.
        expected: expected numbers.
        where: labels by name, which describe the place in the report. A tensor label contains one
            value for each index of the first dimensions of `got`. Other labels are printed
            unchanged.
        relative_to: scale of the differences.
    """
    target = torch.as_tensor(expected, dtype=torch.float64).detach()
    # float64 even for ids and float32 results, so that the comparison adds no rounding
    got, target = torch.broadcast_tensors(got.detach().double(), target)
    # equal infinities have no difference, although inf - inf is NaN
    difference = torch.where(got == target, 0.0, (got - target).abs()) / relative_to
    difference = difference.nan_to_num(nan=math.inf, posinf=math.inf)
    if difference.numel() == 0:
        return Gap(0.0, "nothing", 0)
    # one place is enough: a report shows the worst
    worst = int(difference.argmax())
    place = torch.unravel_index(torch.tensor(worst), difference.shape)
    labels = []
    for name, label in (where or {}).items():
        labels.append(f"{name} = {_format_label(label, place)}")
    if place:
        entry = tuple(int(index) for index in place)
        labels.append(f"entry {entry}")
    found = ", ".join(labels) or "its value"
    got_value = float(got.reshape(-1)[worst])
    target_value = float(target.reshape(-1)[worst])
    error = float(difference.reshape(-1)[worst])
    values = f"got {got_value:.6g} for {target_value:.6g}"
    return Gap(error, f"{found}: {values}", difference.numel())


def _format_label(
    label: Any,
    place: tuple[Tensor, ...],
) -> str:
    if not isinstance(label, Tensor):
        return str(label)
    value = label[tuple(place[: label.dim()])]
    if value.is_floating_point():
        return f"{float(value):.9g}"
    return str(int(value))


Measure = Callable[..., Iterator[Gap]]


class Law:
    """Property that the conformance kit tests. A call with an object returns a `LawReport`.

    A law is broken if its largest error exceeds its tolerance, or if `measure` raises an exception,
    since code that relies on the law would raise the same exception.

    Args:
        name: name of the law in reports.
        tolerance: largest allowed error.
        measure: generator function that maps an object (and options) to `Gap` objects. Its
            docstring states the property and the reason for the tolerance. If it has an argument
            `finer`, a factor on the number of quadrature nodes, a failed law is evaluated a second
            time with `finer=FINER`, because a steep integrand is not a fault.
    """

    def __init__(
        self,
        name: str,
        tolerance: float,
        measure: Measure,
    ) -> None:
        self.name = name
        self.tolerance = tolerance
        self.measure = measure
        self.__doc__ = measure.__doc__
        # one line, since reports are printed in one paragraph
        self.explanation = " ".join((measure.__doc__ or "").split())

    def __call__(self, subject: Any, **options: Any) -> LawReport:
        report = self._report(subject, options)
        if report.passed or "finer" not in signature(self.measure).parameters:
            return report
        return self._report(subject, {"finer": FINER, **options})

    def _report(
        self,
        subject: Any,
        options: Mapping[str, Any],
    ) -> LawReport:
        try:
            # a generator raises only when it is consumed
            gaps = list(self.measure(subject, **options))
        except Exception as error:
            where = f"a call that raised {type(error).__name__}: {error}"
            return LawReport(
                self.name,
                math.inf,
                self.tolerance,
                where,
                self.explanation,
            )
        worst = max(
            gaps,
            key=lambda found: found.error,
            default=Gap(0.0, "nothing", 0),
        )
        probes = sum(found.probes for found in gaps)
        return LawReport(
            self.name, worst.error, self.tolerance, worst.where, self.explanation, probes
        )


def law(
    name: str,
    tolerance: float,
) -> Callable[[Measure], Law]:
    """Return a decorator that turns a check into a `Law` (a checked property).

    The check is a generator function that yields the measured errors as `Gap` objects. `tolerance`
    is the largest allowed error, and `name` the name of the law in reports.
    """

    def decorate(measure: Measure) -> Law:
        return Law(name, tolerance, measure)

    return decorate


def evaluate_laws(subject: Any, laws: Iterable[Law], **options: Any) -> list[LawReport]:
    """Evaluate conformance checks on `subject`. Return the reports of the checks that apply.

    A check applies if it compares at least one number. `options` are passed to each check.
    """
    reports = [one(subject, **options) for one in laws]
    # a law that yields nothing does not apply, which is neither passed nor broken
    return [report for report in reports if report.probes > 0]


def assert_laws(reports: Iterable[LawReport]) -> None:
    """Raise AssertionError if a report says that a law (a checked property) is broken.

    The message contains the name of every broken law.

    Raises ArgumentError if `reports` is empty.
    """
    reports = list(reports)
    if not reports:
        raise ArgumentError(
            "assert_laws: reports must hold at least one report; got an empty sequence, so no law "
            "was checked. Pass the result of a check, such as check_process(process)."
        )
    broken = [str(report) for report in reports if not report.passed]
    if broken:
        raise AssertionError("\n".join(broken))
