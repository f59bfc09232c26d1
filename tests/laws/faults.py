"""A planted fault: what passes a law of the kit, and what is one line away from it and does not."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

from ddiff.testing.report import Law


class Fault(NamedTuple):
    what: str
    law: Law
    healthy: Callable[[], Any]
    faulty: Callable[[], Any]
    options: Mapping[str, Any] = MappingProxyType({})


def assert_found(fault: Fault) -> None:
    """The law passes for the healthy one, with something to look at, and is broken by the faulty one."""
    healthy = fault.law(fault.healthy(), **fault.options)
    assert healthy.passed, str(healthy)
    assert healthy.probes > 0
    report = fault.law(fault.faulty(), **fault.options)
    assert not report.passed
    assert "raised" not in report.where, (
        report.where
    )  # found by its numbers, not because the plant itself is broken
